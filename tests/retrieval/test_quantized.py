"""Quantized bounds are never too small, even if all rounding errors add up."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from csmae.retrieval import quantized
from tests.support.processes import run_code

INT8 = pytest.mark.skipif(
    not quantized._int8_products_are_exact(), reason="oneDNN's int8 products overflow on this CPU, so they are not used"
)
DTYPES = [pytest.param(torch.int8, marks=INT8), torch.bfloat16]


def slack(queries_qd: Tensor, archive_nd: Tensor, dtype: torch.dtype) -> Tensor:
    """Bounds minus exact similarities (N, Q)."""
    mean_d, every = queries_qd.mean(0), slice(None)
    with ThreadPoolExecutor(1) as pool:
        queries, archive = (quantized.quantize(features, mean_d, dtype, pool) for features in (queries_qd, archive_nd))
    bounds = quantized.Bounds(queries, mean_d, archive)
    bound_qn = torch.empty(len(queries_qd), len(archive_nd))
    bounds.write(every, every, bound_qn)
    exact_nq = archive_nd.double() @ queries_qd.double().T
    threshold_nq = torch.stack([bounds.threshold(every, row.float()) for row in exact_nq])
    return (bound_qn.T - threshold_nq) * queries.scale * archive.scale


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("spread", [100.0, 1.0, 0.1, 1e-3, 0.0])
def test_no_similarity_exceeds_its_bound(spread: float, dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(0)
    axis = torch.randn(100, generator=g)
    queries, archive = (normalize(axis + spread * torch.randn(n, 100, generator=g), dim=1) for n in (300, 2000))
    queries[3] = archive[5] = 0
    excess = slack(queries, archive, dtype)
    assert excess.min() > 0
    if spread >= 1:  # the bounds still separate scenes
        assert excess.median() < 0.5 * (queries @ archive.T).std()


@INT8
def test_bounds_hold_if_all_int8_values_are_rounded_down(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantized, "_rotation", lambda: torch.eye(quantized.ROTATION))
    monkeypatch.setattr(quantized, "CLIP_RMS", quantized.LEVELS / 31.25)  # the value 31 represents 31.25
    signs = torch.randn(1, 256, generator=torch.Generator().manual_seed(0)).sign() / 16
    outlier = 31.45 / 31.25
    queries = torch.cat([signs, -signs] * 150 + [outlier * signs, -outlier * signs])
    archive = torch.cat([signs, -signs] * 500 + [outlier * signs, -outlier * signs])
    excess = slack(queries, archive, torch.int8)
    assert excess.min() > 0
    assert excess.diagonal().max() < 1e-3, "the bounds are tight: rounding changes products by 0.016"


def test_bounds_hold_if_bfloat16_products_are_rounded_down() -> None:
    ones = torch.ones(1, 257)
    both = torch.cat([ones, -ones] * 200)
    assert (ones.bfloat16() @ ones.bfloat16().T).item() == 256
    excess = slack(both, both, torch.bfloat16)
    assert excess.min() > 0
    assert excess.diagonal().max() < 0.01


def test_int8_is_not_used_if_its_products_are_wrong() -> None:
    """Older instructions overflow; oneDNN uses them if the CPU has no others, or if its environment variable limits it."""
    command = (
        "import torch\nfrom csmae.retrieval.quantized import fast_dtypes\n"
        "a = torch.randint(-127, 128, (300, 768)).to(torch.int8)\n"
        "exact = torch._int_mm(a, a.T).double().equal(a.double() @ a.double().T)\n"
        "print(exact or torch.int8 not in fast_dtypes())"
    )
    for instructions in ("AVX2", "AVX512_CORE", "ALL"):
        result = run_code(command, environment={"ONEDNN_MAX_CPU_ISA": instructions})
        assert result.stdout == "True\n", f"{instructions}: {result.stderr}"
