"""The report of a study: one HTML page that needs no other file, and a Markdown summary."""

from __future__ import annotations

import base64
import html
import json
import math
import shlex
import statistics
from collections.abc import Iterable, Iterator
from pathlib import Path

from csmae.reporting.panels import draw_trial
from csmae.reporting.plots import readable, save_png
from csmae.reporting.record import Ranking, StudyRecord, Trial, read_record
from csmae.reporting.study_plots import STATES, study_pictures
from csmae.sensors import DIRECTIONS
from csmae.tracking.registry import MODEL, study_alias
from csmae.tracking.tracker import Tracker

NUM_BEST = 3
"""Trials whose pictures are drawn."""

SCORES = ("f1", "precision", "recall", "mean_pair_f1")

CITATION = (
    "J. Hackstein, G. Sumbul, K. N. Clasen, B. Demir: Exploring Masked Autoencoders for Sensor-Agnostic Image "
    "Retrieval in Remote Sensing. IEEE Transactions on Geoscience and Remote Sensing, 2024. arXiv 2401.07782."
)

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #222; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }
h1 { margin-bottom: 0; } h2 { margin-top: 2.5rem; border-bottom: 1px solid #ddd; }
table { border-collapse: collapse; font-size: 0.9rem; display: block; overflow-x: auto; }
th, td { padding: 0.25rem 0.8rem 0.25rem 0; text-align: left; border-bottom: 1px solid #eee; white-space: nowrap; }
td.wrap { white-space: normal; } img { max-width: 100%; margin: 0.6rem 0; }
tr.best td { font-weight: 600; background: #eef7f2; } pre { background: #f5f5f5; padding: 0.8rem; overflow-x: auto; }
"""

Row = list[str]


def publish(tracker: Tracker, folder: Path, ranking: Ranking | None = None) -> None:
    """Write a study's report and show it in MLflow, with the pictures of its best trials.

    Args:
        tracker: The study's.
        folder: Its own.
        ranking: Of its trials, as the trial store decides it.
    """
    for path in write_report(folder, ranking):
        tracker.artifact(None, path, "pictures" if path.suffix == ".png" else "report")
    for trial in read_record(folder, ranking).ranked()[:NUM_BEST]:
        tracker.artifact(trial.number, trial_dir(folder, trial) / "pictures", "pictures")


def write_report(folder: Path, ranking: Ranking | None = None) -> list[Path]:
    """Write a study's report beside its outbox, and draw its best trials.

    Args:
        folder: Of the study.
        ranking: Of its trials, as the trial store decides it.

    Returns:
        The HTML page, the Markdown summary and the study's pictures.

    Raises:
        TrackingError: The folder holds no study.
    """
    record = read_record(folder, ranking)
    pictures = [save_png(figure, folder / "pictures" / f"{name}.png") for name, figure in study_pictures(record)]
    drawn = [draw_trial(trial, trial_dir(folder, trial)) for trial in record.ranked()[:NUM_BEST]]
    shown = [*pictures, *(path for best in drawn[:1] for path in sorted(best.glob("*.png")))]
    page, summary = folder / "report.html", folder / "report.md"
    page.write_text(_page(record, shown), encoding="utf-8")
    summary.write_text(markdown(record), encoding="utf-8")
    return [page, summary, *pictures]


def trial_dir(folder: Path, trial: Trial) -> Path:
    """Where a trial of the study in ``folder`` leaves its files."""
    return folder / "trials" / str(trial.number)


def markdown(record: StudyRecord) -> str:
    """The tables of a study."""
    parts = [f"# Study {record.name}", overview(record)]
    for heading, header, rows in _tables(record):
        lines = ["| " + " | ".join(row) + " |" for row in (header, ["---"] * len(header), *rows)]
        parts += [f"## {heading}", "\n".join(lines)]
    parts += ["## How to reproduce", f"```\n{reproduction(record)}\n```", "## Citation", CITATION]
    return "\n\n".join(parts) + "\n"


def overview(record: StudyRecord) -> str:
    """The study in two sentences."""
    counts = {text: sum(t.state == state for t in record.trials.values()) for state, text in STATES.items()}
    told = ", ".join(f"{count} {text}" for text, count in counts.items() if count)
    epochs = sum(trial.num_epochs for trial in record.trials.values())
    best = next(iter(record.ranked()), None)
    found = f" The best is trial {best.number}: {record.objective} {_score(record, best)}." if best else ""
    return f"{len(record.trials)} trials ({told}), {epochs} epochs together.{found}"


def reproduction(record: StudyRecord) -> str:
    """Commands that make this study again, and those that use what it found."""
    command = record.tags.get("csmae.command", f"python search.py spaces/{record.name}.yaml")
    commit, *changes = record.tags.get("csmae.git_commit", "").split(" ", 1)
    lines = [f"git checkout {commit}{'  # ' if changes else ''}{''.join(changes)}"] if commit else []
    address = f"models:/{MODEL}@{study_alias(record.name)}"
    if record.tags.get("csmae.tracking", "MLflow") != "MLflow" and record.champion:
        address = record.champion["encoder_dir"]
    load = f"import csmae; csmae.load_encoder({json.dumps(address, ensure_ascii=False)})"
    return "\n".join([*lines, command, f"python -c {shlex.quote(load)}"])


def _tables(record: StudyRecord) -> Iterator[tuple[str, Row, list[Row]]]:
    """Heading, header and rows of each table that has any."""
    scores = _scores(record)
    if scores:
        yield "Scores by the published protocol", *scores
    explored = record.explored()
    ranked = record.ranked()
    numbers = {trial.number for trial in ranked}
    trials = ranked + [trial for trial in record.trials.values() if trial.number not in numbers]
    others = list(record.objectives)[1:]
    notes = ["note"] if any(map(record.note, trials)) else []
    header = ["trial", "state", record.objective, *others, *notes, "epochs", "time", *explored]
    yield "Trials", header, [_trial_row(record, trial, explored, bool(notes)) for trial in trials]
    failed = [[str(t.number), t.reason] for t in record.trials.values() if t.reason]
    if failed:
        yield "Reasons", ["trial", "reason"], failed
    if shares := record.importance():
        yield "Importance of the parameters", ["parameter", "share"], [[n, f"{v:.0%}"] for n, v in shares.items()]
    figures = {name: value for name, value in record.summary.items() if not name.startswith(("scores/", "importance/"))}
    settings = [[name, _number(value)] for name, value in (record.params | record.tags | figures).items()]
    yield "Settings", ["name", "value"], settings


def _scores(record: StudyRecord) -> tuple[Row, list[Row]] | None:
    """The candidates' scores, from the summary's ``scores/CANDIDATE/test/SCORE/DIRECTION``."""
    table: dict[str, dict[str, float]] = {}
    for name, value in record.summary.items():
        if name.startswith("scores/"):
            _, candidate, metric = name.split("/", 2)
            table.setdefault(candidate, {})[metric] = value
    if not table:
        return None
    rows = [
        [name, score, *(_number(value) for value in values)]
        for score in SCORES
        for name, scores in table.items()
        if not all(map(math.isnan, values := _by_direction(scores, score)))
    ]
    return ["encoder", "score", "mean", *map(readable, DIRECTIONS)], rows


def _by_direction(scores: dict[str, float], score: str) -> list[float]:
    """The mean over the directions and each of them; NaN where there is none."""
    values = [scores.get(f"test/{score}/{direction}", math.nan) for direction in DIRECTIONS]
    return [scores.get(f"test/{score}_mean", sum(values) / len(values)), *values]


def _score(record: StudyRecord, trial: Trial) -> str:
    """A trial's objective; mean and standard deviation where it was trained again with other seeds."""
    seeds = record.seeds(trial)
    if len(seeds) < 2:
        return _number(record.value(trial))
    return f"{statistics.fmean(seeds):.4g} ± {statistics.stdev(seeds):.2g} ({len(seeds)} seeds)"


def _trial_row(record: StudyRecord, trial: Trial, explored: list[str], noted: bool) -> Row:
    values = [_number(trial.params[name]) if name in trial.params else "–" for name in explored]
    spent = f"{trial.seconds:.0f} s"
    others = [_number(trial.last(name)) for name in list(record.objectives)[1:]]
    notes = [record.note(trial)] if noted else []
    score = _score(record, trial)
    return [str(trial.number), STATES[trial.state], score, *others, *notes, str(trial.num_epochs), spent, *values]


def _number(value: object) -> str:
    if not isinstance(value, float):
        return str(value)
    return "–" if math.isnan(value) else f"{value:.4g}"


def _page(record: StudyRecord, pictures: list[Path]) -> str:
    best = str(record.ranked()[0].number) if record.ranked() else ""
    parts = [f"<h1>Study {html.escape(record.name)}</h1><p>{html.escape(overview(record))}</p>"]
    tables = [(heading, _table(header, rows, best)) for heading, header, rows in _tables(record)]
    parts += [f"<h2>{heading}</h2>{table}" for heading, table in tables[:-1]]
    parts += ["<h2>Pictures</h2>", *map(_image, pictures)]
    parts += [f"<h2>{heading}</h2>{table}" for heading, table in tables[-1:]]
    parts += ["<h2>How to reproduce</h2>", f"<pre>{html.escape(reproduction(record))}</pre>"]
    parts += ["<h2>Citation</h2>", f"<p>{html.escape(CITATION)}</p>"]
    title = html.escape(f"Study {record.name}")
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{title}</title>'
    return (
        f"<!doctype html><html lang=en><head>{head}<style>{STYLE}</style></head><body>{''.join(parts)}</body></html>\n"
    )


def _table(header: Row, rows: Iterable[Row], best: str) -> str:
    cells = "".join(f"<th>{html.escape(name)}</th>" for name in header)
    lines = [f"<tr>{cells}</tr>"]
    for row in rows:
        mark = " class=best" if header[0] == "trial" and row[0] == best else ""
        cells = "".join(f"<td{' class=wrap' if len(cell) > 60 else ''}>{html.escape(cell)}</td>" for cell in row)
        lines.append(f"<tr{mark}>{cells}</tr>")
    return f"<table>{''.join(lines)}</table>"


def _image(path: Path) -> str:
    data = base64.b64encode(path.read_bytes()).decode()
    return f'<img alt="{html.escape(path.stem)}" src="data:image/png;base64,{data}">'
