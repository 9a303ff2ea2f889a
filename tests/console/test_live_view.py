"""What users see of a running search."""

import io
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from csmae.console.live_view import LiveView
from csmae.console.progress import SearchProgress
from csmae.trial_status import TrialStatus
from csmae.trials.budget import Budget
from csmae.trials.store import TrialStore
from csmae.tuning.events import EpochReported, TrialEnded, TrialStarted
from tests.console.test_terminal import MARKUP
from tests.tuning.test_searcher import make_study


def make_view(folder: Path, terminal: bool = True) -> tuple[LiveView, SearchProgress, io.StringIO]:
    output = io.StringIO()
    progress = SearchProgress(Budget(TrialStore(make_study(folder, num_trials=5000), folder)))
    console = Console(file=output, force_terminal=terminal, width=200, color_system=None, _environ={"TERM": "xterm"})
    return LiveView(progress, console), progress, output


def run(view: LiveView, number: int, ends: bool = True, **changes: Any) -> None:
    """Send the view the events of a trial."""
    view(TrialStarted(number, {"masking.ratio": number / 10_000}, 4, False, 4, "new configuration"))
    view(EpochReported(number, 1, {"val/f1_mean": changes.get("score", number / 10_000)}))
    if ends:
        view(TrialEnded(number, TrialStatus.FAIL, None, changes.get("reason")))


@pytest.mark.parametrize("terminal", [True, False])
def test_the_view_prints_markup_literally(tmp_path: Path, terminal: bool) -> None:
    view, _, output = make_view(tmp_path, terminal)
    with view:
        run(view, 0, reason=MARKUP)
    shown = "".join(output.getvalue().split())
    assert "".join(MARKUP.split()) in shown


def test_an_error_in_the_view_does_not_stop_the_search(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    view, progress, _ = make_view(tmp_path)
    with view:
        run(view, 0, ends=False, score="high")
    assert [record.getMessage() for record in caplog.records] == [
        "the view of the search failed (ValueError: Unknown format code 'g' for object of type 'str'); the search continues"
    ]
    assert progress.trial(0).epoch == 1


def calls(view: LiveView) -> int:
    """Number of function calls that rendering takes."""
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


def test_rendering_takes_the_same_work_after_two_thousand_trials(tmp_path: Path) -> None:
    view, progress, _ = make_view(tmp_path)
    early: int | None = None
    for number in range(2000):
        run(view, number, ends=number % 500 != 7)
        if number == 1600:
            early = calls(view)
    assert early is not None and len(progress.running) == 4 and progress.num_ended == 1996
    assert calls(view) == pytest.approx(early, rel=0.1)


def test_the_view_renders_while_trials_start_and_end(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    view, progress, _ = make_view(tmp_path)
    done, interval = threading.Event(), sys.getswitchinterval()
    num_rendered, errors = 0, list[Exception]()

    def render() -> None:
        nonlocal num_rendered
        while not done.is_set():
            try:
                view._render()
                num_rendered += 1
            except Exception as error:
                errors.append(error)

    thread = threading.Thread(target=render)
    sys.setswitchinterval(1e-6)
    try:
        thread.start()
        for number in range(1500):
            run(view, number, ends=number % 2 == 0 or number > 20)
    finally:
        done.set()
        thread.join()
        sys.setswitchinterval(interval)
    assert num_rendered and not errors and not caplog.records and progress.num_ended == 1490
