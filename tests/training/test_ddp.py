"""Two ranks compute the same as one process with the same global batch."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from csmae.cli.main import main
from csmae.config import Loss, Masking
from csmae.model.csmae import CSMAE
from tests.conftest import SMALL, free_port
from tests.model.test_csmae import VARIANTS, batch, tiny
from tests.support.processes import PythonProcess, run_ranks

LOSS = Loss(mde_weight=0.5)
ROOT = Path(__file__).resolve().parents[2]


def model_of(variant: str) -> CSMAE:
    torch.manual_seed(3)
    return CSMAE(tiny(variant), Masking(), LOSS)


def work(rank: int, port: int, folder: str) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=2)
    results = {}
    for variant in VARIANTS:
        model = model_of(variant)
        halves = [t[rank * 4 : rank * 4 + 4] for t in batch(size=8)]
        parallel = DistributedDataParallel(model)  # must outlive the backward pass: its hooks reduce the gradients
        terms = parallel(*halves)
        terms["loss"].backward()
        terms = {name: term.detach() for name, term in terms.items()}
        for term in terms.values():
            dist.all_reduce(term)
        results[variant] = {
            "terms": {name: float(term) / 2 for name, term in terms.items()},
            "gradients": {name: p.grad for name, p in model.named_parameters()},
        }
    if rank == 0:
        torch.save(results, Path(folder) / "results.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, dict[str, torch.Tensor]]]:
    folder = tmp_path_factory.mktemp("ddp")
    run_ranks(work, free_port(), str(folder))
    results: dict[str, dict[str, dict[str, torch.Tensor]]] = torch.load(folder / "results.pt", weights_only=True)
    return results


@pytest.mark.parametrize("variant", VARIANTS)
def test_two_ranks_equal_one_process_with_the_double_batch(
    variant: str, two_ranks: dict[str, dict[str, dict[str, torch.Tensor]]]
) -> None:
    model = model_of(variant)
    terms = model(*batch(size=8))
    terms["loss"].backward()
    assert two_ranks[variant]["terms"] == pytest.approx({n: t.item() for n, t in terms.items()}, rel=1e-6)
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        torch.testing.assert_close(two_ranks[variant]["gradients"][name], parameter.grad, rtol=1e-5, atol=1e-6)


def train_by_hand(arguments: list[str], config: Path, out: Path) -> str:
    done = subprocess.run(
        [sys.executable, *arguments, "train_worker.py", str(config), "--output-dir", str(out)],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_torchrun_with_two_workers_gives_the_losses_of_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "run.yaml"
    config.write_text(json.dumps(SMALL))
    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(free_port())]
    assert main(["train", str(config), "--output-dir", str(tmp_path / "one")]) == 0
    one, two = capsys.readouterr().out, train_by_hand(torchrun, config, tmp_path / "two")
    a, b = ([line.split("pairs/s")[0].rsplit(maxsplit=1)[0] for line in out.splitlines()[:4]] for out in (one, two))
    assert len(a) == 4
    assert a[0].startswith("epoch 1/4  loss ")
    assert a == b


ARGUMENTS = {
    "module",
    "device_ids",
    "output_device",
    "dim",
    "broadcast_buffers",
    "process_group",
    "bucket_cap_mb",
    "find_unused_parameters",
    "check_reduction",
    "gradient_as_bucket_view",
    "static_graph",
}
"""Arguments of ``DistributedDataParallel`` in all versions since torch 2.0."""


def test_the_network_is_wrapped_with_arguments_of_every_torch_version() -> None:
    used = set()
    for path in (ROOT / "csmae").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "DistributedDataParallel":
                used |= {str(keyword.arg) for keyword in node.keywords}
    assert "gradient_as_bucket_view" in used
    assert used <= ARGUMENTS


RAISING = """
import os, sys, time
import torch
import torch.distributed as dist
from csmae.cli import train
from csmae.cli.main import main
from csmae.config import ConfigError

def run_epochs(config, output_dir):
    dist.all_reduce(torch.ones(1))
    if os.environ["RANK"] == "0":
        time.sleep(60)  # never joins the second collective
    dist.all_reduce(torch.ones(1), async_op=True)  # as a backward pass leaves its first gradients
    raise {error}

train.run_epochs = run_epochs
sys.exit(main(["train", os.environ["RUN_YAML"]]))
"""


@pytest.mark.parametrize(
    ("error", "status", "text"),
    [
        ("ConfigError('a damaged archive, say')", 2, "a damaged archive, say\n"),
        ("RuntimeError('a bug, say')", 1, "RuntimeError: a bug, say\n"),
    ],
)
def test_a_rank_that_raises_exits_immediately_while_others_wait(
    error: str, status: int, text: str, tmp_path: Path
) -> None:
    (tmp_path / "run.yaml").write_text(json.dumps(SMALL))
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2"}
    shared |= {"RUN_YAML": str(tmp_path / "run.yaml"), "PYTHONPATH": str(ROOT)}
    code = RAISING.format(error=error)
    first = PythonProcess(code, environment=shared | {"RANK": "0", "LOCAL_RANK": "0"})
    second = subprocess.Popen(  # a new interpreter, because its exit is tested
        [sys.executable, "-c", code],
        env=os.environ | shared | {"RANK": "1", "LOCAL_RANK": "1"},
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert second.wait(40) == status
        assert first.wait(0) is None, "the other rank still waits"
        assert second.stderr is not None
        assert second.stderr.read().endswith(text)
    finally:
        second.kill()
        second.wait()
        first.kill()
