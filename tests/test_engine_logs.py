"""Messages of Optuna and Ray: known ones are suppressed, all others appear."""

import logging
import warnings
from pathlib import Path

import optuna
import pytest

from csmae.engine_logs import SUPPRESSED_MESSAGES, quiet_optuna, quiet_ray
from csmae.trials.store import TrialStore
from csmae.tuning.proposals import Proposals
from csmae.tuning.strategy.base import NewTrial
from tests.tuning.test_searcher import SPACE, make_study

TO_THE_END = NewTrial(99, "new configuration")


@pytest.mark.parametrize("sampler", ["tpe", "gp", "random", "qmc", "nsga2"])
def test_a_study_is_opened_and_sampled_without_a_warning(tmp_path: Path, sampler: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        quiet_optuna()
        proposals = Proposals(TrialStore(make_study(tmp_path, SPACE, sampler=sampler), tmp_path))
        assert proposals.new(TO_THE_END) and proposals.new(TO_THE_END)


def test_other_warnings_appear_while_a_study_is_open(tmp_path: Path) -> None:
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("default")
        study = make_study(tmp_path)
        next(study.space.samples(0))
        TrialStore(study, tmp_path)
        warnings.warn("a sampler is experimental", optuna.exceptions.ExperimentalWarning, stacklevel=1)
        warnings.warn("computes the importances of params to achieve low values", UserWarning, stacklevel=1)
    assert len(shown) == 2
    assert optuna.logging.get_verbosity() == optuna.logging.WARNING


def test_known_messages_of_ray_are_suppressed_and_others_appear(caplog: pytest.LogCaptureFixture) -> None:
    quiet_ray()
    for name in SUPPRESSED_MESSAGES:
        logger = logging.getLogger(name)
        logger.addHandler(caplog.handler)
        try:
            for message in SUPPRESSED_MESSAGES.values():
                logger.warning("%s, and what follows", message)
        finally:
            logger.removeHandler(caplog.handler)
    shown = [record.getMessage() for record in caplog.records if record.name in SUPPRESSED_MESSAGES]
    num_known = len(SUPPRESSED_MESSAGES)
    assert len(set(shown)) == num_known and len(shown) >= num_known * (num_known - 1)
