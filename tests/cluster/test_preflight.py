"""Preflight checks of reports from the nodes."""

from dataclasses import replace
from typing import Any

import pytest

from csmae.cluster.node_report import ClusterReport, Node, NodeReport
from csmae.cluster.preflight import advisory_checks, required_checks

REPORT = NodeReport({"python": "3.11.7"}, "0600", (), None, {"/": (2**40, 0.1)}, None, "two pairs", None, 0.0)


@pytest.mark.parametrize(
    ("values", "name", "error"),
    [
        ({"clock_offset_s": 9.2}, "clocks", "9 s ahead"),
        ({"clock_offset_s": -61}, "clocks", "61 s behind"),
        ({"gpus": ("NVIDIA H100 driver 580",)}, "GPUs", "Ray counts 0, nvidia-smi lists 1"),
        ({"ray_gpus": 1}, "GPUs", "Ray counts 1, nvidia-smi lists 0"),
        (
            {"gpus": ("NVIDIA T4 driver 9",), "ray_gpus": 1, "cuda_error": "too old"},
            "GPUs",
            "torch cannot use them: too old",
        ),
        ({"disks": {"/data": (2**30, 0.5)}}, "disks", "/data has 1.0 GiB free, 50% used"),
        ({"disks": {"/": (2**40, 0.96)}}, "disks", "/ has 1024.0 GiB free, 96% used"),
        ({"token_mode": "none"}, "token", "has none"),
        ({"versions": {"python": "3.12.1"}}, "versions", "python 3.12.1, here 3.11.7"),
        ({"data": "three pairs"}, "data", "three pairs; here two pairs"),
    ],
)
def test_an_error_names_only_its_node(values: dict[str, Any], name: str, error: str) -> None:
    cluster = ClusterReport(REPORT, [Node("a", REPORT, ""), Node("b", replace(REPORT, **values), "")])
    failed = [it for it in (*required_checks(cluster), *advisory_checks(cluster)) if it.remedy]
    assert [(it.name, it.found) for it in failed] == [(name, f"b: {error}")]
