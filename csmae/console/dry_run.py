"""What ``csmae search --dry-run`` shows: the search space, sample configurations with their cost, and resources."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import islice

from csmae.cluster.resources import ClusterResources, allocate
from csmae.config import ConfigError
from csmae.console.format import format_settings
from csmae.model.cost import cost
from csmae.study.study import Study
from csmae.tuning.settings_warnings import settings_warnings
from csmae.tuning.stop_when import describe_stop_when
from csmae.tuning.strategy.make import make_strategy

NUM_SAMPLES = 5


def format_dry_run(study: Study, resources: ClusterResources | None) -> str:
    """Describe the space, a few configurations with their cost, and the resources that a trial needs.

    Args:
        study: A checked study.
        resources: Of this machine; None if the search would join a cluster.
    """
    return "\n".join(_lines(study, resources))


def _lines(study: Study, resources: ClusterResources | None) -> Iterator[str]:
    search = study.search
    goals = " and ".join(f"{direction} {name}" for name, direction in search.objectives.items())
    yield f"study {study.name}: {goals} in {search.num_trials} trials"
    for name, bound in search.constraints.items():
        yield f"  where {name} {bound}"
    yield from (f"  {line}" for line in describe_stop_when(search))
    yield from (f"  {line}" for line in make_strategy(study).describe())
    yield f"sampler {search.sampler}, strategy {search.strategy}, {study.resolve({}).train.epochs} epochs per trial"
    for name, domain in study.space.domains.items():
        yield f"  {name}: {domain}{f', {domain.prior}' if domain.prior else ''}"
    size = study.space.size
    yield f"size of the space: {'infinite' if math.isinf(size) else f'{size:,.0f} points'}"
    yield from (f"note: {warning}" for warning in settings_warnings(study))
    yield "base, then samples:"
    yield from _samples(study)
    yield _resources(study, resources)


def _samples(study: Study) -> Iterator[str]:
    for point in [study.space.point({}), *islice(study.space.samples(study.search.seed), NUM_SAMPLES)]:
        yield f"  {format_settings(point)}"
        try:
            model_cost = cost(study.resolve(point))
            yield f"    {model_cost.params / 1e6:.1f} M parameters, {model_cost.flops / 1e9:.1f} GFLOP per pair"
        except ConfigError as error:
            yield f"    {str(error).splitlines()[0].rpartition(': ')[2]}"


def _resources(study: Study, resources: ClusterResources | None) -> str:
    if resources is None:
        return f"a trial needs {study.search.workers_per_trial} workers of the cluster"
    allocation = allocate(study.search, resources)
    return f"a trial needs {allocation}; {resources.where} runs {allocation.max_concurrent} trials at once"
