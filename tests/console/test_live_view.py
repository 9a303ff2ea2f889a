"""What is shown of a search while it runs."""

import io
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from csmae.console.live_view import LiveView
from csmae.console.progress import SearchProgress
from csmae.console.tables import format_best_trials, format_scores, format_studies
from csmae.trial_status import TrialStatus
from csmae.trials.budget import Budget
from csmae.trials.store import TrialStore
from csmae.tuning.events import EpochReported, TrialEnded, TrialStarted
from tests.console.test_terminal import MARKUP
from tests.tuning.test_searcher import make_searcher, make_study, result


def make_view(folder: Path, terminal: bool = True) -> tuple[LiveView, SearchProgress, io.StringIO]:
    told = io.StringIO()
    progress = SearchProgress.from_budget(Budget(TrialStore(make_study(folder, num_trials=5000), folder)))
    console = Console(file=told, force_terminal=terminal, width=200, color_system=None, _environ={"TERM": "xterm"})
    return LiveView("study", progress, console), progress, told


def run(view: LiveView, number: int, ends: bool = True, **changes: Any) -> None:
    """Tell the view of a trial from its start to its end."""
    view(TrialStarted(number, {"masking.ratio": number / 10_000}, 4, False))
    view(EpochReported(number, 1, {"val/f1_mean": changes.get("score", number / 10_000)}))
    if ends:
        view(TrialEnded(number, TrialStatus.FAIL, None, changes.get("reason")))


@pytest.mark.parametrize("terminal", [True, False])
def test_the_view_shows_foreign_text_as_it_is(tmp_path: Path, terminal: bool) -> None:
    view, _, told = make_view(tmp_path, terminal)
    with view:
        run(view, 0, reason=MARKUP)
    shown = "".join(told.getvalue().split())
    assert "".join(MARKUP.split()) in shown


def test_tables_show_foreign_text_as_it_is(tmp_path: Path) -> None:
    study = make_study(tmp_path)
    searcher, _ = make_searcher(study, tmp_path)
    searcher.suggest("a")
    searcher.on_trial_complete("a", result(4, 0.4, finished=True))
    told = io.StringIO()
    folder = tmp_path / "[bold]runs"
    folder.mkdir()
    (tmp_path / "studies.db").rename(folder / "studies.db")
    console = Console(file=told, width=300)
    console.print(format_studies(folder / "studies.db"))
    console.print(format_best_trials(TrialStore(study, folder)))
    console.print(format_scores({MARKUP: {"test/recall_at_1": 0.5, "test/mrr": 0.5}}))
    shown = "".join(told.getvalue().split())
    assert f"studiesin{folder}/studies.db" in shown and "".join(MARKUP.split()) in shown


def test_an_error_in_the_view_ends_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    view, progress, _ = make_view(tmp_path)
    with view:
        run(view, 0, ends=False, score="high")
    assert [record.getMessage() for record in caplog.records] == [
        "the view of the search failed (ValueError: Unknown format code 'g' for object of type 'str'); the search continues"
    ]
    assert progress.trial(0).epoch == 1


def calls(view: LiveView) -> int:
    """Calls that drawing the screen takes."""
    count = 0

    def profile(frame: object, kind: str, argument: object) -> None:
        nonlocal count
        count += kind in ("call", "c_call")

    sys.setprofile(profile)
    try:
        view._render()
    finally:
        sys.setprofile(None)
    return count


def test_a_screen_takes_the_same_work_after_two_thousand_trials(tmp_path: Path) -> None:
    view, progress, _ = make_view(tmp_path)
    few: int | None = None
    for number in range(2000):
        run(view, number, ends=number % 500 != 7)
        if number == 1600:
            few = calls(view)
    assert few is not None and len(progress.running) == 4 and progress.num_ended == 1996
    assert calls(view) == pytest.approx(few, rel=0.1)


def test_a_screen_is_drawn_while_trials_come_and_go(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    view, progress, _ = make_view(tmp_path)
    over, interval = threading.Event(), sys.getswitchinterval()
    num_drawn, errors = 0, list[Exception]()

    def draw() -> None:
        nonlocal num_drawn
        while not over.is_set():
            try:
                view._render()
                num_drawn += 1
            except Exception as error:
                errors.append(error)

    thread = threading.Thread(target=draw)
    sys.setswitchinterval(1e-6)
    try:
        thread.start()
        for number in range(1500):
            run(view, number, ends=number % 2 == 0 or number > 20)
    finally:
        over.set()
        thread.join()
        sys.setswitchinterval(interval)
    assert num_drawn and not errors and not caplog.records and progress.num_ended == 1490
