"""The report of a study: one self-contained HTML page and a Markdown summary, from the trial store."""

from __future__ import annotations

import base64
import html
import json
import math
import shlex
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import optuna
from matplotlib.figure import Figure
from optuna.trial import FrozenTrial

from csmae.reporting import parameter_plots, study_plots
from csmae.reporting.plots import format_direction, save_png
from csmae.reporting.trial_plots import save_trial_plots
from csmae.sensors import DIRECTIONS
from csmae.settings import flatten
from csmae.storage.layout import trial_dir
from csmae.tracking.registry import MODEL, study_alias
from csmae.tracking.tracker import Tracker
from csmae.trial_status import STATUS_NAMES, TrialStatus
from csmae.trials.attributes import CHAMPION, DEFINITION, GPU_S, INTERRUPTED, PROVENANCE, REASON, SCORES, WORKER_S
from csmae.trials.importance import importances
from csmae.trials.leaderboard import Leaderboard, leaderboard
from csmae.trials.lineage import describe_copy
from csmae.trials.trial import last_value, num_epochs, params_of, status_of, trained_params, used_seconds
from csmae.tuning.race import describe_lead

NUM_BEST = 3
"""Trials of which plots are made."""

PROTOCOL_SCORES = ("f1", "precision", "recall", "mean_pair_f1")

CITATION = (
    "J. Hackstein, G. Sumbul, K. N. Clasen, B. Demir: Exploring Masked Autoencoders for Sensor-Agnostic Image "
    "Retrieval in Remote Sensing. IEEE Transactions on Geoscience and Remote Sensing, 2024. arXiv 2401.07782."
)

CSS = """
body { font: 16px/1.5 system-ui, sans-serif; color: #222; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }
h1 { margin-bottom: 0; } h2 { margin-top: 2.5rem; border-bottom: 1px solid #ddd; }
table { border-collapse: collapse; font-size: 0.9rem; display: block; overflow-x: auto; }
th, td { padding: 0.25rem 0.8rem 0.25rem 0; text-align: left; border-bottom: 1px solid #eee; white-space: nowrap; }
td.wrap { white-space: normal; } img { max-width: 100%; margin: 0.6rem 0; }
tr.best td { font-weight: 600; background: #eef7f2; } pre { background: #f5f5f5; padding: 0.8rem; overflow-x: auto; }
"""

Row = list[str]
Table = tuple[str, Row, list[Row]]
"""Heading, header and rows."""


def publish(tracker: Tracker, report: Report) -> None:
    """Write a study's report and attach it to its runs in MLflow, with the plots of its best trials."""
    for path in write_report(report):
        tracker.artifact(None, path, "plots" if path.suffix == ".png" else "report")
    for entry in report.board.entries[:NUM_BEST]:
        number = entry.trial.number
        plots = trial_dir(report.folder, number) / "plots"
        if plots.exists():
            tracker.artifact(number, plots, "plots")


def write_report(report: Report) -> list[Path]:
    """Write a study's report and plots, and plots of its best trials, into the study's folder, which is created if needed.

    Returns:
        The HTML page, the Markdown summary and the study's plots.

    Raises:
        OSError: The folder cannot be written.
    """
    report.folder.mkdir(parents=True, exist_ok=True)
    folder, figures = report.folder, study_figures(report.board, report.importances)
    plots = [save_png(figure, folder / "plots" / f"{name}.png") for name, figure in figures]
    numbers = [entry.trial.number for entry in report.board.entries[:NUM_BEST]]
    trial_plots = [save_trial_plots(number, trial_dir(folder, number)) for number in numbers]
    best_plots = [path for plots_dir in trial_plots[:1] for path in sorted(plots_dir.glob("*.png"))]
    page, summary = folder / "report.html", folder / "report.md"
    page.write_text(report.html([*plots, *best_plots]), encoding="utf-8")
    summary.write_text(report.markdown(), encoding="utf-8")
    return [page, summary, *plots]


def study_figures(board: Leaderboard, shares: Mapping[str, float]) -> Iterator[tuple[str, Figure]]:
    """Make the figures for which a study has enough trials.

    Args:
        board: The study's trials.
        shares: Importance of each parameter; may be empty.

    Yields:
        A file name without suffix, and the figure.
    """
    if not any(math.isfinite(last_value(trial)) for trial in board.trials):
        return
    yield "history", study_plots.history_figure(board)
    yield "budget", study_plots.budget_figure(board)
    if len(board.objectives) > 1:
        yield "pareto", study_plots.pareto_figure(board)
    else:
        yield "time", study_plots.time_figure(board)
    if shares:
        yield "importance", study_plots.importance_figure(board.study_name, shares)
    if parameter_plots.explored(map(params_of, board.trials)):
        yield "parallel", parameter_plots.parallel_figure(board)
        yield "slices", parameter_plots.slices_figure(board)


class Report:
    """The texts and tables of a study's report. Reads the trial store once.

    Args:
        study: Optuna's study.
        folder: The study's folder.
    """

    def __init__(self, study: optuna.Study, folder: Path) -> None:
        self.board, self.importances, self.folder = leaderboard(study), importances(study), folder
        self._entries = {entry.trial.number: entry for entry in self.board.entries}
        self._attributes = study.user_attrs
        self._provenance: Mapping[str, str] = self._attributes.get(PROVENANCE, {})

    def markdown(self) -> str:
        """The report without plots, as Markdown."""
        parts = [f"# Study {self.board.study_name}", self.overview()]
        for heading, header, rows in self._tables():
            lines = ["| " + " | ".join(row) + " |" for row in (header, ["---"] * len(header), *rows)]
            parts += [f"## {heading}", "\n".join(lines)]
        parts += ["## How to reproduce", f"```\n{self.reproduction()}\n```", "## Citation", CITATION]
        return "\n\n".join(parts) + "\n"

    def html(self, plots: list[Path]) -> str:
        """The report as an HTML page that contains the plots."""
        best = str(self.board.entries[0].trial.number) if self.board.entries else ""
        *tables, settings = (f"<h2>{table[0]}</h2>{_html_table(table, best)}" for table in self._tables())
        title = html.escape(f"Study {self.board.study_name}")
        body = [f"<h1>{title}</h1><p>{html.escape(self.overview())}</p>", *tables]
        body += ["<h2>Plots</h2>", *map(_html_image, plots), settings]
        body += ["<h2>How to reproduce</h2>", f"<pre>{html.escape(self.reproduction())}</pre>"]
        body += ["<h2>Citation</h2>", f"<p>{html.escape(CITATION)}</p>"]
        head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{title}</title>'
        return (
            f"<!doctype html><html lang=en><head>{head}<style>{CSS}</style></head><body>{''.join(body)}</body></html>\n"
        )

    def overview(self) -> str:
        """The study in two or three sentences."""
        board = self.board
        counts = Counter(map(status_of, board.trials))
        states = ", ".join(f"{counts[status]} {text}" for status, text in STATUS_NAMES.items() if counts[status])
        epochs = sum(map(num_epochs, board.trials))
        best = ""
        if board.entries:
            trial = board.entries[0].trial
            best = f" The best is trial {trial.number}: {board.objective} {self._format_objective(trial)}."
            best += f" It {lead}." if (lead := describe_lead(board)) else ""
        return f"{len(board.trials)} trials ({states}), {epochs} epochs{self._hours()} in total.{best}"

    def _hours(self) -> str:
        units = {"GPU": GPU_S, "worker": WORKER_S}
        totals = {u: sum(float(t.user_attrs.get(name, 0.0)) for t in self.board.trials) for u, name in units.items()}
        return "".join(f", {seconds / 3600:.2g} {unit}-hours" for unit, seconds in totals.items() if seconds)

    def reproduction(self) -> str:
        """Commands that run this study again, and that load its champion."""
        name = self.board.study_name
        command = self._provenance.get("csmae.command", f"csmae search spaces/{name}.yaml")
        commit, *changes = self._provenance.get("csmae.git_commit", "").split(" ", 1)
        lines = [f"git checkout {commit}{'  # ' if changes else ''}{''.join(changes)}"] if commit else []
        encoder = f"models:/{MODEL}@{study_alias(name)}"
        champion = self._attributes.get(CHAMPION)
        if champion and self._provenance.get("csmae.tracking", "MLflow") != "MLflow":
            encoder = str(trial_dir(self.folder, champion["trial"]).absolute() / "encoder")
        load = f"import csmae; csmae.load_encoder({json.dumps(encoder, ensure_ascii=False)})"
        return "\n".join([*lines, command, f"python -c {shlex.quote(load)}"])

    def _tables(self) -> Iterator[Table]:
        """The tables that have rows; the settings come last."""
        if scores := self._score_rows():
            yield (
                "Scores by the published protocol",
                ["encoder", "score", "mean", *map(format_direction, DIRECTIONS)],
                scores,
            )
        yield self._trials_table()
        if rows := [[str(trial.number), reason] for trial in self.board.trials if (reason := _reason(trial))]:
            yield "Reasons", ["trial", "reason"], rows
        if self.importances:
            rows = [[name, f"{share:.0%}"] for name, share in self.importances.items()]
            yield "Importance of the parameters", ["parameter", "share"], rows
        settings = dict(flatten(self._attributes.get(DEFINITION, {}))) | dict(self._provenance)
        yield "Settings", ["name", "value"], [[name, _format_value(value)] for name, value in settings.items()]

    def _score_rows(self) -> list[Row]:
        """One row per score and encoder: the mean over the directions, and each of them."""
        rows = []
        for score in PROTOCOL_SCORES:
            for encoder, scores in self._attributes.get(SCORES, {}).items():
                values = [scores.get(f"test/{score}/{direction}", math.nan) for direction in DIRECTIONS]
                values = [scores.get(f"test/{score}_mean", sum(values) / len(values)), *values]
                if not all(map(math.isnan, values)):
                    rows.append([encoder, score, *map(_format_value, values)])
        return rows

    def _trials_table(self) -> Table:
        board = self.board
        trials = [entry.trial for entry in board.entries]
        trials += [trial for trial in board.trials if trial.number not in self._entries]
        names = parameter_plots.explored(map(trained_params, board.trials))
        notes = {trial.number: self._note(trial) for trial in trials}
        note = ["note"] if any(notes.values()) else []
        header = ["trial", "state", *board.objectives, *note, "epochs", "time", *names]
        rows = []
        for trial in trials:
            params, further = trained_params(trial), range(1, len(board.objectives))
            rows.append(
                [
                    str(trial.number),
                    STATUS_NAMES[status_of(trial)],
                    self._format_objective(trial),
                    *(_format_value(last_value(trial, index)) for index in further),
                    *(notes[trial.number] for _ in note),
                    str(num_epochs(trial)),
                    f"{used_seconds(trial):.0f} s",
                    *(_format_value(params[name]) if name in params else "–" for name in names),
                ]
            )
        return "Trials", header, rows

    def _format_objective(self, trial: FrozenTrial) -> str:
        """A trial's objective; mean and standard deviation over the seeds if it was confirmed."""
        entry = self._entries.get(trial.number)
        if entry is None or entry.num_seeds < 2:
            return _format_value(last_value(trial))
        return f"{entry.mean:.4g} ± {entry.spread:.2g} ({entry.num_seeds} seeds)"

    def _note(self, trial: FrozenTrial) -> str:
        """What is special about a trial."""
        if (confirmed := self.board.confirms.get(trial.number)) is not None:
            return f"confirms trial {confirmed}"
        if copy := describe_copy(trial):
            return copy
        if violated := self.board.violated_constraints.get(trial.number):
            return f"violates {', '.join(violated)}"
        return "Pareto front" if len(self.board.objectives) > 1 and trial.number in self.board.front else ""


def _reason(trial: FrozenTrial) -> str:
    """Why a trial failed, was cut short or waits."""
    name = INTERRUPTED if status_of(trial) is TrialStatus.WAITING else REASON
    return str(trial.user_attrs.get(name, ""))


def _format_value(value: object) -> str:
    if not isinstance(value, float):
        return str(value)
    return "–" if math.isnan(value) else f"{value:.4g}"


def _html_table(table: Table, best: str) -> str:
    heading, header, rows = table
    lines = [_html_row(header, "th")]
    lines += [_html_row(row, "td", is_best=heading == "Trials" and row[0] == best) for row in rows]
    return f"<table>{''.join(lines)}</table>"


def _html_row(row: Iterable[str], tag: str, is_best: bool = False) -> str:
    cells = "".join(f"<{tag}{' class=wrap' if len(cell) > 60 else ''}>{html.escape(cell)}</{tag}>" for cell in row)
    return f"<tr{' class=best' if is_best else ''}>{cells}</tr>"


def _html_image(path: Path) -> str:
    data = base64.b64encode(path.read_bytes()).decode()
    return f'<img alt="{html.escape(path.stem)}" src="data:image/png;base64,{data}">'
