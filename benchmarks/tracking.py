"""What tracking costs a search: epochs per second with the server well, dead or hanging, against none at all.

A process for each core but one trains (fixed arithmetic, ``--epoch-s`` long each: half a quickstart's epoch, a hundredth of
one that trains at night, so that what an epoch's call costs weighs a hundred times as much) and reports to this one, as
workers do to a search's driver, which tracks the epoch and lets them go on. This process, uploading included, shares the
training's cores. The server has the last core to itself, as it is on another machine where a search lasts:
what it takes of a core is competition for it and no delay (``server_cpu``). ``same_cores`` is how it goes with a second,
healthy server among the training. The ways take turns, with a stretch without tracking between them and a pause in
which the uploader ends its work; a ratio is the median over the rounds.

Prints one JSON line: ``healthy``, ``dead``, ``hanging`` are shares of the rate without tracking (1 is no delay),
``spread`` their quartiles over the rounds and ``noise`` the quartiles of what two stretches without tracking differ by.
Where the noise is larger than the delay, the direct figures tell: ``blocked``, the share of an epoch that it waits in the
tracker's call, and ``cpu``, the share of one core that tracking takes, uploading included; ``call_ms`` is the median and
the longest call.
"""

from __future__ import annotations

import argparse
import contextlib
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


def work(pipe: Connection, steps: Any, epoch_s: float) -> None:
    """A trial: each epoch is so much arithmetic, then a report and the wait for leave to go on."""
    matrix = np.ones((400, 400))
    start, count = time.perf_counter(), 0
    while time.perf_counter() - start < 0.5:
        matrix @ matrix
        count += 1
    per_epoch = max(1, round(count * epoch_s / 0.5))
    pipe.send(per_epoch)
    while True:
        pipe.recv()
        for _ in range(per_epoch):
            matrix @ matrix
            steps.value += 1
        pipe.send(None)


class Search:
    """A driver with a trial in a process of its own on each of these cores, which stay for all rounds."""

    def __init__(self, cores: set[int], epoch_s: float) -> None:
        context = mp.get_context("spawn")
        self.pipes, self.steps, self.epochs = [], [], 0
        os.sched_setaffinity(0, cores)
        for _ in cores:
            ours, theirs = context.Pipe()
            self.steps.append(context.Value("Q", 0, lock=False))
            context.Process(target=work, args=(theirs, self.steps[-1], epoch_s), daemon=True).start()
            self.pipes.append(ours)
        self.per_epoch = [pipe.recv() for pipe in self.pipes]
        for pipe in self.pipes:
            pipe.send(None)

    def rate(self, seconds: float, track: Callable[[int, int], None]) -> float:
        """Epochs per second over a while, parts of epochs included."""
        start, before = time.perf_counter(), [step.value for step in self.steps]
        while (left := start + seconds - time.perf_counter()) > 0:
            for pipe in wait(self.pipes, left):
                assert isinstance(pipe, Connection)
                pipe.recv()
                self.epochs += 1
                track(self.pipes.index(pipe), self.epochs)
                pipe.send(None)
        passed = time.perf_counter() - start
        done = (
            (step.value - old) / length for step, old, length in zip(self.steps, before, self.per_epoch, strict=True)
        )
        return float(sum(done)) / passed


class Tracked:
    """A tracker whose calls are timed."""

    def __init__(self, folder: Path, uri: str, num_trials: int) -> None:
        self.tracker = Tracker(folder, folder.name, uri)
        self.tracker.start({"benchmark": True}, {}, "m0")
        for number in range(num_trials):
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


def start_server(folder: Path, cores: set[int]) -> tuple[subprocess.Popen[bytes], str]:
    """A real tracking server that answers, on these cores."""
    folder.mkdir()
    uri = f"http://127.0.0.1:{free_port()}"
    command = [sys.executable, "-m", "mlflow", "server", "--port", uri.rpartition(":")[2], "--workers", "1"]
    command += ["--backend-store-uri", f"sqlite:///{folder}/server.db", "--artifacts-destination", str(folder)]
    quiet = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
    sink = subprocess.DEVNULL
    server = subprocess.Popen(command, stdout=sink, stderr=sink, env=os.environ | quiet, start_new_session=True)
    os.sched_setaffinity(server.pid, cores)  # before it has threads; they inherit it
    for _ in range(600):
        try:
            urllib.request.urlopen(f"{uri}/health", timeout=2).close()
            return server, uri
        except OSError:
            time.sleep(0.2)
    raise SystemExit("the tracking server did not start")


def cpu_s(group: int) -> float:
    """Seconds of a core that a process group has had."""
    total = 0
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            fields = path.read_text().rpartition(")")[2].split()
            total += int(fields[2]) == group and int(fields[11]) + int(fields[12])
    return total / os.sysconf("SC_CLK_TCK")


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
    cpu: list[float] = field(default_factory=list)


def measure(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """The ratios, and what a call costs."""
    *training, last = sorted(os.sched_getaffinity(0))
    cores = set(training) or {last}
    elsewhere, uri = start_server(folder / "elsewhere", {last})
    among, uri_among = start_server(folder / "among", cores)
    try:
        uris = {"healthy": uri, "dead": f"http://127.0.0.1:{free_port()}", "hanging": uri, "same_cores": uri_among}
        search = Search(cores, options.epoch_s)
        ways = {way: Tracked(folder / way, place, len(cores)) for way, place in uris.items()}
        search.rate(options.settle_s, untracked)
        found, noise, served = {way: Found() for way in ways}, [], []
        before = Stretch(search, options.seconds, untracked)
        for way, tracked in list(ways.items()) * options.rounds:
            os.killpg(elsewhere.pid, signal.SIGSTOP if way == "hanging" else signal.SIGCONT)
            begun = cpu_s(elsewhere.pid)
            during = Stretch(search, options.seconds, tracked)
            served += [(cpu_s(elsewhere.pid) - begun) / options.seconds] * (way == "healthy")
            os.killpg(elsewhere.pid, signal.SIGCONT)
            search.rate(options.pause_s, untracked)
            after = Stretch(search, options.seconds, untracked)
            found[way].ratios.append(2 * during.rate / (before.rate + after.rate))
            found[way].cpu.append(during.cpu - (before.cpu + after.cpu) / 2)
            noise.append(after.rate / before.rate)
            before = after
    finally:
        for server in (elsewhere, among):
            os.killpg(server.pid, signal.SIGKILL)
    result: dict[str, Any] = {way: round(statistics.median(f.ratios), 4) for way, f in found.items()}
    result["spread"] = {way: quartiles(f.ratios) for way, f in found.items()}
    result["noise"] = quartiles(noise)
    result["blocked"] = {way: round(statistics.mean(t.calls) / options.epoch_s, 5) for way, t in ways.items()}
    result["cpu"] = {way: round(statistics.median(f.cpu), 4) for way, f in found.items()}
    result["server_cpu"] = round(statistics.median(served), 4)
    calls = [1000 * call for tracked in ways.values() for call in tracked.calls]
    return result | {"call_ms": [round(statistics.median(calls), 2), round(max(calls), 2)], "epoch_s": options.epoch_s}


def untracked(number: int, epoch: int) -> None:
    """No tracking."""


def quartiles(values: list[float]) -> list[float]:
    """First and third."""
    first, third = np.quantile(values, [0.25, 0.75])
    return [round(float(first), 4), round(float(third), 4)]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=6, help="of each stretch")
    parser.add_argument("--epoch-s", type=float, default=1, help="length of an epoch")
    parser.add_argument("--pause-s", type=float, default=1.5, help="after a way, for its uploads to end")
    parser.add_argument("--settle-s", type=float, default=10, help="for the first contact with the servers")
    logging.disable(logging.WARNING)
    with tempfile.TemporaryDirectory() as temporary:
        print(json.dumps(measure(parser.parse_args(), Path(temporary))))
