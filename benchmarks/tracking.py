"""What tracking costs a search: epochs per second with the server well, dead or hanging, against none at all.

Two processes train (fixed arithmetic, ``--epoch-s`` long each) and report to this one, as workers do to a search's driver, which
tracks the epoch and lets them go on. The ways take turns, several times; a ratio is the median over the rounds.
Prints one JSON line: ``healthy``, ``dead``, ``hanging`` as shares of the rate without tracking (1 is no delay), and
``call_ms``, the median and the longest time that one call of the tracker held up an epoch; and ``cpu_ms``, what tracking an epoch on the healthy
server costs this process, uploading included. The last two are true on a busy machine as well.
"""

from __future__ import annotations

import argparse
import json
import logging
import multiprocessing as mp
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import numpy as np

from csmae.tracking.tracker import Tracker

NUM_METRICS = 20
"""Of an epoch; a training run has about as many."""


def work(pipe: Connection, epoch_s: float, num_epochs: int) -> None:
    """A trial: each epoch is so much arithmetic, then a report and the wait for leave to go on."""
    matrix = np.ones((400, 400))
    start, steps = time.perf_counter(), 0
    while time.perf_counter() - start < 0.5:
        matrix @ matrix
        steps += 1
    per_epoch = max(1, round(steps * epoch_s / 0.5))
    pipe.send(None)
    pipe.recv()
    for epoch in range(1, num_epochs + 1):
        for _ in range(per_epoch):
            matrix @ matrix
        pipe.send(epoch)
        pipe.recv()
    pipe.close()


class Search:
    """A driver with two trials in processes of their own, which stay for all rounds."""

    def __init__(self, epoch_s: float, num_epochs: int) -> None:
        context = mp.get_context("spawn")
        self.pipes = []
        for _ in range(2):
            ours, theirs = context.Pipe()
            context.Process(target=work, args=(theirs, epoch_s, num_epochs), daemon=True).start()
            theirs.close()
            self.pipes.append(ours)
        for pipe in self.pipes:
            pipe.recv()
        for pipe in self.pipes:
            pipe.send(None)
        self.epochs = 0

    def rate(self, seconds: float, track: Callable[[int, int], None]) -> float:
        """Epochs per second over a while."""
        start, count = time.perf_counter(), 0
        while time.perf_counter() - start < seconds:
            for pipe in wait(self.pipes, timeout=1):
                assert isinstance(pipe, Connection)
                pipe.recv()
                count += 1
                self.epochs += 1
                track(self.pipes.index(pipe), self.epochs)
                pipe.send(None)
        return count / (time.perf_counter() - start)


class Tracked:
    """A tracker whose calls are timed."""

    def __init__(self, folder: Path, uri: str) -> None:
        self.tracker = Tracker(folder, folder.name, uri)
        self.tracker.start({"benchmark": True}, {}, "m0")
        for number in range(2):
            self.tracker.trial(number, {"masking.ratio": number})
        self.cpu = 0.0
        self.calls: list[float] = []

    def __call__(self, number: int, epoch: int) -> None:
        """Track one epoch."""
        start = time.perf_counter()
        self.tracker.epoch(number, epoch, {f"m{index}": epoch / (index + 1) for index in range(NUM_METRICS)})
        self.calls.append(time.perf_counter() - start)


def free_port() -> int:
    """A port of the loopback that nobody has."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def start_server(folder: Path) -> tuple[subprocess.Popen[bytes], str]:
    """A real tracking server that answers."""
    uri = f"http://127.0.0.1:{free_port()}"
    command = [sys.executable, "-m", "mlflow", "server", "--port", uri.rpartition(":")[2], "--workers", "1"]
    command += ["--backend-store-uri", f"sqlite:///{folder}/server.db", "--artifacts-destination", str(folder)]
    quiet = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
    sink = subprocess.DEVNULL
    server = subprocess.Popen(command, stdout=sink, stderr=sink, env=os.environ | quiet, start_new_session=True)
    for _ in range(600):
        try:
            urllib.request.urlopen(f"{uri}/health", timeout=2).close()
            return server, uri
        except OSError:
            time.sleep(0.2)
    raise SystemExit("the tracking server did not start")


def measure(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """The ratios, and what a call costs."""
    server, uri = start_server(folder)
    try:
        ways = {
            "healthy": Tracked(folder / "healthy", uri),
            "dead": Tracked(folder / "dead", f"http://127.0.0.1:{free_port()}"),
            "hanging": Tracked(folder / "hanging", uri),
        }
        time.sleep(options.settle_s)
        search = Search(options.epoch_s, 1_000_000)
        ratios: dict[str, list[float]] = {way: [] for way in ways}
        for _ in range(options.rounds):
            for way, tracked in ways.items():
                before = search.rate(options.seconds, lambda number, epoch: None)
                os.killpg(server.pid, signal.SIGSTOP if way == "hanging" else signal.SIGCONT)
                cpu = time.process_time()
                tracked_rate = search.rate(options.seconds, tracked)
                tracked.cpu += time.process_time() - cpu
                os.killpg(server.pid, signal.SIGCONT)
                after = search.rate(options.seconds, lambda number, epoch: None)
                ratios[way].append(2 * tracked_rate / (before + after))
    finally:
        os.killpg(server.pid, signal.SIGKILL)
    calls = [1000 * call for tracked in ways.values() for call in tracked.calls]
    result: dict[str, Any] = {way: round(statistics.median(found), 4) for way, found in ratios.items()}
    result["call_ms"] = [round(statistics.median(calls), 2), round(max(calls), 2)]
    return result | {"cpu_ms": round(1000 * ways["healthy"].cpu / len(ways["healthy"].calls), 2)}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=8, help="of each way in a round")
    parser.add_argument("--epoch-s", type=float, default=0.5, help="length of an epoch")
    parser.add_argument("--settle-s", type=float, default=10, help="for the first contact with the servers")
    logging.disable(logging.WARNING)
    with tempfile.TemporaryDirectory() as temporary:
        print(json.dumps(measure(parser.parse_args(), Path(temporary))))
