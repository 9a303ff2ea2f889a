"""Search and scores compared with naive loops."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from csmae.retrieval import nearest, quantized, scores
from csmae.retrieval.scores import direction_scores, label_scores, partner_scores, rank_directions
from csmae.sensors import DIRECTIONS
from tests.retrieval.test_quantized import INT8


def features(seed: int, count: int) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    s1 = torch.randn(count, 8, generator=g)
    return {"s1": normalize(s1, dim=1), "s2": normalize(s1 + torch.randn(count, 8, generator=g), dim=1)}


def labels(seed: int, count: int) -> Tensor:
    return torch.rand(count, 19, generator=torch.Generator().manual_seed(seed)) < 0.12


def naive_scores(query: Tensor, archive: Tensor, ranked: Tensor) -> dict[str, float]:
    precisions, recalls, f1s = [], [], []
    for q, row in zip(query.tolist(), ranked.tolist(), strict=True):
        for index in row:
            r = archive[index].tolist()
            shared = sum(a and b for a, b in zip(q, r, strict=True))
            p, c = shared / sum(r) if any(r) else 0.0, shared / sum(q) if any(q) else 0.0
            precisions.append(p)
            recalls.append(c)
            f1s.append(2 * p * c / (p + c) if p + c else 0.0)
    p, c = sum(precisions) / len(precisions), sum(recalls) / len(recalls)
    return {"precision": p, "recall": c, "f1_of_means": 2 * p * c / (p + c), "mean_pair_f1": sum(f1s) / len(f1s)}


def test_ranking_equals_sorting_every_similarity(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nearest, "QUERY_BLOCK", 7)
    queries, archive = features(0, 30)["s1"], features(1, 50)["s2"]
    naive = [sorted(range(50), key=lambda i, q=q: -float(q @ archive[i]))[:10] for q in queries]  # type: ignore[misc]
    assert nearest.search(queries, [archive], 10).indices_qk.tolist() == naive


@pytest.mark.parametrize("count", [50, 200, 1024, 1100])
def test_block_wise_search_equals_sorting_every_similarity(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nearest, "QUERY_BLOCK", 7)
    monkeypatch.setattr(nearest, "ARCHIVE_BLOCK", 300)
    monkeypatch.setattr(quantized, "GROUP", 8)
    queries, archive = features(0, 30)["s1"], features(1, count)["s2"]
    naive = (queries @ archive.T).sort(dim=1, descending=True)
    hits = nearest.search(queries, archive.split(300), 10)
    assert hits.indices_qk.tolist() == naive.indices[:, :10].tolist()
    torch.testing.assert_close(hits.scores_qk, naive.values[:, :10])


@pytest.mark.parametrize(
    "dtypes",
    [
        pytest.param((torch.int8,), marks=INT8),
        (torch.bfloat16,),
        pytest.param((torch.int8, torch.bfloat16), marks=INT8),
    ],
    ids=str,
)
@pytest.mark.parametrize(
    ("spread", "few_candidates"),
    [(100.0, True), (1.0, True), (0.2, True), (1e-3, False), (0.0, False)],
    ids=["uniform", "cone", "narrow cone", "similar", "equal"],
)
def test_bounds_lose_no_neighbour(
    spread: float, few_candidates: bool, dtypes: tuple[torch.dtype, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantized, "fast_dtypes", lambda: dtypes)
    monkeypatch.setattr(nearest, "QUERY_BLOCK", 50)
    monkeypatch.setattr(quantized, "TILE", 1024)
    monkeypatch.setattr(quantized, "GROUP", 32)
    used: list[bool] = []
    topk_candidates = quantized.Bounds.topk_candidates

    def recorded(bounds: quantized.Bounds, *args: Any) -> Any:
        hits = topk_candidates(bounds, *args)
        used.append(hits is not None)
        return hits

    monkeypatch.setattr(quantized.Bounds, "topk_candidates", recorded)
    g = torch.Generator().manual_seed(0)
    axis, centers = torch.randn(250, generator=g), torch.randn(5, 250, generator=g)
    spreads = torch.full((250,), spread).index_fill(0, torch.tensor([7]), 5 * spread)
    queries, archive = (
        normalize(axis + spreads * (centers[torch.arange(n) % 5] + torch.randn(n, 250, generator=g)), dim=1)
        for n in (150, 5003)
    )
    archive[17] = 0  # damaged
    queries[5] = 0
    hits = nearest.search(queries, archive.split(2500), 10)
    exact = queries.double() @ archive.double().T
    torch.testing.assert_close(hits.scores_qk.double(), exact.topk(10).values, atol=1e-6, rtol=0)
    torch.testing.assert_close(exact.gather(1, hits.indices_qk), exact.topk(10).values, atol=1e-6, rtol=0)
    assert all(len(set(row)) == 10 for row in hits.indices_qk.tolist())
    assert used and all(used) == few_candidates


def test_a_nan_feature_is_not_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantized, "fast_dtypes", lambda: (torch.int8,))
    queries, archive = features(0, 200)["s1"], features(1, 3000)["s2"]
    archive[40] = torch.nan
    assert (nearest.search(queries, archive.split(3000), 5).indices_qk == 40).any(1).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_search_works_in_inference_mode_and_with_empty_blocks(dtype: torch.dtype) -> None:
    queries, archive = features(0, 200)["s1"].to(dtype), features(1, 4000)["s2"].to(dtype)
    expected = (queries @ archive.T).topk(5).indices
    with torch.inference_mode():
        hits = nearest.search(queries.clone(), [archive[:3000], archive[:0], archive[3000:]], 5)
    assert torch.equal(hits.indices_qk, expected)


def test_blocks_smaller_than_k_are_searched_completely() -> None:
    queries, archive = features(0, 3)["s1"], features(1, 5)["s2"]
    assert sorted(nearest.search(queries, archive.split(2), 5).indices_qk[0].tolist()) == [0, 1, 2, 3, 4]


def test_label_scores_equal_a_loop_over_the_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scores, "BLOCK", 7)
    query, archive = labels(0, 30), labels(1, 50)
    assert not query.any(1).all(), "some scenes have no label"
    ranked = torch.randint(50, (30, 5), generator=torch.Generator().manual_seed(2))
    expected = naive_scores(query, archive, ranked)
    actual = label_scores(query, archive, ranked)
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert math.isclose(actual[name], value, rel_tol=1e-6), name


def test_perfect_features_score_1() -> None:
    same = normalize(torch.eye(20), dim=1)
    scores = partner_scores({"s1": same, "s2": same})
    assert scores == {"recall_at_1": 1.0, "mrr": 1.0}


def test_partner_scores_equal_a_loop_over_the_scenes() -> None:
    both = features(3, 40)
    ranks = []
    for a, b in (("s1", "s2"), ("s2", "s1")):
        for i in range(40):
            similarities = [float(both[a][i] @ both[b][j]) for j in range(40)]
            ranks.append(1 + sum(s > similarities[i] for j, s in enumerate(similarities) if j != i))
    scores = partner_scores(both)
    assert math.isclose(scores["recall_at_1"], sum(r == 1 for r in ranks) / 80)
    assert math.isclose(scores["mrr"], sum(1 / r for r in ranks) / 80)


def test_a_collapsed_encoder_finds_no_partner() -> None:
    same = torch.ones(20, 4) / 2
    assert partner_scores({"s1": same, "s2": same})["recall_at_1"] == 0.0


def test_f1_mean_is_the_mean_over_the_four_directions() -> None:
    queries, archive = features(4, 20), features(5, 30)
    scores = direction_scores(rank_directions(queries, archive, 3), labels(4, 20), labels(5, 30))
    expected = sum(scores[f"f1/{direction}"] for direction in DIRECTIONS) / 4
    assert math.isclose(scores["f1_mean"], expected)
