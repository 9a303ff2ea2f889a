"""Private names of Ray are used in one file only."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

PRIVATE = re.compile(
    r"\bray(\.\w+)*\._(?!_)\w+"  # ray._private, ray.train.v2._internal, ray._raylet
    r"|\bfrom ray[\w.]* import .*\b_\w+"
    r"|\bray\.core\b"
    r"|\b_node_ip_address\b|\b_temp_dir\b|\b_system_config\b"  # parameters of ray.init
)

LOGGERS = "csmae/engine_logs.py"
"""Names Ray's loggers, some of which are called like private modules."""


def uses(text: str) -> list[str]:
    return [match.group() for match in PRIVATE.finditer(text)]


def test_one_file_uses_private_names_of_ray() -> None:
    sources = [*ROOT.glob("*.py"), *(ROOT / "csmae").rglob("*.py"), *(ROOT / "benchmarks").glob("*.py")]
    found = {str(path.relative_to(ROOT)) for path in sources if uses(path.read_text())}
    assert found - {LOGGERS} == {"csmae/cluster/ray_private.py"}


def test_uses_are_recognized() -> None:
    assert uses("from ray._private.state import state")
    assert uses("from ray import _raylet")
    assert uses("import ray.train.v2._internal.execution.callback")
    assert uses("ray._private.worker._worker_logs_enabled = False")
    assert uses("ray.init(address='local', _node_ip_address='127.0.0.1')")
    assert not uses("from ray.util.placement_group import remove_placement_group")
    assert not uses("ray.__version__")
