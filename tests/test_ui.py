"""A finished study in MLflow's own pages, seen through a real browser."""

from __future__ import annotations

import json
import math
import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import mlflow
import numpy as np
import pytest
from safetensors.numpy import save_file

from csmae.tracking.pictures import DIRECTIONS
from csmae.tracking.record import read_record
from csmae.tracking.report import publish
from csmae.tracking.tracker import Tracker
from tracking_server import Server

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

webdriver = pytest.importorskip("selenium.webdriver", reason="the UI test needs selenium")
CHROMIUM, DRIVER = Path("/usr/bin/chromium"), Path("/usr/bin/chromedriver")
NUM_TRIALS = 12


def finished_study(folder: Path, uri: str) -> str:
    """A study as a search leaves it; the link to its page."""
    chance = random.Random(0)
    tracker = Tracker(folder, folder.name, uri)
    tags = {"csmae.command": f"python search.py spaces/{folder.name}.yaml"}
    tracker.start({"base.train.epochs": 9, "search.num_trials": NUM_TRIALS}, tags, "val/f1_mean")
    for number in range(NUM_TRIALS):
        complete, ratio = number % 3 == 0, chance.uniform(0.2, 0.8)
        weight, rate = chance.uniform(0, 4), 10 ** chance.uniform(-4, -2.3)
        tracker.trial(number, {"masking.ratio": ratio, "optim.lr": rate, "loss.mim_weight": weight})
        for epoch in range(1, 10 if complete else 4):
            score = 0.3 + 0.3 * (1 - math.exp(-epoch / 3)) - 0.3 * abs(ratio - 0.6)
            by_direction = {f"val/f1/{name}": score + 0.02 * place for place, name in enumerate(DIRECTIONS)}
            losses = {"train/loss": 6 / epoch**0.3, "train/mim": 3 / epoch**0.2, "time/epoch_s": 2.0}
            tracker.epoch(number, epoch, {"val/f1_mean": score, **by_direction, **losses})
        tracker.end(number, "COMPLETE" if complete else "PRUNED")
    finish(tracker, folder)
    assert tracker.close(120) == 0
    assert tracker.page is not None
    return tracker.page


def finish(tracker: Tracker, folder: Path) -> None:
    best = read_record(folder).ranked()[0]
    files = folder / "trials" / str(best.number) / "encoder"
    files.mkdir(parents=True)
    save_file({"w": np.ones(9, np.float32)}, files / "encoder.safetensors")
    (files / "config.json").write_text(json.dumps({"bands": {"s1": ["VH", "VV"], "s2": ["B02"]}, "model": {}}))
    scores = {"val/f1_mean": best.last("val/f1_mean"), "test/f1_mean": 0.6}
    tracker.champion(best.number, files, scores, {"csmae.data": "synthetic"})
    tracker.finish({"scores/champion/test/f1_mean": 0.6, "importance/masking.ratio": 0.7, "importance/optim.lr": 0.3})
    publish(tracker, folder)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with Server(tmp_path_factory.mktemp("server")) as server:
        yield server


@pytest.fixture(scope="module")
def page(server: Server, tmp_path_factory: pytest.TempPathFactory) -> str:
    return finished_study(tmp_path_factory.mktemp("runs") / "quickstart", server.uri)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if not (CHROMIUM.exists() and DRIVER.exists()):
        pytest.skip("the UI test needs Debian's chromium and chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = str(CHROMIUM)
    for word in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1600,1000"):
        options.add_argument(word)
    browser = webdriver.Chrome(options=options, service=webdriver.ChromeService(str(DRIVER)))
    yield browser
    browser.quit()


@pytest.fixture
def visit(browser: Any, server: Server, request: pytest.FixtureRequest) -> Iterator[Callable[..., str]]:
    """Opens a page and returns its text once it holds what is awaited; keeps a picture of it where one is asked for."""
    from selenium.webdriver.support.wait import WebDriverWait

    def text() -> str:
        return str(browser.find_element("tag name", "body").text)

    def visit(path: str, *awaited: str) -> str:
        browser.get("about:blank")
        browser.get(f"{server.uri}/#{path}")
        WebDriverWait(browser, 60).until(lambda _: all(word in text() for word in awaited), f"{awaited} in {path}")
        return text()

    yield visit
    if folder := os.environ.get("CSMAE_SCREENSHOTS"):
        browser.save_screenshot(str(Path(folder) / f"{request.node.name.removeprefix('test_')}.png"))


def runs(uri: str) -> dict[str, Any]:
    client = mlflow.MlflowClient(uri)
    experiment = client.get_experiment_by_name("quickstart")
    return {run.info.run_name: run.info for run in client.search_runs([experiment.experiment_id])}


def test_the_study_opens_with_the_best_trial_first_and_its_parameters(
    visit: Callable[..., str], page: str, browser: Any, tmp_path: Path
) -> None:
    text = visit(page, "trial 0", "val/f1_mean", "masking.ratio")
    assert "Sort: val/f1_mean" in text
    cells = browser.find_elements("css selector", '[role=gridcell][col-id*="f1_mean"]')
    rows = [int(cell.find_element("xpath", "./..").get_attribute("row-index")) for cell in cells]
    values = [float(text) for _, text in sorted(zip(rows, (cell.text for cell in cells), strict=True)) if text != "-"]
    assert len(values) >= 8
    assert values == sorted(values, reverse=True)


def test_trials_are_nested_under_their_study(
    visit: Callable[..., str], server: Server, page: str, browser: Any
) -> None:
    experiment = runs(server.uri)["quickstart"].experiment_id
    closed = visit(
        f"/experiments/{experiment}/runs?workflowType=machine_learning&orderByKey=attributes.start_time", "quickstart"
    )
    assert "trial 3" not in closed
    browser.find_element("css selector", '[role=gridcell][col-id*="Run Name"] button').click()
    from selenium.webdriver.support.wait import WebDriverWait

    WebDriverWait(browser, 30).until(lambda _: "trial 3" in browser.find_element("tag name", "body").text)


def test_two_trials_compare_by_their_explored_parameters(
    visit: Callable[..., str], server: Server, page: str, browser: Any
) -> None:
    infos = runs(server.uri)
    from selenium.webdriver.support.wait import WebDriverWait

    chosen = quote(json.dumps([infos["trial 0"].run_id, infos["trial 3"].run_id]))
    experiments = quote(json.dumps([infos["trial 0"].experiment_id]))
    text = visit(f"/compare-runs?runs={chosen}&experiments={experiments}", "Parallel Coordinates Plot", "masking.ratio")
    assert "Comparing 2 Runs" in text
    assert "optim.lr" in text
    axes = "return [...document.querySelectorAll('.axis-title')].map(title => title.textContent)"
    wanted = {"loss.mim_weight", "masking.ratio", "optim.lr", "val/f1_mean"}
    WebDriverWait(browser, 60).until(lambda _: wanted <= set(browser.execute_script(axes)))


def test_the_pictures_of_the_study_show(visit: Callable[..., str], server: Server, page: str, browser: Any) -> None:
    from selenium.webdriver.support.wait import WebDriverWait

    info = runs(server.uri)["quickstart"]
    visit(f"/experiments/{info.experiment_id}/runs/{info.run_id}/artifacts/pictures/parallel.png", "parallel.png")
    drawn = "return [...document.images].some(i => i.naturalWidth > 500 && i.complete)"
    WebDriverWait(browser, 60).until(lambda _: browser.execute_script(drawn))


def test_the_registered_encoder_shows_its_alias_and_origin(visit: Callable[..., str], page: str) -> None:
    text = visit("/models/csmae-encoder", "Version 1", "champion")
    assert "csmae.study : quickstart" in text.replace("\n", " ")
    card = visit("/models/csmae-encoder/versions/1", "Version 1", "Architecture")
    assert "test/f1_mean" in card
