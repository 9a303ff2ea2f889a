"""Batches: a permutation that depends only on seed and epoch, distributed over the ranks, read ahead by one thread."""

import ctypes
import mmap
import os
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from csmae.config import ConfigError, Data, Synthetic
from csmae.data import loader
from csmae.data.archive import open_archive
from csmae.data.errors import DamagedValueError
from csmae.data.loader import batches, epoch_rows, sequential_rows
from csmae.data.pairs import allocate
from csmae.data.split import Split
from csmae.data.synthetic.archive import synthesize
from tests.support.archives import names_of, open_folder, put, write_v2

SIZES = st.tuples(st.integers(1, 5), st.integers(1, 6), st.integers(0, 60))
"""Ranks, pairs of a rank's batch, pairs beyond the first step."""


@pytest.fixture(scope="module")
def split() -> Split:
    return open_archive(Data(synthetic=Synthetic(num_train=40, num_validation=2, num_test=2))).split("train")


@given(sizes=SIZES, seed=st.integers(0, 2**40), epoch=st.integers(0, 1000))
def test_ranks_partition_each_step_of_an_epoch(sizes: tuple[int, int, int], seed: int, epoch: int) -> None:
    world_size, local, extra = sizes
    batch_size = world_size * local
    num_pairs = batch_size + extra
    ranks = [epoch_rows(num_pairs, batch_size, seed, epoch, rank, world_size) for rank in range(world_size)]
    whole = epoch_rows(num_pairs, batch_size, seed, epoch)
    assert all(len(rows) == num_pairs // batch_size for rows in ranks)
    for step, rows in enumerate(whole):
        assert np.array_equal(np.concatenate([rank[step] for rank in ranks]), rows)
    used = np.concatenate(whole)
    assert len(np.unique(used)) == len(used) == num_pairs // batch_size * batch_size
    assert used.min() >= 0 and used.max() < num_pairs


def test_the_order_depends_only_on_seed_and_epoch() -> None:
    first = np.concatenate(epoch_rows(1000, 10, 0, 1))
    np.random.default_rng(9).random(5)
    torch.rand(3)
    assert np.array_equal(first, np.concatenate(epoch_rows(1000, 10, 0, 1)))
    for seed, epoch in ((0, 2), (1, 1), (1, 0)):
        assert not np.array_equal(first, np.concatenate(epoch_rows(1000, 10, seed, epoch)))


@given(num_pairs=st.integers(0, 200), batch_size=st.integers(1, 50), world_size=st.integers(1, 7))
def test_sequential_rows_visit_every_pair_once_in_order(num_pairs: int, batch_size: int, world_size: int) -> None:
    ranks = [sequential_rows(num_pairs, batch_size, rank, world_size) for rank in range(world_size)]
    visited = [row for rows in ranks for batch in rows for row in batch.tolist()]
    assert visited == list(range(num_pairs))
    assert all(0 < len(batch) <= batch_size for rows in ranks for batch in rows)


@pytest.mark.parametrize(("batch_size", "world_size", "message"), [(9, 2, "does not divide 9"), (41, 1, "41 of 40")])
def test_an_impossible_batch_size_is_rejected(batch_size: int, world_size: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        epoch_rows(40, batch_size, 0, 0, 0, world_size)


def test_a_batch_is_valid_until_the_next_is_requested(split: Split) -> None:
    rows = [np.array([3, 1]), np.array([0]), np.array([5, 4]), np.array([2, 2]), np.array([7])]
    for row, batch in zip(rows, batches(split, rows), strict=True):
        again = split.read(row)
        assert all(torch.equal(loaded, read) for loaded, read in zip(batch, again, strict=True))


def test_zero_batches_are_not_an_error(split: Split) -> None:
    assert list(batches(split, [])) == []


def test_one_thread_reads_and_ends_with_the_loop(split: Split) -> None:
    before = threading.active_count()
    loaded = batches(split, epoch_rows(40, 4, 0, 0))
    next(loaded)
    assert threading.active_count() == before + 1
    loaded.close()
    assert threading.active_count() == before


def test_an_error_of_the_thread_is_raised_in_the_loop(tmp_path: Path) -> None:
    put(write_v2(tmp_path), {names_of(2).v2: b"damaged"})
    loaded = batches(open_folder(tmp_path).split("train"), [np.array([0, 1]), np.array([2]), np.array([3])])
    next(loaded)
    with pytest.raises(DamagedValueError, match=names_of(2).v2):
        next(loaded)
    assert threading.active_count() == 1 or all(t.name != "csmae-loader" for t in threading.enumerate())


def anonymous_mb() -> float:
    """Return this process's memory without pages of mapped files, which the system can reclaim."""
    status = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["RssAnon"].split()[0]) / 1e3


def num_open_files() -> int:
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="resident memory is read from /proc")
def test_memory_and_open_files_stay_flat_over_20_epochs(split: Split) -> None:
    def epoch(number: int) -> None:
        for _ in batches(split, epoch_rows(len(split), 8, 0, number)):
            pass

    for number in range(3):
        epoch(number)
    memory, files = anonymous_mb(), num_open_files()
    for number in range(20):
        epoch(number)
    assert anonymous_mb() - memory < 8
    assert num_open_files() == files


def cached_bytes(file: Path) -> int:
    """Return how much of a file is in the system's cache."""
    size = file.stat().st_size
    with file.open("rb") as opened, mmap.mmap(opened.fileno(), 0, mmap.MAP_PRIVATE) as content:
        pages = (ctypes.c_ubyte * -(-size // mmap.PAGESIZE))()
        start = ctypes.addressof(anchor := ctypes.c_char.from_buffer(content))
        found = ctypes.CDLL(None).mincore(ctypes.c_void_p(start), ctypes.c_size_t(size), pages)
        del anchor
    assert found == 0
    return sum(page & 1 for page in pages) * mmap.PAGESIZE


@pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="the system has no read hints")
def test_reading_a_few_pairs_of_an_uncached_file_caches_no_others(tmp_path: Path) -> None:
    """Otherwise an archive larger than the memory would be read several times per epoch."""
    synthesize(Synthetic(num_train=192, num_validation=1, num_test=1), tmp_path / "a")
    file = tmp_path / "a/archive.lmdb/data.mdb"
    with file.open("rb") as opened:
        os.fsync(opened.fileno())
        os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    if cached_bytes(file) > 2e6:
        pytest.skip("this file system keeps its files in memory")
    split = open_folder(tmp_path / "a").split("train")
    before = cached_bytes(file)
    rows = [np.array([5, 90]), np.array([150])]
    assert [len(batch.s1) for batch in batches(split, rows)] == [2, 1]
    assert split.read([40]).s2_10m.any()
    needed = 4 * sum(tensor[0].nbytes for tensor in split.read([40]))
    assert needed <= cached_bytes(file) - before + 1e5 < 2 * needed


def test_a_split_outlives_the_deletion_of_its_file(tmp_path: Path) -> None:
    split = open_folder(write_v2(tmp_path)).split("test")
    before = split.read([0]).s1.clone()
    for file in tmp_path.glob("*.lmdb/*"):
        file.unlink()
    assert torch.equal(split.read([0]).s1, before)


class RecordingEvent:
    """Replaces a CUDA event; records which thread waited for it."""

    def __init__(self, calls: list[tuple[str, object]]) -> None:
        self.calls = calls

    def synchronize(self) -> None:
        self.calls.append(("wait", threading.current_thread().name))


def test_the_thread_selects_the_gpu_before_it_waits_for_copies(split: Split, monkeypatch: pytest.MonkeyPatch) -> None:
    """A new thread uses GPU 0, whichever GPU its parent uses."""
    calls: list[tuple[str, object]] = []
    monkeypatch.setattr(loader, "allocate", lambda num_pairs, sensors, pin: allocate(num_pairs, sensors))  # no GPU here
    monkeypatch.setattr(
        torch.cuda, "set_device", lambda device: calls.append((threading.current_thread().name, device))
    )
    monkeypatch.setattr(loader, "_record_copies", lambda *device: RecordingEvent(calls))
    assert len(list(batches(split, epoch_rows(40, 4, 0, 0), "cuda:1"))) == 10
    assert calls[0] == ("csmae-loader", torch.device("cuda:1"))
    assert set(calls[1:]) == {("wait", "csmae-loader")}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_pinned_batches_survive_asynchronous_copies(split: Split) -> None:
    rows = epoch_rows(40, 4, 0, 0)
    copies = [batch.to("cuda", non_blocking=True) for batch in batches(split, rows, "cuda")]
    for row, copy in zip(rows, copies, strict=True):
        assert torch.equal(copy.s1.cpu(), split.read(row).s1)
