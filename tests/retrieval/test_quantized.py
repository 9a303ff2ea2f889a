"""Bounds hold, also where everything that rounding takes points the same way."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from csmae.retrieval import quantized as rough
from tests.support.processes import run_code

BYTES = pytest.mark.skipif(
    not rough._is_exact(), reason="here oneDNN's products of bytes overflow, and so they are not used"
)
KINDS = [pytest.param(torch.int8, marks=BYTES), torch.bfloat16]


def leeway(queries_qd: Tensor, archive_nd: Tensor, kind: torch.dtype) -> Tensor:
    """How far bounds lie above what they are of (Q, N), as similarities."""
    mean_d, everything = queries_qd.mean(0), slice(None)
    with ThreadPoolExecutor(1) as threads:
        queries, archive = (rough.quantize(features, mean_d, kind, threads) for features in (queries_qd, archive_nd))
    bounds = rough.Bounds(queries, mean_d, archive)
    bound_qn = torch.empty(len(queries_qd), len(archive_nd))
    bounds.fill(everything, everything, bound_qn)
    exact_nq = archive_nd.double() @ queries_qd.double().T
    least_nq = torch.stack([bounds.least(everything, column.float()) for column in exact_nq])
    return (bound_qn.T - least_nq) * queries.scale * archive.scale


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("spread", [100.0, 1.0, 0.1, 1e-3, 0.0])
def test_no_similarity_is_above_its_bound(spread: float, kind: torch.dtype) -> None:
    g = torch.Generator().manual_seed(0)
    axis = torch.randn(100, generator=g)
    queries, archive = (normalize(axis + spread * torch.randn(n, 100, generator=g), dim=1) for n in (300, 2000))
    queries[3] = archive[5] = 0
    above = leeway(queries, archive, kind)
    assert above.min() > 0
    if spread >= 1:  # and yet it tells scenes apart
        assert above.median() < 0.5 * (queries @ archive.T).std()


@BYTES
def test_bytes_that_are_all_too_small_are_allowed_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rough, "_rotation", lambda: torch.eye(rough.SPIN))
    monkeypatch.setattr(rough, "CUT", rough.LEVELS / 31.25)  # so a byte of 31 stands for 31.25
    signs = torch.randn(1, 256, generator=torch.Generator().manual_seed(0)).sign() / 16
    odd = 31.45 / 31.25
    queries = torch.cat([signs, -signs] * 150 + [odd * signs, -odd * signs])
    archive = torch.cat([signs, -signs] * 500 + [odd * signs, -odd * signs])
    above = leeway(queries, archive, torch.int8)
    assert above.min() > 0
    assert above.diagonal().max() < 1e-3, "no more than is needed: what rounding takes is 0.016"


def test_products_that_are_rounded_down_are_allowed_for() -> None:
    ones = torch.ones(1, 257)
    both = torch.cat([ones, -ones] * 200)
    assert (ones.bfloat16() @ ones.bfloat16().T).item() == 256
    above = leeway(both, both, torch.bfloat16)
    assert above.min() > 0
    assert above.diagonal().max() < 0.01


def test_bytes_are_not_used_where_their_products_are_wrong() -> None:
    """As older instructions compute them, on processors that are asked to do so, or that have no others."""
    command = (
        "import torch, csmae.retrieval.quantized as rough\n"
        "a = torch.randint(-127, 128, (300, 768)).to(torch.int8)\n"
        "right = torch._int_mm(a, a.T).double().equal(a.double() @ a.double().T)\n"
        "print(right or torch.int8 not in rough.kinds())"
    )
    for instructions in ("AVX2", "AVX512_CORE", "ALL"):
        told = run_code(command, environment={"ONEDNN_MAX_CPU_ISA": instructions})
        assert told.stdout == "True\n", f"{instructions}: {told.stderr}"
