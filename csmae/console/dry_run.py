"""What a study would do, before it does anything."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import islice

from csmae.cluster.session import ClusterResources, allocate
from csmae.config import ConfigError
from csmae.console.format import format_settings
from csmae.model.cost import cost
from csmae.study.study import Study
from csmae.tuning.settings_warnings import settings_warnings

NUM_SAMPLES = 5


def format_dry_run(study: Study, resources: ClusterResources | None) -> str:
    """The space, its size, a few configurations with their cost, and the resources that a trial takes.

    Args:
        study: Checked.
        resources: Of this machine; None where a cluster would be joined.
    """
    return "\n".join(_lines(study, resources))


def _lines(study: Study, resources: ClusterResources | None) -> Iterator[str]:
    search = study.search
    goals = " and ".join(f"{direction} {name}" for name, direction in search.objectives.items())
    yield f"study {study.name}: {goals} in {search.num_trials} trials"
    for name, wanted in search.constraints.items():
        yield f"  where {name} {wanted}"
    yield f"sampler {search.sampler}, scheduler {search.scheduler}, {study.resolve({}).train.epochs} epochs a trial"
    for name, domain in study.space.domains.items():
        yield f"  {name}: {domain}"
    size = study.space.size
    yield f"size of the space: {'infinite' if math.isinf(size) else f'{size:,.0f} points'}"
    yield from (f"note: {note}" for note in settings_warnings(study))
    yield "base, then samples:"
    yield from _samples(study)
    yield _resources(study, resources)


def _samples(study: Study) -> Iterator[str]:
    points = [study.space.point({}), *islice(study.space.samples(study.search.seed), NUM_SAMPLES)]
    for point in points:
        try:
            spent = cost(study.resolve(point))
            price = f"{spent.params / 1e6:.1f} M parameters, {spent.flops / 1e9:.1f} GFLOP a pair"
        except ConfigError as error:
            price = str(error).splitlines()[0].rpartition(": ")[2]
        yield f"  {format_settings(point)}"
        yield f"    {price}"


def _resources(study: Study, resources: ClusterResources | None) -> str:
    workers = study.search.workers_per_trial
    if resources is None:
        return f"a trial takes {workers} workers of the cluster"
    allocation = allocate(study.search, resources)
    each = f"{allocation.cpus_per_worker:g} CPU" + (
        f" and {allocation.gpus_per_worker:g} GPU" if allocation.gpus_per_worker else ""
    )
    return f"a trial takes {workers} x {each}; {resources.where} runs {allocation.max_concurrent} at a time"
