"""Nodes that will be preempted, and trials that wait for other nodes."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import optuna
import pytest
import torch

from csmae.cli.main import main
from csmae.cluster import preemption
from csmae.cluster.resources import REFRESH_INTERVAL_S
from csmae.config import Config
from csmae.training.trainer import SYNC_EVERY, pretrain
from tests.cluster.test_capacity import start, wait_for
from tests.conftest import free_port
from tests.support.own_cluster import OwnCluster, own_cluster, stop

LONG_EPOCHS = ["--set", f"data.synthetic.num_train={80 * SYNC_EVERY}", "--set", "optim.batch_size=2"]


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[OwnCluster]:
    """A head without CPUs for workers."""
    monkeypatch.setenv("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "3")
    with own_cluster(tmp_path, num_cpus=0) as cluster:
        yield cluster


class Service(ThreadingHTTPServer):
    """A cloud's metadata service, on a machine that will be preempted."""

    preempted = True


class Metadata(BaseHTTPRequestHandler):
    """The service's responses."""

    server: Service

    def do_PUT(self) -> None:
        self.answer("secret" if "X-aws-ec2-metadata-token-ttl-seconds" in self.headers else None)

    def do_GET(self) -> None:
        if self.path == "/computeMetadata/v1/instance/preempted":
            self.answer("TRUE" if self.headers["Metadata-Flavor"] == "Google" else None)
            return
        exists = self.path == "/latest/meta-data/spot/instance-action"
        allowed = self.headers["X-aws-ec2-metadata-token"] == "secret"
        end = datetime.now(UTC) + timedelta(seconds=120)
        notice = {"action": "terminate", "time": f"{end:%Y-%m-%dT%H:%M:%SZ}"}
        self.answer(json.dumps(notice) if exists and allowed and self.server.preempted else None)

    def answer(self, text: str | None) -> None:
        self.send_response(200 if text else 404)
        self.end_headers()
        self.wfile.write((text or "").encode())

    def log_message(self, format: str, *arguments: object) -> None:
        """Log nothing."""


@pytest.fixture
def metadata(monkeypatch: pytest.MonkeyPatch) -> Iterator[Service]:
    server = Service(("127.0.0.1", 0), Metadata)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("AWS_EC2_METADATA_SERVICE_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("GCE_METADATA_HOST", f"127.0.0.1:{server.server_port}")
    yield server
    server.shutdown()


def saved(folder: Path) -> dict[str, Any]:
    return dict(torch.load(folder / "runs/small/trials/0/checkpoint.pt", weights_only=True))


def notice_command(cluster: OwnCluster, node: str) -> list[str]:
    notice = [sys.executable, "-m", "csmae", "preemption-notice", "aws"]
    return [*notice, "--address", cluster.address, "--node-id", node]


def test_a_clouds_notice_is_read(metadata: Service) -> None:
    assert 110 < (preemption.aws_seconds_left() or 0) <= 120
    assert preemption.gcp_seconds_left() == preemption.GCP_NOTICE_S
    metadata.preempted = False
    assert preemption.aws_seconds_left() is None


def test_a_machine_outside_the_cloud_is_rejected(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("AWS_EC2_METADATA_SERVICE_ENDPOINT", f"http://127.0.0.1:{free_port()}")
    assert main(["preemption-notice", "aws", "--address", "127.0.0.1:1"]) == 2
    assert capsys.readouterr().err.startswith("aws: its metadata service does not answer here")


def test_a_notice_that_ray_does_not_accept_is_repeated_until_the_machine_stops(
    metadata: Service, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(preemption, "GCP_NOTICE_S", 1.5)
    monkeypatch.setattr(preemption, "DRAIN_TIMEOUT_S", 1.0)
    assert main(["preemption-notice", "gcp", "--address", f"127.0.0.1:{free_port()}", "--node-id", "a" * 56]) == 2
    out, err = capsys.readouterr()
    assert out.count("Ray did not accept the notice; retrying") >= 1
    assert err.startswith("Ray at 127.0.0.1:") and "could not be notified" in err and err.count("\n") == 1


@pytest.mark.slow
def test_a_notice_reaches_a_head_that_responds_late(cluster: OwnCluster, metadata: Service) -> None:
    port = cluster.address.rpartition(":")[2]
    (gcs,) = [int(pid) for pid in cluster.run(["pgrep", "-f", f"gcs_server.*--gcs_server_port={port}"]).split()]
    ask = "import ray, sys; ray.init(sys.argv[1], logging_level='CRITICAL'); print(ray.nodes()[0]['NodeID'])"
    node = cluster.run([sys.executable, "-c", ask, cluster.address]).split()[-1]
    command = notice_command(cluster, node)
    os.kill(gcs, signal.SIGSTOP)
    watch = subprocess.Popen(command, env=os.environ | cluster.environment, stdout=subprocess.PIPE, text=True)
    assert watch.stdout is not None
    lines = iter(watch.stdout.readline, "")
    assert next(lines).startswith("this machine stops in") and "retrying" in next(lines)
    os.kill(gcs, signal.SIGCONT)
    assert list(lines)[-1] == "Ray has been notified\n" and watch.wait() == 0


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_trial_saves_in_the_middle_of_an_epoch_and_moves_when_its_node_will_be_preempted(
    cluster: OwnCluster, metadata: Service, tmp_path: Path
) -> None:
    cluster.add_node(1)
    cluster.add_node(1)
    driver = start(tmp_path, cluster, "--num-trials", "1", "--set", "train.epochs=5", *LONG_EPOCHS)
    wait_for(driver, tmp_path, "trial 0 epoch 1/5")
    (preempted,) = cluster.nodes_at_work()
    command = notice_command(cluster, preempted)
    assert cluster.run(command).startswith("this machine stops in 1")
    deadline = time.monotonic() + 60
    while not saved(tmp_path)["progress"]["steps"]:
        assert driver.poll() is None and time.monotonic() < deadline
        time.sleep(0.1)
    wait_for(driver, tmp_path, "trial 0 epoch 4/5")
    (new,) = cluster.nodes_at_work()
    assert new != preempted
    assert driver.wait(400) == 0, (tmp_path / "log").read_text()
    (trial,) = optuna.load_study(study_name="small", storage=f"sqlite:///{tmp_path}/runs/studies.db").trials
    config = Config.model_validate_json(saved(tmp_path)["config"])
    expected = [epoch.metrics["val/f1_mean"] for epoch in pretrain(config)]
    assert list(trial.intermediate_values.values()) == expected, "as without the preemption"


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_trial_whose_node_is_lost_waits_for_another_one(cluster: OwnCluster, tmp_path: Path) -> None:
    node = cluster.add_node(1)
    driver = start(tmp_path, cluster, "--num-trials", "2", "--set", "train.epochs=60")
    wait_for(driver, tmp_path, "trial 0 epoch 1/60")
    stop(node)
    log = wait_for(driver, tmp_path, "trial 0 waits: no node has the resources for 1 x 1 CPU")
    time.sleep(2 * REFRESH_INTERVAL_S)
    assert (tmp_path / "log").read_text() == log, "it does not start where nothing fits"
    cluster.add_node(1)
    wait_for(driver, tmp_path, "trial 0 resumes")
    assert driver.wait(400) == 0, (tmp_path / "log").read_text()
    trials = optuna.load_study(study_name="small", storage=f"sqlite:///{tmp_path}/runs/studies.db").trials
    assert [trial.state.name for trial in trials] == ["COMPLETE"] * 2
    assert [sorted(trial.intermediate_values) for trial in trials] == [list(range(1, 61))] * 2
