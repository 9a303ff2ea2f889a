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
from csmae.tuning.events import EpochReported, TrialEnded, TrialPaused, TrialStarted
from tests.console.test_terminal import MARKUP
from tests.tuning.test_searcher import make_study


def make_view(folder: Path, terminal: bool = True) -> tuple[LiveView, SearchProgress, io.StringIO]:
    output = io.StringIO()
    progress = SearchProgress(Budget(TrialStore(make_study(folder, num_trials=5000), folder)))
    console = Console(file=output, force_terminal=terminal, width=200, color_system=None, _environ={"TERM": "xterm"})
    return LiveView(progress, console), progress, output


def run(view: LiveView, number: int, ends: bool = True, **changes: Any) -> None:
    """Send the view the events of a trial."""
    view(TrialStarted(number, {"masking.ratio": number / 10_000}, 4, False, False, 4, "new configuration"))
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


def test_paused_and_promoted_trials_are_marked_and_counted(tmp_path: Path) -> None:
    view, progress, output = make_view(tmp_path, terminal=False)
    for number in range(3):
        view(TrialStarted(number, {"masking.ratio": 0.5}, 9, False, False, 1, "first rung"))
        view(EpochReported(number, 1, {"val/f1_mean": 0.5}))
        view(TrialPaused(number, 1, "first rung"))
    assert progress.counts == {"PAUSED": 3} and progress.running == ()
    view(TrialStarted(1, {"masking.ratio": 0.5}, 9, True, True, 3, "number 1 of 3 trials"))
    assert progress.counts == {"PAUSED": 2} and progress.num_ended == 2
    assert [trial.number for trial in progress.ended] == [0, 2]
    console = Console(file=io.StringIO(), width=200, record=True)
    console.print(view._render())
    shown = console.export_text()
    assert "2/5000: 0 completed, 2 paused, 0 pruned, 0 failed" in shown
    assert [line.split()[:5] for line in shown.splitlines() if "promoted" in line] == [
        ["1", "promoted", "0/3", "of", "9"]
    ]
    view(TrialEnded(0, TrialStatus.PRUNED, 0.5, "the worst"))
    assert progress.counts == {"PAUSED": 1, "PRUNED": 1}
    lines = " ".join(output.getvalue().split())
    assert "trial 0 starts until epoch 1: " in lines and "trial 2 pauses after epoch 1/9" in lines
    assert "trial 1 is promoted until epoch 3 (number 1 of 3 trials): " in lines


def test_the_remaining_time_counts_what_promotions_take(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = 0.0
    monkeypatch.setattr("time.monotonic", lambda: clock)
    _, progress, _ = make_view(tmp_path)
    for number in range(10):
        progress.update(TrialStarted(number, {}, 50, False, False, 1, "first rung"))
        for epoch in (1, 2):
            clock += 1.0
            progress.update(EpochReported(number, epoch, {}))
        progress.update(TrialPaused(number, 2, "first rung"))
    progress.update(TrialStarted(0, {}, 50, True, True, 9, "the best"))
    assert progress.remaining_s == pytest.approx(4990 * 1.9)
