"""The registry: which version has the alias, what a version says, and how its files are fetched."""

from __future__ import annotations

import json
import logging
import shutil
import uuid
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import optuna
import pytest
from safetensors.numpy import save_file

import csmae
from csmae.encoders import SensorEncoder
from csmae.model.csmae import build_model
from csmae.reporting.report import Report
from csmae.tracking.fetch import fetch_encoder
from csmae.tracking.outbox import TrackingError
from csmae.tracking.registry import checksum, study_alias
from csmae.tracking.tracker import Tracker, upload
from csmae.trial_status import TrialStatus
from tests.conftest import small_config

REAL = {"csmae.data": "BigEarthNet v2"}
SYNTHETIC = {"csmae.data": 'synthetic {"num_train": 512}'}


@pytest.fixture(scope="module")
def empty_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Copied by each test: creating the tables takes seconds."""
    path = tmp_path_factory.mktemp("empty") / "mlflow.db"
    mlflow.MlflowClient(f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture
def uri(tmp_path: Path, empty_database: Path) -> str:
    (tmp_path / "runs").mkdir()
    shutil.copy(empty_database, tmp_path / "runs" / "mlflow.db")
    return f"sqlite:///{tmp_path}/runs/mlflow.db"


def encoder(folder: Path, seed: int, bands: dict[str, list[str]] | None = None) -> Path:
    folder.mkdir(parents=True)
    save_file({"w": np.full(5, seed, np.float32)}, folder / "encoder.safetensors")
    settings = {"bands": bands or {"s1": ["VH", "VV"], "s2": ["B02", "B03"]}, "model": {"size": "nano"}}
    (folder / "config.json").write_text(json.dumps(settings))
    return folder


def search(uri: str, folder: Path, score: float, tags: dict[str, str], **options: Any) -> Path:
    """Track one search that ends with a champion; returns its encoder's folder."""
    number = int(score * 100)
    files = encoder(folder / f"{uuid.uuid4().hex}", number, options.get("bands"))
    tracker = Tracker(folder, folder.name, uri)
    tracker.start({}, {}, options.get("metric", "val/f1_mean"), options.get("direction", "maximize"))
    tracker.trial(number, {})
    tracker.epoch(number, 4, {options.get("metric", "val/f1_mean"): score})
    tracker.champion(number, files, {options.get("metric", "val/f1_mean"): score, "test/f1_mean": score / 2}, tags)
    assert tracker.close(30) == 0
    return files


def holder(uri: str, alias: str = "champion") -> Any:
    return mlflow.MlflowClient(uri).get_model_version_by_alias("csmae-encoder", alias)


def same_files(fetched: Path, files: Path) -> bool:
    return all(
        (fetched / name).read_bytes() == (files / name).read_bytes() for name in ("encoder.safetensors", "config.json")
    )


def test_the_champion_is_fetched_by_alias_version_and_run(uri: str, tmp_path: Path) -> None:
    files = search(uri, tmp_path / "masking", 0.5, REAL)
    version = holder(uri)
    for source in ("models:/csmae-encoder@champion", "models:/csmae-encoder/1", f"runs:/{version.run_id}"):
        assert same_files(fetch_encoder(source, uri), files)


def test_a_good_trial_that_is_not_the_best_keeps_its_encoder_and_scores(uri: str, tmp_path: Path) -> None:
    folder, files = tmp_path / "masking", [encoder(tmp_path / f"files{number}", number) for number in range(3)]
    tracker = Tracker(folder, folder.name, uri)
    tracker.start({}, {}, "val/f1_mean")
    for number in range(3):
        tracker.trial(number, {})
        tracker.epoch(number, 4, {"val/f1_mean": number / 10})
        tracker.encoder(number, files[number], {"val/f1_mean": number / 10}, REAL)
    tracker.champion(2, files[2], {"val/f1_mean": 0.2}, REAL)
    assert tracker.close(30) == 0
    client = mlflow.MlflowClient(uri)
    experiment = client.get_experiment_by_name("masking").experiment_id
    models = {model.tags["csmae.trial"]: model for model in client.search_logged_models([experiment])}
    assert sorted(models) == ["0", "1", "2"]
    for number, model in models.items():
        assert [metric.value for metric in model.metrics] == [int(number) / 10]
        for source in (f"models:/{model.model_id}", f"runs:/{model.source_run_id}"):
            assert same_files(fetch_encoder(source, uri), files[int(number)])
    assert len(client.search_model_versions("name = 'csmae-encoder'")) == 1


def test_load_encoder_accepts_a_folder_a_run_and_registry_uris(
    uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = small_config()
    files = tmp_path / "files"
    SensorEncoder.from_model(build_model(config), config).save(files)
    tracker = Tracker(tmp_path / "masking", "masking", uri)
    tracker.start({}, {}, "val/f1_mean")
    tracker.trial(0, {})
    tracker.champion(0, files, {"val/f1_mean": 0.5}, REAL)
    assert tracker.close(30) == 0
    run = holder(uri).run_id
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    expected = csmae.load_encoder(files).fingerprint()
    uris = ("models:/csmae-encoder@champion", "models:/csmae-encoder@champion-masking", "models:/csmae-encoder/1")
    for source in (*uris, f"runs:/{run}", run):
        assert csmae.load_encoder(source).fingerprint() == expected


def test_a_version_says_study_trial_data_and_scores(uri: str, tmp_path: Path) -> None:
    search(uri, tmp_path / "masking", 0.5, REAL)
    version = holder(uri)
    expected = {"csmae.study": "masking", "csmae.trial": "50", "csmae.data": "BigEarthNet v2", "csmae.score": "0.5"}
    assert expected.items() <= version.tags.items()
    assert "| test/f1_mean | 0.2500 |" in version.description
    assert "S2 bands | B02 B03" in version.description
    assert (fetch_encoder("models:/csmae-encoder@champion", uri) / "README.md").read_text() == version.description
    client = mlflow.MlflowClient(uri)
    models = client.search_logged_models([client.get_run(version.run_id).info.experiment_id])
    assert {metric.key: metric.value for metric in models[0].metrics} == {"val/f1_mean": 0.5, "test/f1_mean": 0.25}


def test_a_better_champion_moves_the_alias_and_a_worse_one_does_not(
    uri: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    search(uri, tmp_path / "a", 0.5, REAL)
    better = search(uri, tmp_path / "b", 0.7, REAL)
    with caplog.at_level(logging.WARNING):
        search(uri, tmp_path / "c", 0.6, REAL)
    assert same_files(fetch_encoder("models:/csmae-encoder@champion", uri), better)
    assert holder(uri, "champion-c").tags["csmae.trial"] == "60"
    assert "stays with version 2 of study b: its val/f1_mean is 0.7000, the new one's 0.6000" in caplog.text


def test_for_a_minimized_metric_the_smaller_score_gets_the_alias(uri: str, tmp_path: Path) -> None:
    for study, score in (("a", 0.5), ("b", 0.3), ("c", 0.4)):
        search(uri, tmp_path / study, score, REAL, metric="train/loss", direction="minimize")
    assert holder(uri).tags["csmae.study"] == "b"


def test_scores_on_other_data_do_not_compare_and_the_latest_search_gets_the_alias(uri: str, tmp_path: Path) -> None:
    search(uri, tmp_path / "quickstart", 0.9, SYNTHETIC)
    search(uri, tmp_path / "masking", 0.5, REAL)
    assert holder(uri).tags["csmae.study"] == "masking"
    search(uri, tmp_path / "other", 0.4, {"csmae.data": "BigEarthNet v1"})
    assert holder(uri).tags["csmae.study"] == "other"


def test_synthetic_scenes_never_take_the_alias_from_real_ones(
    uri: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    search(uri, tmp_path / "masking", 0.5, REAL)
    with caplog.at_level(logging.WARNING):
        search(uri, tmp_path / "quickstart", 0.9, SYNTHETIC)
    assert holder(uri).tags["csmae.study"] == "masking"
    assert holder(uri, "champion-quickstart").tags["csmae.study"] == "quickstart"
    assert "has seen synthetic scenes only" in caplog.text


def test_a_champion_that_reads_other_bands_keeps_the_alias_and_the_log_says_why(
    uri: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    search(uri, tmp_path / "a", 0.5, REAL, bands={"s1": ["VV"], "s2": ["B04"]})
    with caplog.at_level(logging.WARNING):
        search(uri, tmp_path / "b", 0.7, REAL)
    assert holder(uri).tags["csmae.study"] == "a"
    assert "it reads other bands (s1 VV; s2 B04)" in caplog.text


def test_the_same_champion_twice_is_one_version(uri: str, tmp_path: Path) -> None:
    files = search(uri, tmp_path / "a", 0.5, REAL)
    tracker = Tracker(tmp_path / "a", "a", uri)
    tracker.start({}, {}, "val/f1_mean")
    tracker.champion(50, files, {"val/f1_mean": 0.5}, REAL)
    assert tracker.close(30) == 0
    assert len(mlflow.MlflowClient(uri).search_model_versions("name = 'csmae-encoder'")) == 1


def test_uploads_that_fail_leave_no_more_than_one_logged_model(uri: str, tmp_path: Path) -> None:
    obstacle = tmp_path / "runs" / "mlartifacts" / "a" / "models"
    obstacle.parent.mkdir(parents=True)
    obstacle.write_text("no folder can be created here")
    files = encoder(tmp_path / "files", 1)
    client = mlflow.MlflowClient(uri)

    def models() -> list[str]:
        experiment = client.get_experiment_by_name("a").experiment_id
        return [str(model.status) for model in client.search_logged_models([experiment])]

    tracker = Tracker(tmp_path / "a", "a", uri)
    tracker.start({}, {}, "val/f1_mean")
    tracker.trial(0, {})
    tracker.champion(0, files, {"val/f1_mean": 0.5}, REAL)
    assert tracker.close(2) > 0
    assert models() == ["PENDING"]
    experiment = client.get_experiment_by_name("a").experiment_id
    run = client.search_runs([experiment], "tags.`csmae.run` = 'trial 0'")[0].info.run_id
    for _ in range(3):  # as attempts leave that a server processes after their timeout
        client.create_logged_model(experiment, "csmae-encoder", run, {"csmae.sha256": checksum(files)})
    obstacle.unlink()
    assert upload(tmp_path / "a", uri, 60) == (0, [])
    assert models() == ["READY"]
    assert same_files(fetch_encoder("models:/csmae-encoder@champion-a", uri), files)
    (model,) = client.search_logged_models([experiment])
    assert [metric.value for metric in model.metrics] == [0.5]


@pytest.mark.parametrize("study", ["losses_v1.2", "größe", "a.b-c"])
def test_the_alias_that_is_printed_is_the_one_that_is_registered(uri: str, tmp_path: Path, study: str) -> None:
    files = search(uri, tmp_path / study, 0.5, REAL)
    assert same_files(fetch_encoder(f"models:/csmae-encoder@{study_alias(study)}", uri), files)
    assert study_alias("losses") == "champion-losses"
    assert (
        f"models:/csmae-encoder@{study_alias(study)}"
        in Report(optuna.create_study(study_name=study), tmp_path).reproduction()
    )


def test_studies_whose_names_differ_in_a_forbidden_character_have_an_alias_each(uri: str, tmp_path: Path) -> None:
    files = {study: search(uri, tmp_path / study, score, REAL) for study, score in (("a.b", 0.5), ("a-b", 0.4))}
    for study, encoder_dir in files.items():
        assert same_files(fetch_encoder(f"models:/csmae-encoder@{study_alias(study)}", uri), encoder_dir)


def test_a_good_trial_is_a_logged_model_without_being_registered(uri: str, tmp_path: Path) -> None:
    tracker = Tracker(tmp_path / "a", "a", uri)
    tracker.start({}, {}, "val/f1_mean")
    tracker.trial(3, {})
    files = encoder(tmp_path / "second", 3)
    tracker.encoder(3, files, {"val/f1_mean": 0.4}, REAL)
    assert tracker.close(30) == 0
    client = mlflow.MlflowClient(uri)
    run = client.search_runs([client.get_experiment_by_name("a").experiment_id], "tags.`csmae.run` = 'trial 3'")[0]
    assert same_files(fetch_encoder(f"runs:/{run.info.run_id}", uri), files)
    assert not client.search_registered_models()


def test_files_that_were_changed_are_not_loaded(uri: str, tmp_path: Path) -> None:
    search(uri, tmp_path / "a", 0.5, REAL)
    stored = fetch_encoder("models:/csmae-encoder@champion", uri) / "encoder.safetensors"
    stored.write_bytes(stored.read_bytes()[:-1] + b"\1")
    with pytest.raises(TrackingError, match="checksum differs"):
        fetch_encoder("models:/csmae-encoder@champion", uri)


def test_a_folder_that_changed_before_it_was_uploaded_is_rejected(
    uri: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "runs").rename(tmp_path / "away")
    (tmp_path / "runs").write_text("in the way of the database")
    tracker = Tracker(tmp_path / "a", "a", uri)
    tracker.start({}, {}, "val/f1_mean")
    files = encoder(tmp_path / "files", 1)
    tracker.champion(1, files, {"val/f1_mean": 0.5}, REAL)
    tracker.close(1)
    (files / "config.json").write_text("{}")
    (tmp_path / "runs").unlink()
    (tmp_path / "away").rename(tmp_path / "runs")
    with caplog.at_level(logging.WARNING):
        assert Tracker(tmp_path / "a", "a", uri).close(30) == 0
    assert "has changed since the search reported it" in caplog.text


@pytest.mark.parametrize(
    ("encoder_uri", "message"),
    [
        ("models:/csmae-encoder@winner", "alias winner not found"),
        ("models:/csmae-encoder/9", "version=9"),
        ("models:/other@champion", "not found"),
        ("runs:/0123456789abcdef0123456789abcdef", "not found"),
        ("models:/csmae-encoder", "must be models:/csmae-encoder@champion"),
        ("s3://bucket/encoder", "must be models:/csmae-encoder@champion"),
    ],
)
def test_a_missing_encoder_is_reported_in_one_line(shared: str, encoder_uri: str, message: str) -> None:
    with pytest.raises(TrackingError) as error:
        fetch_encoder(encoder_uri, shared)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("shared")
    search(f"sqlite:///{folder}/mlflow.db", folder / "a", 0.5, REAL)
    return f"sqlite:///{folder}/mlflow.db"


def test_without_a_server_the_message_says_what_to_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with pytest.raises(TrackingError, match="set MLFLOW_TRACKING_URI"):
        fetch_encoder("models:/csmae-encoder@champion")


def test_the_database_in_the_current_folder_is_the_default(
    uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = search(uri, tmp_path / "a", 0.5, REAL)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert same_files(fetch_encoder("models:/csmae-encoder@champion"), files)


def test_a_folder_without_an_encoder_is_rejected_when_it_is_reported(uri: str, tmp_path: Path) -> None:
    tracker = Tracker(tmp_path / "a", "a", uri)
    tracker.start({}, {}, "val/f1_mean")
    with pytest.raises(TrackingError, match=r"no encoder: encoder\.safetensors cannot be read"):
        tracker.champion(1, tmp_path, {"val/f1_mean": 0.5}, REAL)
    tracker.close(0)


# The champion is the trial that the search names


def search_with_seeds(uri: str, folder: Path, number: int, own: float, mean: float) -> Path:
    """Track a search that names a champion by the mean over seeds, although other trials have higher scores."""
    files = encoder(folder / uuid.uuid4().hex, number)
    tracker = Tracker(folder, folder.name, uri)
    tracker.start({}, {}, "val/f1_mean")
    tracker.trial(number, {})
    tracker.epoch(number, 4, {"val/f1_mean": own})
    metrics = {"val/f1_mean": own, "confirm/mean": mean, "test/f1_mean": mean / 2}
    tracker.champion(number, files, metrics, {**REAL, "csmae.seeds": "4"}, mean)
    assert tracker.close(30) == 0
    return files


def test_the_aliases_move_to_the_champion_that_the_search_names_whatever_single_scores_are(
    uri: str, tmp_path: Path
) -> None:
    search(uri, tmp_path / "masking", 0.7, REAL)  # by a single score, before confirmations disproved it
    files = search_with_seeds(uri, tmp_path / "masking", 3, 0.6, 0.58)
    for alias in ("champion-masking", "champion"):
        assert holder(uri, alias).tags["csmae.trial"] == "3"
        assert same_files(fetch_encoder(f"models:/csmae-encoder@{alias}", uri), files)


def test_studies_compare_by_the_mean_where_there_is_one(uri: str, tmp_path: Path) -> None:
    search_with_seeds(uri, tmp_path / "a", 1, 0.9, 0.5)
    search(uri, tmp_path / "b", 0.6, REAL)
    assert holder(uri).tags["csmae.study"] == "b"


def test_if_a_study_names_a_worse_champion_the_best_of_all_studies_gets_the_alias(uri: str, tmp_path: Path) -> None:
    search(uri, tmp_path / "a", 0.65, REAL)
    search(uri, tmp_path / "b", 0.7, REAL)
    search(uri, tmp_path / "synthetic", 0.99, SYNTHETIC)
    search_with_seeds(uri, tmp_path / "b", 3, 0.6, 0.58)
    assert holder(uri, "champion-b").tags["csmae.trial"] == "3"
    assert holder(uri).tags["csmae.study"] == "a"


def test_a_former_champion_with_an_alias_set_by_hand_does_not_compete(uri: str, tmp_path: Path) -> None:
    search(uri, tmp_path / "losses_v1.2", 0.7, REAL)
    client = mlflow.MlflowClient(uri)
    client.delete_registered_model_alias("csmae-encoder", study_alias("losses_v1.2"))
    client.set_registered_model_alias("csmae-encoder", "champion-losses_v1-2", 1)
    search_with_seeds(uri, tmp_path / "losses_v1.2", 3, 0.6, 0.58)
    assert holder(uri).tags["csmae.trial"] == "3"


def test_a_champion_that_is_named_again_has_its_new_score(uri: str, tmp_path: Path) -> None:
    folder = tmp_path / "masking"
    files = encoder(tmp_path / "files", 3)
    for score, num_seeds, metrics in ((0.6, 1, {}), (0.58, 4, {"confirm/mean": 0.58, "test/f1_mean": 0.29})):
        tracker = Tracker(folder, folder.name, uri)
        tracker.start({}, {}, "val/f1_mean")
        tracker.trial(3, {})
        if num_seeds == 1:
            tracker.encoder(3, files, {"val/f1_mean": 0.6}, REAL)
        tracker.champion(3, files, {"val/f1_mean": 0.6, **metrics}, {**REAL, "csmae.seeds": str(num_seeds)}, score)
        assert tracker.close(30) == 0
    version = holder(uri, "champion-masking")
    assert (version.tags["csmae.score"], version.tags["csmae.seeds"], int(version.version)) == ("0.58", "4", 1)
    assert "| confirm/mean | 0.5800 |" in version.description
    assert (fetch_encoder("models:/csmae-encoder@champion", uri) / "README.md").read_text() == version.description
    client = mlflow.MlflowClient(uri)
    (model,) = client.search_logged_models([client.get_experiment_by_name("masking").experiment_id])
    assert {m.key: m.value for m in model.metrics} == {"val/f1_mean": 0.6, "confirm/mean": 0.58, "test/f1_mean": 0.29}


def test_tags_name_the_champion_confirmations_and_violated_constraints(uri: str, tmp_path: Path) -> None:
    folder = tmp_path / "masking"
    files = encoder(tmp_path / "files", 1)
    for champion in (0, 1):
        tracker = Tracker(folder, folder.name, uri)
        tracker.start({}, {}, "val/f1_mean")
        for number, tags in (
            (0, {}),
            (1, {}),
            (2, {"csmae.confirms": "1"}),
            (3, {"csmae.violated_constraints": "time/epoch_s"}),
        ):
            tracker.trial(number, {})
            tracker.end(number, TrialStatus.COMPLETE, None, tags)
        tracker.champion(champion, files, {"val/f1_mean": 0.5}, REAL)
        tracker.finish({})
        assert tracker.close(30) == 0
    client = mlflow.MlflowClient(uri)
    runs: Any = client.search_runs([client.get_experiment_by_name("masking").experiment_id])
    found: dict[str, dict[str, str]] = {run.data.tags["csmae.run"]: run.data.tags for run in runs}
    assert found["study"]["csmae.champion"] == "trial 1"
    assert found["trial 1"]["csmae.champion"] == "yes"
    assert "csmae.champion" not in found["trial 0"]
    assert found["trial 2"]["csmae.confirms"] == "1"
    assert found["trial 3"]["csmae.violated_constraints"] == "time/epoch_s"
