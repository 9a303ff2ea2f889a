"""Scoring at the end of a search on a real Ray whose resources are free, shared or gone."""

from collections.abc import Iterator
from posixpath import join

import pytest

from csmae.cluster import reserved
from csmae.cluster.reserved import NoResourcesError, run_reserved
from csmae.cluster.resources import Allocation, ClusterResources
from csmae.cluster.session import ray_running
from csmae.tuning.champion import EncoderToScore, score_encoders
from tests.conftest import small_config


@pytest.fixture(scope="module")
def cluster() -> Iterator[ClusterResources]:
    with ray_running(None, ClusterResources(((1, 0),), "this machine"), verbose=False) as resources:
        yield resources


@pytest.fixture
def short_timeout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reserved, "RESOURCE_TIMEOUT_S", 2.0)


@pytest.mark.slow
def test_results_of_calls_that_share_one_cpu_are_in_order(cluster: ClusterResources, short_timeout: None) -> None:
    assert run_reserved(join, [("a", "1"), ("b", "2"), ("c", "3")], {"CPU": 1.0}) == ["a/1", "b/2", "c/3"]


@pytest.mark.slow
def test_waiting_for_resources_that_no_node_has_times_out(cluster: ClusterResources, short_timeout: None) -> None:
    with pytest.raises(NoResourcesError, match="no node had 2 CPU free for 2 s"):
        run_reserved(join, [("a", "1")], {"CPU": 2.0})
    assert run_reserved(join, [("a", "1")], {"CPU": 1.0}) == ["a/1"], "nothing is left of the reservation"


@pytest.mark.slow
def test_encoders_are_scored_on_cpus_when_the_gpus_are_gone(cluster: ClusterResources, short_timeout: None) -> None:
    lines: list[str] = []
    found = [EncoderToScore("untrained encoder", small_config(), None, None)]
    (scores,) = score_encoders(found, Allocation(1, 1, 1.0, 1.0), None, lines.append)
    assert 0 < scores["test/f1_mean"] < 1
    assert lines == ["no node had 1 CPU and 1 GPU free for 2 s: the encoders are scored on CPUs"]
