"""The micro-batch: how many pairs one forward pass takes, and how it shrinks when memory runs out."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from csmae.atomic import atomic_write
from csmae.config import Config, ConfigError
from csmae.model.cost import FLOAT32_BYTES, cost
from csmae.out_of_memory import is_out_of_memory

FILE = "micro_batch"
"""File in the run's folder that limits the micro-batch of later attempts."""

FLOATS_PER_PARAMETER = 4
"""A parameter, its gradient and AdamW's two moments."""

log = logging.getLogger(__name__)


class MemoryLimitError(ConfigError):
    """The device has too little memory for any micro-batch."""


class SmallerMicroBatchError(RuntimeError):
    """A rank ran out of memory inside a step: all ranks must resume from the last checkpoint.

    Raised on the rank that ran out of memory, after it has saved the smaller micro-batch in the run's folder.

    Args:
        micro_batch: Pairs to try next, at least one.
    """

    def __init__(self, micro_batch: int) -> None:
        super().__init__(
            f"out of memory: the training resumes from its last checkpoint with micro-batches of {micro_batch} pairs"
        )
        self.micro_batch = micro_batch

    def __reduce__(self) -> tuple[type[SmallerMicroBatchError], tuple[int]]:
        return type(self), (self.micro_batch,)


class MicroBatch:
    """The number of pairs in a forward pass of one rank. The global batch does not depend on it.

    Args:
        config: Gives the initial size.
        world_size: Ranks that share a global batch.
        run_dir: Keeps a reduced size for later attempts, if given.
    """

    def __init__(self, config: Config, world_size: int, run_dir: Path | None) -> None:
        self._config, self._run_dir = config, run_dir
        pairs_per_rank = config.optim.batch_size // world_size
        self.size = min(config.optim.micro_batch_size or pairs_per_rank, pairs_per_rank)
        limit = read_micro_batch_limit(run_dir) if run_dir else None
        if limit is not None:
            self.size = min(self.size, limit)

    def halve(self) -> None:
        """Halve the size after a step ran out of memory, and save it as limit.

        Raises:
            MemoryLimitError: The size was one pair.
        """
        self.size //= 2
        if self._run_dir:
            save_micro_batch_limit(self._run_dir, self.size)
        self.validate()

    def validate(self) -> None:
        """Check that a size is left to try.

        Raises:
            MemoryLimitError: One pair was too much.
        """
        if self.size:
            return
        needed = cost(self._config)
        hint = f" (saved in {self._run_dir / FILE}; remove it to try again)" if self._run_dir else ""
        raise MemoryLimitError(
            f"out of memory with one pair at a time: the configuration has {needed.params / 1e6:.1f} M parameters and "
            f"keeps about {needed.activation_bytes / 2**20:.0f} MiB per pair: choose a smaller model or larger patches{hint}"
        )


def read_micro_batch_limit(run_dir: Path) -> int | None:
    """The limit that an earlier attempt saved, if any."""
    try:
        text = (run_dir / FILE).read_text()
    except FileNotFoundError:
        return None
    return int(text) if text.isdigit() else None


def save_micro_batch_limit(run_dir: Path, micro_batch: int) -> None:
    """Limit the micro-batch of later attempts; a smaller limit stays. Several ranks may save at the same time."""
    limit = read_micro_batch_limit(run_dir)
    if limit is not None and limit <= micro_batch:
        return
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        with atomic_write(run_dir / FILE, concurrent=True) as file:
            file.write(str(micro_batch).encode())
    except OSError as error:  # only the next attempt will miss it
        log.warning("%s: cannot be written: %s", run_dir / FILE, error.strerror)


def weights_must_fit(config: Config) -> AbstractContextManager[None]:
    """Explain an out-of-memory error while only weights and optimizer state are in memory.

    Raises:
        MemoryLimitError: The memory is too small.
    """
    params = cost(config).params
    mib = params * FLOAT32_BYTES * FLOATS_PER_PARAMETER / 2**20
    return _explain_out_of_memory(
        f"out of memory before the first step: the configuration has {params / 1e6:.1f} M parameters, which take"
        f" {mib:.0f} MiB with gradients and AdamW's moments: choose a smaller model"
    )


def scores_must_fit(num_pairs: int) -> AbstractContextManager[None]:
    """Explain an out-of-memory error while the validation pairs are scored.

    Raises:
        MemoryLimitError: The memory is too small.
    """
    return _explain_out_of_memory(
        f"out of memory while scoring {num_pairs} validation pairs, one pair at a time: lower eval.max_pairs, or choose a"
        " smaller model"
    )


@contextmanager
def _explain_out_of_memory(message: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise MemoryLimitError(message) from error
