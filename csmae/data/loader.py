"""Loads batches from a split: which pairs, in which order, and one thread that reads ahead."""

from __future__ import annotations

import queue
import threading
from collections.abc import Generator, Iterable

import numpy as np
import torch
from numpy.typing import NDArray

from csmae.data.errors import ArchiveError
from csmae.data.pairs import Buffer, PairBatch, allocate
from csmae.data.split import Split

Rows = NDArray[np.int64]

_NUM_BUFFERS = 3
"""One in use by the consumer, one ready, one being filled."""


def epoch_rows(
    num_pairs: int, batch_size: int, seed: int, epoch: int, rank: int = 0, world_size: int = 1
) -> list[Rows]:
    """Return the pairs of each training step of an epoch on one rank.

    Args:
        num_pairs: Pairs of the split.
        batch_size: Pairs of a step over all ranks; must be divisible by ``world_size``.
        seed, epoch: Determine the order; nothing else does.
        rank, world_size: Each rank receives an equal part of each step's pairs.

    Returns:
        For each step, rows of the split (batch_size / world_size,). Each pair occurs at most once: the last pairs of the
        permutation are dropped if they do not fill a step.

    Raises:
        ArchiveError: There are fewer pairs than a step needs, or the ranks cannot share a step equally.
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
    """Return the pairs of a whole split in order, distributed over the ranks.

    Args:
        num_pairs: Pairs of the split.
        batch_size: Largest batch of one rank.
        rank, world_size: Each rank receives a contiguous part; parts differ by at most one pair.

    Returns:
        Rows of the split for each batch.
    """
    part = np.array_split(np.arange(num_pairs), world_size)[rank]
    return [part[start : start + batch_size] for start in range(0, len(part), batch_size)]


def batches(split: Split, rows: Iterable[Rows], device: torch.device | str = "cpu") -> Generator[PairBatch, None, None]:
    """Yield batches that one thread reads ahead into reused memory.

    Args:
        split: Source of the pairs.
        rows: Rows of the split for each batch.
        device: The device that the batches are copied to. For a CUDA device the memory is page-locked and reused only after
            asynchronous copies on the device's current stream have finished.

    Yields:
        A batch, valid until the next one is requested.

    Raises:
        ArchiveError: A pair is damaged, see ``Split.fill``.
    """
    rows, device = list(rows), torch.device(device)
    pin = device.type == "cuda"
    if pin and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())  # of this thread; the loader's thread has another
    max_pairs = max((len(batch) for batch in rows), default=0)
    free: queue.Queue[tuple[Buffer, torch.cuda.Event | None] | None] = queue.Queue()
    ready: queue.Queue[Buffer | BaseException] = queue.Queue()
    for _ in range(min(_NUM_BUFFERS, len(rows))):
        free.put((allocate(max_pairs, split.sensors, pin), None))
    thread = threading.Thread(
        target=_read_ahead, args=(split, rows, device, free, ready), name="csmae-loader", daemon=True
    )
    thread.start()
    try:
        for batch in rows:
            buffer = ready.get()
            if isinstance(buffer, BaseException):
                raise buffer
            yield buffer.batch.select(slice(len(batch)))
            free.put((buffer, _record_copies(device) if pin else None))
    finally:
        free.put(None)
        thread.join()


def _read_ahead(
    split: Split,
    rows: list[Rows],
    device: torch.device,
    free: queue.Queue[tuple[Buffer, torch.cuda.Event | None] | None],
    ready: queue.Queue[Buffer | BaseException],
) -> None:
    """Fill free buffers, in a thread; an error is passed to the consumer in place of a buffer."""
    try:
        if not rows:
            return
        if device.type == "cuda":
            # A new thread uses GPU 0: waiting there would allocate memory, and fails if the event is of another GPU.
            torch.cuda.set_device(device)
        split.prefetch(rows[0])
        for batch, following in zip(rows, [*rows[1:], rows[0][:0]], strict=True):
            item = free.get()
            if item is None:
                return
            buffer, copies = item
            if copies is not None:
                copies.synchronize()
            split.prefetch(following)
            split.fill(batch, buffer)
            ready.put(buffer)
    except BaseException as error:
        ready.put(error)


def _record_copies(device: torch.device) -> torch.cuda.Event:
    """Record an event after the copies that were issued so far."""
    event: torch.cuda.Event = torch.cuda.current_stream(device).record_event()
    return event
