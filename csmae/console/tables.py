"""Tables and lines that are printed after a search, and the list of studies."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path

from rich.table import Table
from rich.text import Text

from csmae.console.format import format_number, format_settings
from csmae.sensors import DIRECTIONS
from csmae.trial_status import STATUS_NAMES, TrialStatus
from csmae.trials.database import OtherVersionError, check_format, load_studies, report_database_errors
from csmae.trials.importance import importances
from csmae.trials.leaderboard import Leaderboard, leaderboard
from csmae.trials.lineage import describe_copy
from csmae.trials.store import TrialStore
from csmae.trials.trial import last_values, params_of, status_of

NUM_BEST = 5

F1_SCORES = ("f1_mean", *(f"f1/{direction}" for direction in DIRECTIONS))

LABEL_FREE_SCORES = ("recall_at_1", "mrr")
"""How well the other sensor's image of the same scene is found."""


def format_scores(rows: Mapping[str, Mapping[str, float]]) -> Table:
    """Compare encoders in all retrieval directions, or by label-free scores if the archive has no labels.

    Args:
        rows: By name of the encoder, scores such as ``test/f1_mean`` and ``test/f1/s1_to_s2``.
    """
    if all("test/f1_mean" in scores for scores in rows.values()):
        columns, table = F1_SCORES, _table("F1 in %, validation queries against the test archive")
    else:
        columns, table = LABEL_FREE_SCORES, _table("other sensor's image found in the test archive, in %")
    table.add_column("encoder", no_wrap=True)
    for name in columns:
        table.add_column(name.removeprefix("f1/").removeprefix("f1_"), justify="right", no_wrap=True)
    for encoder, scores in rows.items():
        table.add_row(Text(encoder), *(f"{100 * scores[f'test/{name}']:.2f}" for name in columns))
    return table


def format_best_trials(trial_store: TrialStore) -> Table:
    """Show the best trials with all objectives; for confirmed trials, the mean over their seeds."""
    search, board = trial_store.study.search, leaderboard(trial_store.optuna_study)
    has_front = len(search.objectives) > 1
    table = _table(f"best trials; {len(board.front)} on the Pareto front (*)" if has_front else "best trials")
    table.expand = True  # the settings are shortened, not the scores
    table.add_column("trial", justify="right", no_wrap=True)
    for objective in search.objectives:
        table.add_column(objective, justify="right", no_wrap=True)
    table.add_column("settings", no_wrap=True, overflow="ellipsis", ratio=1)
    for entry in board.entries[: max(NUM_BEST, len(board.front))]:
        trial = entry.trial
        first, *others = last_values(trial)
        score = format_number(first)
        if entry.num_seeds > 1:
            score = f"{entry.mean:.4f} ± {entry.spread:.4f} ({entry.num_seeds} seeds)"
        elif entry.is_finalist:
            score = f"{score} (1 seed)"
        mark = "*" if has_front and trial.number in board.front else ""
        settings = Text(": ".join(filter(None, [describe_copy(trial), format_settings(params_of(trial))])))
        table.add_row(f"{mark}{trial.number}", score, *map(format_number, others), settings)
    return table


def format_importances(trial_store: TrialStore) -> Iterator[str]:
    """Yield a line for each parameter with its importance, after a heading; nothing if it cannot be computed."""
    shares = importances(trial_store.optuna_study)
    if shares:
        yield "parameter importance (share of the difference between good trials and all)"
    for name, share in shares.items():
        yield f"  {share:5.0%}  {name}"


def format_studies(path: Path) -> Table:
    """List all studies of a database with their number of trials in each state; rare states only if some study has them.

    Raises:
        ConfigError: The database cannot be used.
    """
    rows: list[tuple[str, Counter[TrialStatus], Leaderboard] | str] = []
    for name, study in load_studies(path).items():
        with report_database_errors(path):
            try:
                check_format(study, path)
            except OtherVersionError:
                rows.append(name)
                continue
            rows.append((name, Counter(map(status_of, study.get_trials(deepcopy=False))), leaderboard(study)))
    rare = (TrialStatus.PAUSED, TrialStatus.WAITING)
    found = {state for row in rows if not isinstance(row, str) for state in row[1]}
    states = [state for state in STATUS_NAMES if state in found or state not in rare]
    table = _table(f"studies in {path}")
    table.padding = (0, 1, 0, 0)  # a name of 20 characters fits into 80 columns
    names = {**STATUS_NAMES, TrialStatus.COMPLETE: "done"}
    for column in ("study", *(names[state] for state in states), "best", "of"):
        table.add_column(column, justify="left" if column in ("study", "of") else "right", no_wrap=True)
    for row in rows:
        if isinstance(row, str):
            table.add_row(Text(row), *(len(states) + 1) * ("",), "(other version)")
            continue
        name, counts, board = row
        best = board.entries[0].mean if board.entries else None
        table.add_row(Text(name), *(str(counts[state]) for state in states), format_number(best), Text(board.objective))
    return table


def _table(title: str) -> Table:
    return Table(title=Text(title, "bold"), title_justify="left", box=None, pad_edge=False, header_style="dim")
