"""Scoring at the end of a search on a real Ray whose resources are there, shared, or gone."""

from collections.abc import Iterator
from posixpath import join

import pytest

from csmae.cluster import reserved
from csmae.cluster.reserved import NoResourcesError, run_reserved
from csmae.cluster.session import Allocation, ClusterResources, ray_running
from csmae.tuning.champion import EncoderToScore, score_encoders
from tests.conftest import small_config


@pytest.fixture(scope="module")
def cluster() -> Iterator[ClusterResources]:
    with ray_running(None, ClusterResources(1, 0, "this machine"), verbose=False) as room:
        yield room


@pytest.fixture
def hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reserved, "WAIT_S", 2.0)


@pytest.mark.slow
def test_calls_that_share_one_cpu_come_back_in_order(cluster: ClusterResources, hurry: None) -> None:
    assert run_reserved(join, [("a", "1"), ("b", "2"), ("c", "3")], {"CPU": 1.0}) == ["a/1", "b/2", "c/3"]


@pytest.mark.slow
def test_resources_that_no_node_has_are_waited_for_only_so_long(cluster: ClusterResources, hurry: None) -> None:
    with pytest.raises(NoResourcesError, match="no node had 2 CPU free for 2 s"):
        run_reserved(join, [("a", "1")], {"CPU": 2.0})
    assert run_reserved(join, [("a", "1")], {"CPU": 1.0}) == ["a/1"], "nothing of it is left"


@pytest.mark.slow
def test_encoders_are_scored_on_cpus_where_the_gpus_are_gone(cluster: ClusterResources, hurry: None) -> None:
    told: list[str] = []
    found = [EncoderToScore("untrained encoder", small_config(), None, None)]
    (scores,) = score_encoders(found, Allocation(1, 1.0, 1.0), None, told.append)
    assert 0 < scores["test/f1_mean"] < 1
    assert told == ["no node had 1 CPU and 1 GPU free for 2 s: the encoders are scored on CPUs"]
