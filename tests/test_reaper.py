"""Reservations of processes that died."""

import time

import ray
from ray.util import placement_group, placement_group_table

from csmae.tuning.cluster import Room, ray_running


def num_reserved() -> int:
    return sum(group["state"] != "REMOVED" for group in placement_group_table().values())


def test_what_an_actor_reserves_while_it_is_killed_is_freed() -> None:
    class Greedy:  # in here, where the workers need not import it
        def reserve(self) -> None:
            while True:
                placement_group([{"CPU": 0.001}])
                time.sleep(0.002)

    with ray_running(None, Room(2, 0, "this machine"), verbose=False):
        actors = [ray.remote(num_cpus=0)(Greedy).remote() for _ in range(4)]
        for actor in actors:
            actor.reserve.remote()
        while num_reserved() < 20:
            time.sleep(0.1)
        for actor in actors:
            ray.kill(actor)
        deadline = time.monotonic() + 60
        while num_reserved():
            assert time.monotonic() < deadline, f"{num_reserved()} reservations left"
            time.sleep(0.5)
