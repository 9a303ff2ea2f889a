"""Batches from a split: which pairs, in which order, and one thread that reads ahead."""

from __future__ import annotations

import queue
import threading
from collections.abc import Generator, Iterable

import numpy as np
import torch
from numpy.typing import NDArray

from csmae.data.formats.layout import ArchiveError
from csmae.data.pairs import Buffer, PairBatch, allocate
from csmae.data.split import Split

Rows = NDArray[np.int64]

_NUM_BUFFERS = 3
"""One with the consumer, one ready, one being filled."""


def epoch_rows(
    num_pairs: int, batch_size: int, seed: int, epoch: int, rank: int = 0, world_size: int = 1
) -> list[Rows]:
    """The pairs of each training step of an epoch, on one rank.

    Args:
        num_pairs: Of the split.
        batch_size: Pairs a step over all ranks; ``world_size`` divides it.
        seed, epoch: All that the order depends on.
        rank, world_size: A rank takes its share of each step's pairs.

    Returns:
        For each step, indices into the split (batch_size / world_size,). Each pair comes at most once: the last pairs
        of the permutation, too few for a step, are left out.

    Raises:
        ArchiveError: There are fewer pairs than a step needs, or they cannot be shared evenly.
    """
    if batch_size % world_size:
        raise ArchiveError(
            f"the number of workers must divide optim.batch_size: {world_size} does not divide {batch_size}"
        )
    num_steps = num_pairs // batch_size
    if not num_steps:
        raise ArchiveError(
            f"optim.batch_size must be at most the number of training pairs: {batch_size} of {num_pairs}"
        )
    order = np.random.default_rng((seed, epoch)).permutation(num_pairs)[: num_steps * batch_size]
    return list(order.reshape(num_steps, world_size, -1)[:, rank])


def sequential_rows(num_pairs: int, batch_size: int, rank: int = 0, world_size: int = 1) -> list[Rows]:
    """The pairs of a whole split in order, shared by the ranks.

    Args:
        num_pairs: Of the split.
        batch_size: Most pairs of a batch on one rank.
        rank, world_size: A rank takes a contiguous share; shares differ by at most one pair.

    Returns:
        Indices into the split, for each batch.
    """
    share = np.array_split(np.arange(num_pairs), world_size)[rank]
    return [share[start : start + batch_size] for start in range(0, len(share), batch_size)]


def batches(split: Split, rows: Iterable[Rows], device: torch.device | str = "cpu") -> Generator[PairBatch, None, None]:
    """Read batches ahead, in one thread, into memory that is used again and again.

    Args:
        split: Where the pairs come from.
        rows: Indices into the split, for each batch.
        device: Where the batches are copied to. For a CUDA device the memory is page-locked, and asynchronous copies on
            its current stream are waited for before memory is used again.

    Yields:
        A batch, good until the next is asked for.

    Raises:
        ArchiveError: A pair is damaged, see ``Split.fill``.
    """
    rows, device = list(rows), torch.device(device)
    pin = device.type == "cuda"
    if pin and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())  # of this thread: the loader's own has another
    largest = max((len(batch) for batch in rows), default=0)
    free: queue.Queue[tuple[Buffer, torch.cuda.Event | None] | None] = queue.Queue()
    ready: queue.Queue[Buffer | BaseException] = queue.Queue()
    for _ in range(min(_NUM_BUFFERS, len(rows))):
        free.put((allocate(largest, split.sensors, pin), None))
    thread = threading.Thread(target=_fill, args=(split, rows, device, free, ready), name="csmae-loader", daemon=True)
    thread.start()
    try:
        for batch in rows:
            buffer = ready.get()
            if isinstance(buffer, BaseException):
                raise buffer
            yield buffer.head(len(batch))
            free.put((buffer, _copies_until_now(device) if pin else None))
    finally:
        free.put(None)
        thread.join()


def _fill(
    split: Split,
    rows: list[Rows],
    device: torch.device,
    free: queue.Queue[tuple[Buffer, torch.cuda.Event | None] | None],
    ready: queue.Queue[Buffer | BaseException],
) -> None:
    try:
        if not rows:
            return
        if device.type == "cuda":
            # A thread begins with GPU 0: waiting would take memory there, and may fail where the event is another GPU's.
            torch.cuda.set_device(device)
        split.expect(rows[0])
        for batch, following in zip(rows, [*rows[1:], rows[0][:0]], strict=True):
            item = free.get()
            if item is None:
                return
            buffer, copies = item
            if copies is not None:
                copies.synchronize()
            split.expect(following)
            split.fill(batch, buffer)
            ready.put(buffer)
    except BaseException as error:
        ready.put(error)


def _copies_until_now(device: torch.device) -> torch.cuda.Event:
    event: torch.cuda.Event = torch.cuda.current_stream(device).record_event()
    return event
