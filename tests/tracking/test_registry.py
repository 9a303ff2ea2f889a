"""The registry: who holds the alias, what a version says, and the way back to the files."""

from __future__ import annotations

import json
import logging
import shutil
import subprocess
import uuid
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pytest
from safetensors.numpy import save_file

import csmae
from csmae.reporting.record import read_record
from csmae.reporting.report import reproduction
from csmae.tracking.fetch import fetch_encoder
from csmae.tracking.outbox import TrackingError
from csmae.tracking.registry import checksum, study_alias
from csmae.tracking.tracker import Tracker, replay
from csmae.training.scoring import encoder_of, seeded_model
from tests.conftest import small_config

REAL = {"csmae.data": "BigEarthNet v2"}
SYNTHETIC = {"csmae.data": 'synthetic {"num_train": 512}'}


@pytest.fixture(scope="module")
def empty_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Copied by each test: making the tables takes seconds."""
    path = tmp_path_factory.mktemp("empty") / "mlflow.db"
    mlflow.MlflowClient(f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture
def place(tmp_path: Path, empty_database: Path) -> str:
    (tmp_path / "runs").mkdir()
    shutil.copy(empty_database, tmp_path / "runs" / "mlflow.db")
    return f"sqlite:///{tmp_path}/runs/mlflow.db"


def encoder(folder: Path, seed: int, bands: dict[str, list[str]] | None = None) -> Path:
    folder.mkdir(parents=True)
    save_file({"w": np.full(5, seed, np.float32)}, folder / "encoder.safetensors")
    settings = {"bands": bands or {"s1": ["VH", "VV"], "s2": ["B02", "B03"]}, "model": {"size": "nano"}}
    (folder / "config.json").write_text(json.dumps(settings))
    return folder


def search(place: str, folder: Path, score: float, tags: dict[str, str], **options: Any) -> Path:
    """One search that ends with a champion; its encoder's folder."""
    number = int(score * 100)
    files = encoder(folder / f"{uuid.uuid4().hex}", number, options.get("bands"))
    tracker = Tracker(folder, folder.name, place)
    tracker.start({}, {}, options.get("metric", "val/f1_mean"), options.get("direction", "maximize"))
    tracker.trial(number, {})
    tracker.epoch(number, 4, {options.get("metric", "val/f1_mean"): score})
    tracker.champion(number, files, {options.get("metric", "val/f1_mean"): score, "test/f1_mean": score / 2}, tags)
    assert tracker.close(30) == 0
    return files


def holder(place: str, alias: str = "champion") -> Any:
    return mlflow.MlflowClient(place).get_model_version_by_alias("csmae-encoder", alias)


def same_files(fetched: Path, files: Path) -> bool:
    return all(
        (fetched / name).read_bytes() == (files / name).read_bytes() for name in ("encoder.safetensors", "config.json")
    )


def test_the_champion_comes_back_by_alias_version_and_run(place: str, tmp_path: Path) -> None:
    files = search(place, tmp_path / "masking", 0.5, REAL)
    version = holder(place)
    for uri in ("models:/csmae-encoder@champion", "models:/csmae-encoder/1", f"runs:/{version.run_id}"):
        assert same_files(fetch_encoder(uri, place), files)


def test_a_good_trial_that_is_not_the_best_keeps_its_encoder_and_scores(place: str, tmp_path: Path) -> None:
    folder, files = tmp_path / "masking", [encoder(tmp_path / f"files{number}", number) for number in range(3)]
    tracker = Tracker(folder, folder.name, place)
    tracker.start({}, {}, "val/f1_mean")
    for number in range(3):
        tracker.trial(number, {})
        tracker.epoch(number, 4, {"val/f1_mean": number / 10})
        tracker.encoder(number, files[number], {"val/f1_mean": number / 10}, REAL)
    tracker.champion(2, files[2], {"val/f1_mean": 0.2}, REAL)
    assert tracker.close(30) == 0
    client = mlflow.MlflowClient(place)
    experiment = client.get_experiment_by_name("masking").experiment_id
    models = {model.tags["csmae.trial"]: model for model in client.search_logged_models([experiment])}
    assert sorted(models) == ["0", "1", "2"]
    for number, model in models.items():
        assert [metric.value for metric in model.metrics] == [int(number) / 10]
        for uri in (f"models:/{model.model_id}", f"runs:/{model.source_run_id}"):
            assert same_files(fetch_encoder(uri, place), files[int(number)])
    assert len(client.search_model_versions("name = 'csmae-encoder'")) == 1


def test_load_encoder_takes_a_folder_a_run_and_the_registrys_names(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = small_config()
    files = tmp_path / "files"
    encoder_of(seeded_model(config), config).save(files)
    tracker = Tracker(tmp_path / "masking", "masking", place)
    tracker.start({}, {}, "val/f1_mean")
    tracker.trial(0, {})
    tracker.champion(0, files, {"val/f1_mean": 0.5}, REAL)
    assert tracker.close(30) == 0
    run = holder(place).run_id
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    expected = csmae.load_encoder(files).fingerprint()
    names = ("models:/csmae-encoder@champion", "models:/csmae-encoder@champion-masking", "models:/csmae-encoder/1")
    for where in (*names, f"runs:/{run}", run):
        assert csmae.load_encoder(where).fingerprint() == expected


def test_a_version_says_study_trial_data_and_scores(place: str, tmp_path: Path) -> None:
    search(place, tmp_path / "masking", 0.5, REAL)
    version = holder(place)
    says = {"csmae.study": "masking", "csmae.trial": "50", "csmae.data": "BigEarthNet v2", "csmae.score": "0.5"}
    assert says.items() <= version.tags.items()
    assert "| test/f1_mean | 0.2500 |" in version.description
    assert "S2 bands | B02 B03" in version.description
    assert (fetch_encoder("models:/csmae-encoder@champion", place) / "README.md").read_text() == version.description
    client = mlflow.MlflowClient(place)
    models = client.search_logged_models([client.get_run(version.run_id).info.experiment_id])
    assert {metric.key: metric.value for metric in models[0].metrics} == {"val/f1_mean": 0.5, "test/f1_mean": 0.25}


def test_a_better_champion_moves_the_alias_and_a_worse_one_does_not(
    place: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    search(place, tmp_path / "a", 0.5, REAL)
    better = search(place, tmp_path / "b", 0.7, REAL)
    with caplog.at_level(logging.WARNING):
        search(place, tmp_path / "c", 0.6, REAL)
    assert same_files(fetch_encoder("models:/csmae-encoder@champion", place), better)
    assert holder(place, "champion-c").tags["csmae.trial"] == "60"
    assert "stays with version 2 of study b: its val/f1_mean is 0.7000, the new one's 0.6000" in caplog.text


def test_where_small_is_good_the_smaller_one_holds_the_alias(place: str, tmp_path: Path) -> None:
    for study, score in (("a", 0.5), ("b", 0.3), ("c", 0.4)):
        search(place, tmp_path / study, score, REAL, metric="train/loss", direction="minimize")
    assert holder(place).tags["csmae.study"] == "b"


def test_scores_on_other_data_do_not_compare_the_last_search_holds_the_alias(place: str, tmp_path: Path) -> None:
    search(place, tmp_path / "quickstart", 0.9, SYNTHETIC)
    search(place, tmp_path / "masking", 0.5, REAL)
    assert holder(place).tags["csmae.study"] == "masking"
    search(place, tmp_path / "other", 0.4, {"csmae.data": "BigEarthNet v1"})
    assert holder(place).tags["csmae.study"] == "other"


def test_synthetic_scenes_never_take_the_alias_from_real_ones(
    place: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    search(place, tmp_path / "masking", 0.5, REAL)
    with caplog.at_level(logging.WARNING):
        search(place, tmp_path / "quickstart", 0.9, SYNTHETIC)
    assert holder(place).tags["csmae.study"] == "masking"
    assert holder(place, "champion-quickstart").tags["csmae.study"] == "quickstart"
    assert "has seen synthetic scenes only" in caplog.text


def test_a_champion_of_other_bands_keeps_the_alias_and_is_told(
    place: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    search(place, tmp_path / "a", 0.5, REAL, bands={"s1": ["VV"], "s2": ["B04"]})
    with caplog.at_level(logging.WARNING):
        search(place, tmp_path / "b", 0.7, REAL)
    assert holder(place).tags["csmae.study"] == "a"
    assert "it reads other bands (s1 VV; s2 B04)" in caplog.text


@pytest.mark.parametrize("name", ["it's", 'a "b"', "$HOME `x`", "back\\slash", "größe"])
def test_the_printed_command_loads_the_encoder_of_any_folder(tmp_path: Path, name: str) -> None:
    tracker = Tracker(tmp_path / "masking", "masking", "http://127.0.0.1:9")
    tracker.start({}, {"csmae.tracking": "Weights & Biases"}, "val/f1_mean")
    files = encoder(tmp_path / name, 1)
    tracker.champion(0, files, {"val/f1_mean": 0.5}, REAL)
    tracker.close(0)
    line = reproduction(read_record(tmp_path / "masking")).splitlines()[-1].replace("csmae.load_encoder", "print")
    said = subprocess.run(line.replace("import csmae; ", ""), shell=True, capture_output=True, text=True, check=True)
    assert said.stdout == f"{files}\n"


def test_the_same_champion_twice_is_one_version(place: str, tmp_path: Path) -> None:
    files = search(place, tmp_path / "a", 0.5, REAL)
    tracker = Tracker(tmp_path / "a", "a", place)
    tracker.start({}, {}, "val/f1_mean")
    tracker.champion(50, files, {"val/f1_mean": 0.5}, REAL)
    assert tracker.close(30) == 0
    assert len(mlflow.MlflowClient(place).search_model_versions("name = 'csmae-encoder'")) == 1


def test_uploads_that_fail_leave_no_more_than_one_logged_model(place: str, tmp_path: Path) -> None:
    in_the_way = tmp_path / "runs" / "mlartifacts" / "a" / "models"
    in_the_way.parent.mkdir(parents=True)
    in_the_way.write_text("no folder can be made here")
    files = encoder(tmp_path / "files", 1)
    client = mlflow.MlflowClient(place)

    def models() -> list[str]:
        experiment = client.get_experiment_by_name("a").experiment_id
        return [str(model.status) for model in client.search_logged_models([experiment])]

    tracker = Tracker(tmp_path / "a", "a", place)
    tracker.start({}, {}, "val/f1_mean")
    tracker.trial(0, {})
    tracker.champion(0, files, {"val/f1_mean": 0.5}, REAL)
    assert tracker.close(2) > 0
    assert models() == ["PENDING"]
    experiment = client.get_experiment_by_name("a").experiment_id
    run = client.search_runs([experiment], "tags.`csmae.run` = 'trial 0'")[0].info.run_id
    for _ in range(3):  # release 0.1.0 left one for each attempt
        client.create_logged_model(experiment, "csmae-encoder", run, {"csmae.sha256": checksum(files)})
    in_the_way.unlink()
    assert replay(tmp_path / "a", place, 60) == (0, [])
    assert models() == ["READY"]
    assert same_files(fetch_encoder("models:/csmae-encoder@champion-a", place), files)
    (model,) = client.search_logged_models([experiment])
    assert [metric.value for metric in model.metrics] == [0.5]


@pytest.mark.parametrize("study", ["losses_v1.2", "größe", "a.b-c"])
def test_the_alias_that_is_printed_is_the_one_that_is_registered(place: str, tmp_path: Path, study: str) -> None:
    files = search(place, tmp_path / study, 0.5, REAL)
    assert same_files(fetch_encoder(f"models:/csmae-encoder@{study_alias(study)}", place), files)
    assert study_alias("losses") == "champion-losses"
    assert f"models:/csmae-encoder@{study_alias(study)}" in reproduction(read_record(tmp_path / study))


def test_studies_whose_names_differ_in_a_forbidden_character_have_an_alias_each(place: str, tmp_path: Path) -> None:
    files = {study: search(place, tmp_path / study, score, REAL) for study, score in (("a.b", 0.5), ("a-b", 0.4))}
    for study, encoder_dir in files.items():
        assert same_files(fetch_encoder(f"models:/csmae-encoder@{study_alias(study)}", place), encoder_dir)


def test_a_good_trial_is_a_logged_model_without_being_registered(place: str, tmp_path: Path) -> None:
    tracker = Tracker(tmp_path / "a", "a", place)
    tracker.start({}, {}, "val/f1_mean")
    tracker.trial(3, {})
    files = encoder(tmp_path / "second", 3)
    tracker.encoder(3, files, {"val/f1_mean": 0.4}, REAL)
    assert tracker.close(30) == 0
    client = mlflow.MlflowClient(place)
    run = client.search_runs([client.get_experiment_by_name("a").experiment_id], "tags.`csmae.run` = 'trial 3'")[0]
    assert same_files(fetch_encoder(f"runs:/{run.info.run_id}", place), files)
    assert not client.search_registered_models()


def test_files_that_were_changed_are_not_handed_out(place: str, tmp_path: Path) -> None:
    search(place, tmp_path / "a", 0.5, REAL)
    stored = fetch_encoder("models:/csmae-encoder@champion", place) / "encoder.safetensors"
    stored.write_bytes(stored.read_bytes()[:-1] + b"\1")
    with pytest.raises(TrackingError, match="checksum differs"):
        fetch_encoder("models:/csmae-encoder@champion", place)


def test_a_folder_that_changed_before_it_was_uploaded_is_refused(
    place: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "runs").rename(tmp_path / "away")
    (tmp_path / "runs").write_text("in the way of the database")
    tracker = Tracker(tmp_path / "a", "a", place)
    tracker.start({}, {}, "val/f1_mean")
    files = encoder(tmp_path / "files", 1)
    tracker.champion(1, files, {"val/f1_mean": 0.5}, REAL)
    tracker.close(1)
    (files / "config.json").write_text("{}")
    (tmp_path / "runs").unlink()
    (tmp_path / "away").rename(tmp_path / "runs")
    with caplog.at_level(logging.WARNING):
        assert Tracker(tmp_path / "a", "a", place).close(30) == 0
    assert "has changed since the search handed it in" in caplog.text


@pytest.mark.parametrize(
    ("uri", "says"),
    [
        ("models:/csmae-encoder@winner", "alias winner not found"),
        ("models:/csmae-encoder/9", "version=9"),
        ("models:/other@champion", "not found"),
        ("runs:/0123456789abcdef0123456789abcdef", "not found"),
        ("models:/csmae-encoder", "must be models:/csmae-encoder@champion"),
        ("s3://bucket/encoder", "must be models:/csmae-encoder@champion"),
    ],
)
def test_an_encoder_that_is_not_there_is_one_line(shared: str, uri: str, says: str) -> None:
    with pytest.raises(TrackingError) as error:
        fetch_encoder(uri, shared)
    assert says in str(error.value)
    assert "\n" not in str(error.value)


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("shared")
    search(f"sqlite:///{folder}/mlflow.db", folder / "a", 0.5, REAL)
    return f"sqlite:///{folder}/mlflow.db"


def test_without_a_server_it_says_what_to_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with pytest.raises(TrackingError, match="set MLFLOW_TRACKING_URI"):
        fetch_encoder("models:/csmae-encoder@champion")


def test_the_database_of_this_folder_is_the_default(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = search(place, tmp_path / "a", 0.5, REAL)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert same_files(fetch_encoder("models:/csmae-encoder@champion"), files)


def test_a_folder_without_an_encoder_is_refused_when_it_is_handed_in(place: str, tmp_path: Path) -> None:
    tracker = Tracker(tmp_path / "a", "a", place)
    tracker.start({}, {}, "val/f1_mean")
    with pytest.raises(TrackingError, match=r"no encoder: encoder\.safetensors cannot be read"):
        tracker.champion(1, tmp_path, {"val/f1_mean": 0.5}, REAL)
    tracker.close(0)


# The champion is whom the search names


def crown(place: str, folder: Path, number: int, own: float, mean: float) -> Path:
    """A search that names a champion by the mean over seeds, after trials with higher single scores."""
    files = encoder(folder / uuid.uuid4().hex, number)
    tracker = Tracker(folder, folder.name, place)
    tracker.start({}, {}, "val/f1_mean")
    tracker.trial(number, {})
    tracker.epoch(number, 4, {"val/f1_mean": own})
    metrics = {"val/f1_mean": own, "confirm/mean": mean, "test/f1_mean": mean / 2}
    tracker.champion(number, files, metrics, {**REAL, "csmae.seeds": "4"}, mean)
    assert tracker.close(30) == 0
    return files


def test_the_aliases_move_to_the_champion_that_the_search_names_whatever_single_scores_say(
    place: str, tmp_path: Path
) -> None:
    search(place, tmp_path / "masking", 0.7, REAL)  # by a single score, before it was disproved
    files = crown(place, tmp_path / "masking", 3, 0.6, 0.58)
    for alias in ("champion-masking", "champion"):
        assert holder(place, alias).tags["csmae.trial"] == "3"
        assert same_files(fetch_encoder(f"models:/csmae-encoder@{alias}", place), files)


def test_studies_compare_by_the_mean_where_there_is_one(place: str, tmp_path: Path) -> None:
    crown(place, tmp_path / "a", 1, 0.9, 0.5)
    search(place, tmp_path / "b", 0.6, REAL)
    assert holder(place).tags["csmae.study"] == "b"


def test_a_champion_that_gets_worse_hands_the_alias_to_the_best_of_the_studies(place: str, tmp_path: Path) -> None:
    search(place, tmp_path / "a", 0.65, REAL)
    search(place, tmp_path / "b", 0.7, REAL)
    search(place, tmp_path / "synthetic", 0.99, SYNTHETIC)
    crown(place, tmp_path / "b", 3, 0.6, 0.58)
    assert holder(place, "champion-b").tags["csmae.trial"] == "3"
    assert holder(place).tags["csmae.study"] == "a"


def test_an_alias_that_an_earlier_release_wrote_keeps_no_disproved_champion(place: str, tmp_path: Path) -> None:
    search(place, tmp_path / "losses_v1.2", 0.7, REAL)
    client = mlflow.MlflowClient(place)
    client.delete_registered_model_alias("csmae-encoder", study_alias("losses_v1.2"))
    client.set_registered_model_alias("csmae-encoder", "champion-losses_v1-2", 1)
    crown(place, tmp_path / "losses_v1.2", 3, 0.6, 0.58)
    assert holder(place).tags["csmae.trial"] == "3"


def test_a_champion_that_is_named_again_says_its_new_score(place: str, tmp_path: Path) -> None:
    folder = tmp_path / "masking"
    files = encoder(tmp_path / "files", 3)
    for score, num_seeds, metrics in ((0.6, 1, {}), (0.58, 4, {"confirm/mean": 0.58, "test/f1_mean": 0.29})):
        tracker = Tracker(folder, folder.name, place)
        tracker.start({}, {}, "val/f1_mean")
        tracker.trial(3, {})
        if num_seeds == 1:
            tracker.encoder(3, files, {"val/f1_mean": 0.6}, REAL)
        tracker.champion(3, files, {"val/f1_mean": 0.6, **metrics}, {**REAL, "csmae.seeds": str(num_seeds)}, score)
        assert tracker.close(30) == 0
    version = holder(place, "champion-masking")
    assert (version.tags["csmae.score"], version.tags["csmae.seeds"], int(version.version)) == ("0.58", "4", 1)
    assert "| confirm/mean | 0.5800 |" in version.description
    assert (fetch_encoder("models:/csmae-encoder@champion", place) / "README.md").read_text() == version.description
    client = mlflow.MlflowClient(place)
    (model,) = client.search_logged_models([client.get_experiment_by_name("masking").experiment_id])
    assert {m.key: m.value for m in model.metrics} == {"val/f1_mean": 0.6, "confirm/mean": 0.58, "test/f1_mean": 0.29}


def test_mlflow_says_which_trial_is_the_champion_which_repeat_and_which_break_constraints(
    place: str, tmp_path: Path
) -> None:
    folder = tmp_path / "masking"
    files = encoder(tmp_path / "files", 1)
    for champion in (0, 1):
        tracker = Tracker(folder, folder.name, place)
        tracker.start({}, {}, "val/f1_mean")
        for number, tags in (
            (0, {}),
            (1, {}),
            (2, {"csmae.confirms": "1"}),
            (3, {"csmae.violated_constraints": "time/epoch_s"}),
        ):
            tracker.trial(number, {})
            tracker.end(number, "COMPLETE", None, tags)
        tracker.champion(champion, files, {"val/f1_mean": 0.5}, REAL)
        tracker.finish({})
        assert tracker.close(30) == 0
    client = mlflow.MlflowClient(place)
    runs: Any = client.search_runs([client.get_experiment_by_name("masking").experiment_id])
    found: dict[str, dict[str, str]] = {run.data.tags["csmae.run"]: run.data.tags for run in runs}
    assert found["study"]["csmae.champion"] == "trial 1"
    assert found["trial 1"]["csmae.champion"] == "yes"
    assert "csmae.champion" not in found["trial 0"]
    assert found["trial 2"]["csmae.confirms"] == "1"
    assert found["trial 3"]["csmae.violated_constraints"] == "time/epoch_s"
