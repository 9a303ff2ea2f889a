"""What tracking costs a search: epochs per second with the server well, dead or hanging, against none at all.

Two processes train (fixed arithmetic, ``--epoch-s`` long each) and report to this one, as workers do to a search's driver,
which tracks the epoch and lets them go on. The ways take turns with a stretch without tracking before and after each, and
a pause in which the uploader ends its work; a ratio is the median over the rounds.

Prints one JSON line: ``healthy``, ``dead``, ``hanging`` are shares of the rate without tracking (1 is no delay),
``spread`` their quartiles over the rounds and ``noise`` the quartiles of what two stretches without tracking differ by.
Where the noise is larger than the delay, the direct figures tell: ``blocked``, the share of an epoch that it waits in the
tracker's call, and ``cpu``, the share of one core that tracking takes, uploading included; ``call_ms`` is the median and
the longest call.
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
from dataclasses import dataclass, field
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


class Stretch:
    """A while of training, with or without tracking."""

    def __init__(self, search: Search, seconds: float, track: Callable[[int, int], None]) -> None:
        cpu = time.process_time()
        self.rate = search.rate(seconds, track)
        self.cpu = (time.process_time() - cpu) / seconds


@dataclass
class Found:
    """What the rounds gave for one way."""

    ratios: list[float] = field(default_factory=list)
    noise: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    rates: list[float] = field(default_factory=list)


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
        found = {way: Found() for way in ways}
        for _ in range(options.rounds):
            for way, tracked in ways.items():
                before = Stretch(search, options.seconds, untracked)
                os.killpg(server.pid, signal.SIGSTOP if way == "hanging" else signal.SIGCONT)
                during = Stretch(search, options.seconds, tracked)
                os.killpg(server.pid, signal.SIGCONT)
                search.rate(options.pause_s, untracked)
                after = Stretch(search, options.seconds, untracked)
                add(found[way], before, during, after)
    finally:
        os.killpg(server.pid, signal.SIGKILL)
    calls = [1000 * call for tracked in ways.values() for call in tracked.calls]
    result: dict[str, Any] = {way: round(statistics.median(f.ratios), 4) for way, f in found.items()}
    result["spread"] = {way: quartiles(f.ratios) for way, f in found.items()}
    result["noise"] = quartiles([noise for f in found.values() for noise in f.noise])
    epoch_s = {way: 2 / statistics.median(f.rates) for way, f in found.items()}  # of two trials side by side
    result["blocked"] = {way: round(statistics.mean(t.calls) / epoch_s[way], 5) for way, t in ways.items()}
    result["cpu"] = {way: round(statistics.median(f.cpu), 4) for way, f in found.items()}
    return result | {"call_ms": [round(statistics.median(calls), 2), round(max(calls), 2)]}


def untracked(number: int, epoch: int) -> None:
    """No tracking."""


def add(found: Found, before: Stretch, during: Stretch, after: Stretch) -> None:
    """Take a round's figures."""
    found.ratios.append(2 * during.rate / (before.rate + after.rate))
    found.noise.append(after.rate / before.rate)
    found.cpu.append(during.cpu - (before.cpu + after.cpu) / 2)
    found.rates.append(during.rate)


def quartiles(values: list[float]) -> list[float]:
    """First and third."""
    first, _, third = statistics.quantiles(values, n=4)
    return [round(first, 4), round(third, 4)]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--seconds", type=float, default=3, help="of each stretch")
    parser.add_argument("--epoch-s", type=float, default=0.5, help="length of an epoch")
    parser.add_argument("--pause-s", type=float, default=1.5, help="after a way, for its uploads to end")
    parser.add_argument("--settle-s", type=float, default=10, help="for the first contact with the servers")
    logging.disable(logging.WARNING)
    with tempfile.TemporaryDirectory() as temporary:
        print(json.dumps(measure(parser.parse_args(), Path(temporary))))
