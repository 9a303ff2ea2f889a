"""A finished quickstart on MLflow's pages in a real browser."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import mlflow
import pytest

from csmae.tracking.mlflow_sink import view_path
from tests.support.tracking_server import Server

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

webdriver = pytest.importorskip("selenium.webdriver", reason="the UI test needs selenium")
CHROMIUM, DRIVER = Path("/usr/bin/chromium"), Path("/usr/bin/chromedriver")
ROOT = Path(__file__).resolve().parents[2]
NUM_TRIALS = 4
"""Fewer than the quickstart's, and all complete: the comparison must not depend on early stopping."""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with Server(tmp_path_factory.mktemp("server")) as server:
        yield server


@pytest.fixture(scope="module")
def study(server: Server, browser: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The runs of a real quickstart by name."""
    storage = tmp_path_factory.mktemp("runs")
    command = [sys.executable, "search.py", "spaces/quickstart.yaml", "--num-trials", str(NUM_TRIALS)]
    command += ["--set", "search.strategy=none"]
    command += ["--storage", str(storage), "--mlflow-uri", server.uri]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    client = mlflow.MlflowClient(server.uri)
    experiment = client.get_experiment_by_name("quickstart")
    return {run.info.run_name: run for run in client.search_runs([experiment.experiment_id])}


@pytest.fixture(scope="module")
def finished(study: dict[str, Any]) -> list[Any]:
    """Completed trials, best first."""
    done = [run for run in study.values() if run.data.tags.get("csmae.state") == "COMPLETE"]
    assert len(done) == NUM_TRIALS
    return sorted(done, key=lambda run: -run.data.metrics["val/f1_mean"])


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if not (CHROMIUM.exists() and DRIVER.exists()):
        pytest.skip("the UI test needs Debian's chromium and chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = str(CHROMIUM)
    for word in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=2200,1000"):
        options.add_argument(word)
    browser = webdriver.Chrome(options=options, service=webdriver.ChromeService(str(DRIVER)))
    yield browser
    browser.quit()


@pytest.fixture
def visit(browser: Any, server: Server, request: pytest.FixtureRequest) -> Iterator[Callable[..., str]]:
    """Opens a page and returns its text once it contains the given words; saves a screenshot if ``CSMAE_SCREENSHOTS`` is set."""
    from selenium.webdriver.support.wait import WebDriverWait

    def text() -> str:
        return str(browser.find_element("tag name", "body").text)

    def visit(path: str, *words: str) -> str:
        browser.get("about:blank")
        browser.get(f"{server.uri}/#{path}")
        WebDriverWait(browser, 60).until(lambda _: all(word in text() for word in words), f"{words} in {path}")
        return text()

    yield visit
    if folder := os.environ.get("CSMAE_SCREENSHOTS"):
        browser.save_screenshot(str(Path(folder) / f"{request.node.name.removeprefix('test_')}.png"))


def wait_until(browser: Any, condition: Callable[[], bool]) -> None:
    from selenium.webdriver.support.wait import WebDriverWait

    WebDriverWait(browser, 60).until(lambda _: condition())


def test_the_study_opens_with_the_best_trial_first_and_its_parameters(
    visit: Callable[..., str], study: dict[str, Any], finished: list[Any], browser: Any
) -> None:
    page = view_path(study["quickstart"].info.experiment_id)
    text = visit(page, finished[0].info.run_name, "val/f1_mean", "masking.ratio")
    assert "Sort: val/f1_mean" in text
    cells = browser.find_elements("css selector", '[role=gridcell][col-id*="f1_mean"]')
    rows = [int(cell.find_element("xpath", "./..").get_attribute("row-index")) for cell in cells]
    values = [float(text) for _, text in sorted(zip(rows, (cell.text for cell in cells), strict=True)) if text != "-"]
    assert len(values) == NUM_TRIALS
    assert values == sorted(values, reverse=True)


def test_trials_are_nested_under_their_study(visit: Callable[..., str], study: dict[str, Any], browser: Any) -> None:
    experiment = study["quickstart"].info.experiment_id
    closed = visit(
        f"/experiments/{experiment}/runs?workflowType=machine_learning&orderByKey=attributes.start_time", "quickstart"
    )
    assert "trial 3" not in closed
    expander = '[role=gridcell][col-id*="Run Name"] button'
    wait_until(browser, lambda: bool(browser.find_elements("css selector", expander)))
    browser.find_element("css selector", expander).click()
    wait_until(browser, lambda: "trial 3" in browser.find_element("tag name", "body").text)


def test_two_trials_compare_by_their_explored_parameters(
    visit: Callable[..., str], finished: list[Any], browser: Any
) -> None:
    infos = [run.info for run in finished[:2]]
    chosen, experiments = (quote(json.dumps(value)) for value in ([i.run_id for i in infos], [infos[0].experiment_id]))
    text = visit(f"/compare-runs?runs={chosen}&experiments={experiments}", "Parallel Coordinates Plot", "masking.ratio")
    assert "Comparing 2 Runs" in text
    axes = "return [...document.querySelectorAll('.axis-title')].map(title => title.textContent)"
    shown = {"loss.mim_weight", "loss.temperature", "masking.ratio"}
    wait_until(browser, lambda: shown <= set(browser.execute_script(axes)))
    boxes = browser.find_elements("css selector", "input[role=combobox]")
    for box, name in zip(boxes, ("optim.lr", "val/f1_mean"), strict=True):  # the page starts with three parameters
        box.send_keys(name)
        wait_until(browser, lambda name=name: listed(browser, name))  # type: ignore[misc]
        box.send_keys("\ue007")  # Enter
        shown.add(name)
        wait_until(browser, lambda: shown <= set(browser.execute_script(axes)))
    rows = "return [...document.querySelectorAll('tr, [role=row]')].map(row => row.innerText)"
    for name in ("masking.ratio", "optim.lr"):
        values = [run.data.params[name][:6] for run in finished[:2]]
        wait_until(
            browser,
            lambda name=name, values=values: any(  # type: ignore[misc]
                name in row and all(value in row for value in values) for row in browser.execute_script(rows)
            ),
        )


def listed(browser: Any, name: str) -> bool:
    """Whether an open list offers a name."""
    script = "return [...document.querySelectorAll('[class*=select-item-option]')].map(option => option.textContent)"
    return name in browser.execute_script(script)


@pytest.mark.parametrize("plot", ["parallel", "history", "slices"])
def test_the_plots_of_the_study_are_displayed(
    visit: Callable[..., str], study: dict[str, Any], browser: Any, plot: str
) -> None:
    info = study["quickstart"].info
    visit(f"/experiments/{info.experiment_id}/runs/{info.run_id}/artifacts/plots/{plot}.png", f"{plot}.png")
    wait_until(browser, lambda: has_large_image(browser))


@pytest.mark.parametrize("plot", ["epoch-0001-reconstructions", "epoch-0009-reconstructions", "epoch-0009-retrieval"])
def test_the_plots_of_the_best_trial_are_displayed(
    visit: Callable[..., str], finished: list[Any], browser: Any, plot: str
) -> None:
    info = finished[0].info
    visit(f"/experiments/{info.experiment_id}/runs/{info.run_id}/artifacts/plots/{plot}.png", f"{plot}.png")
    wait_until(browser, lambda: has_large_image(browser))


def has_large_image(browser: Any) -> bool:
    return bool(browser.execute_script("return [...document.images].some(i => i.naturalWidth > 500 && i.complete)"))


def test_the_registered_encoder_shows_its_alias_and_study(visit: Callable[..., str], study: dict[str, Any]) -> None:
    text = visit("/models/csmae-encoder", "Version 1", "champion")
    assert "csmae.study : quickstart" in text.replace("\n", " ")
    card = visit("/models/csmae-encoder/versions/1", "Version 1", "Architecture")
    assert "test/f1_mean" in card


def test_a_trials_resources_are_on_its_page_of_system_metrics(visit: Callable[..., str], finished: list[Any]) -> None:
    info = finished[0].info
    assert finished[0].data.metrics["budget/epochs"] == 9
    visit(f"/experiments/{info.experiment_id}/runs/{info.run_id}/system-metrics", "cpu_percent", "rss_mb")
