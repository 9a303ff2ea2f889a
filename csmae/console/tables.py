"""What is printed when a search is over, and the list of studies."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path

import optuna
from rich.table import Table
from rich.text import Text

from csmae.console.format import format_number, format_settings
from csmae.sensors import DIRECTIONS
from csmae.trials.attributes import NOT_TRAINED
from csmae.trials.database import open_storage, usable
from csmae.trials.importance import importances
from csmae.trials.leaderboard import leaderboard
from csmae.trials.store import TrialStore
from csmae.trials.transfer import study_names
from csmae.trials.trial import last_values, state_of, was_started

NUM_BEST = 5

PARTNERS = ("recall_at_1", "mrr")

F1_SCORES = ("f1_mean", *(f"f1/{direction}" for direction in DIRECTIONS))


def format_scores(rows: Mapping[str, Mapping[str, float]]) -> Table:
    """Encoders against the four directions of retrieval; against their partner scores where there are no labels.

    Args:
        rows: By the encoder's name, scores such as ``test/f1_mean`` and ``test/f1/s1_to_s2``.
    """
    labelled = all("test/f1_mean" in scores for scores in rows.values())
    title = (
        "F1 in %, validation queries the test archive"
        if labelled
        else "other sensor's image found in the test archive, in %"
    )
    columns, table = F1_SCORES if labelled else PARTNERS, _table(title)
    table.add_column("encoder", no_wrap=True)
    for name in columns:
        table.add_column(name.removeprefix("f1/").removeprefix("f1_"), justify="right", no_wrap=True)
    for name, scores in rows.items():
        table.add_row(Text(name), *(f"{100 * scores[f'test/{direction}']:.2f}" for direction in columns))
    return table


def format_best_trials(trial_store: TrialStore) -> Table:
    """The best trials with every objective; the mean over seeds where they were trained again."""
    search, board = trial_store.study.search, leaderboard(trial_store.optuna_study)
    front = board.front
    several = len(search.objectives) > 1
    table = _table(f"best trials; {len(front)} on the Pareto front (*)" if several else "best trials")
    table.expand = True  # so that the settings give way, not the scores
    table.add_column("trial", justify="right", no_wrap=True)
    for objective in search.objectives:
        table.add_column(objective, justify="right", no_wrap=True)
    table.add_column("settings", no_wrap=True, overflow="ellipsis", ratio=1)
    for standing in board.entries[: max(NUM_BEST, len(front))]:
        first, *others = last_values(standing.trial)
        mark = "*" if several and standing.trial.number in front else ""
        if standing.num_seeds > 1:
            score = f"{standing.mean:.4f} ± {standing.spread:.4f} ({standing.num_seeds} seeds)"
        else:
            score = f"{format_number(first)} (1 seed)" if standing.is_finalist else format_number(first)
        values = Text(format_settings(trial_store.values(standing.trial)))
        table.add_row(f"{mark}{standing.trial.number}", score, *map(format_number, others), values)
    return table


def format_importances(trial_store: TrialStore) -> Iterator[str]:
    """What mattered, a line a parameter."""
    shares = importances(trial_store)
    if shares:
        yield "what mattered (share of the difference between good trials and all)"
    for name, share in shares.items():
        yield f"  {share:5.0%}  {name}"


def format_studies(path: Path) -> Table:
    """Every study of a database; trials that wait are those that a budget cut and that resume with their study.

    Raises:
        ConfigError: The database cannot be used.
    """
    table = _table(f"studies in {path}")
    for column in ("study", "done", "pruned", "failed", "running", "waiting", "best", "of"):
        table.add_column(column, justify="left" if column in ("study", "of") else "right", no_wrap=True)
    for name in study_names(path):
        with usable(path):
            study = optuna.load_study(study_name=name, storage=open_storage(path))
            trials = [t for t in study.get_trials(deepcopy=False) if was_started(t) and NOT_TRAINED not in t.user_attrs]
            board = leaderboard(study)
        states = Counter(map(state_of, trials))
        counts = [str(states[state]) for state in ("COMPLETE", "PRUNED", "FAIL", "RUNNING", "WAITING")]
        best = next((standing.mean for standing in board.entries), None)
        table.add_row(Text(name), *counts, format_number(best), Text(next(iter(board.objectives))))
    return table


def _table(title: str) -> Table:
    return Table(title=Text(title, "bold"), title_justify="left", box=None, pad_edge=False, header_style="dim")
