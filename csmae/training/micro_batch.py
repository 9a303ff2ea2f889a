"""How many pairs go through the network at once, and what to do when they are too many."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from csmae.atomic import atomic_write
from csmae.config import Config, ConfigError
from csmae.model.cost import cost
from csmae.out_of_memory import is_out_of_memory

FILE = "micro_batch"

ADAMW_FLOATS = 4
"""Floats that a parameter takes: itself, its gradient, two moments."""

log = logging.getLogger(__name__)


class MemoryLimitError(ConfigError):
    """The device's memory is too small, whatever the micro-batch."""


class SmallerMicroBatchError(RuntimeError):
    """The memory was too small in the middle of a step: all ranks must go on from the last checkpoint.

    The smaller micro-batch is noted in the run's folder. Raised on the rank whose memory was too small.

    Args:
        micro_batch: Pairs to try next, at least one.
    """

    def __init__(self, micro_batch: int) -> None:
        super().__init__(
            f"out of memory: the training goes on from its last checkpoint with micro-batches of {micro_batch} pairs"
        )
        self.micro_batch = micro_batch

    def __reduce__(self) -> tuple[type[SmallerMicroBatchError], tuple[int]]:
        return type(self), (self.micro_batch,)


class MicroBatch:
    """The pairs of one forward pass on one rank; the global batch stays what it is.

    Args:
        config: Says the size to begin with.
        world_size: Ranks that share a global batch.
        run_dir: Keeps a size found too large for the next attempt, where given.
    """

    def __init__(self, config: Config, world_size: int, run_dir: Path | None) -> None:
        self._config, self._run_dir = config, run_dir
        share = config.optim.batch_size // world_size
        self.micro_batch = min(config.optim.micro_batch_size or share, share)
        noted = noted_micro_batch(run_dir) if run_dir else None
        if noted is not None:
            self.micro_batch = min(self.micro_batch, noted)

    def halve(self) -> None:
        """Halve after a step that ran out of memory, and note it.

        Raises:
            MemoryLimitError: It was one pair.
        """
        self.micro_batch //= 2
        if self._run_dir:
            note_micro_batch(self._run_dir, self.micro_batch)
        self.check()

    def check(self) -> None:
        """Make sure that there is a size left to try.

        Raises:
            MemoryLimitError: One pair was too many.
        """
        if self.micro_batch:
            return
        needed = cost(self._config)
        noted = f" (noted in {self._run_dir / FILE}; remove it to try again)" if self._run_dir else ""
        raise MemoryLimitError(
            f"out of memory with one pair at a time: the configuration has {needed.params / 1e6:.1f} M parameters and "
            f"keeps about {needed.activation_bytes / 2**20:.0f} MiB a pair: choose a smaller model or larger patches{noted}"
        )


def noted_micro_batch(run_dir: Path) -> int | None:
    """The size that an earlier attempt left, if any."""
    try:
        text = (run_dir / FILE).read_text()
    except FileNotFoundError:
        return None
    return int(text) if text.isdigit() else None


def note_micro_batch(run_dir: Path, micro_batch: int) -> None:
    """Leave a size for the next attempt, unless a smaller one is noted; ranks may do so at the same moment."""
    noted = noted_micro_batch(run_dir)
    if noted is not None and noted <= micro_batch:
        return
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        with atomic_write(run_dir / FILE, concurrent=True) as file:
            file.write(str(micro_batch).encode())
    except OSError as error:  # the training can go on, only the next attempt will not know
        log.warning("%s: cannot be written: %s", run_dir / FILE, error.strerror)


def weights_must_fit(config: Config) -> AbstractContextManager[None]:
    """Explain an error for lack of memory while nothing but weights and the optimiser's state is there.

    Raises:
        MemoryLimitError: The memory is too small.
    """

    def explain() -> str:
        params = cost(config).params
        return (
            f"out of memory before the first step: the configuration has {params / 1e6:.1f} M parameters, which take"
            f" {params * 4 * ADAMW_FLOATS / 2**20:.0f} MiB with gradients and AdamW's moments: choose a smaller model"
        )

    return _must_fit(explain)


def scores_must_fit(num_pairs: int) -> AbstractContextManager[None]:
    """Explain an error for lack of memory while the validation pairs are scored.

    Raises:
        MemoryLimitError: The memory is too small.
    """
    return _must_fit(
        lambda: (
            f"out of memory while {num_pairs} validation pairs were scored, one pair at a time: lower eval.max_pairs, or"
            " choose a smaller model"
        )
    )


@contextmanager
def _must_fit(explain: Callable[[], str]) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise MemoryLimitError(explain()) from error
