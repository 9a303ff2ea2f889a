"""How many pairs go through the network at once, and what to do when they are too many."""

from __future__ import annotations

import logging
from pathlib import Path

from csmae.config import Config, ConfigError
from csmae.model.cost import cost

FILE = "micro_batch"

log = logging.getLogger(__name__)


class MemoryLimitError(ConfigError):
    """Not even one pair fits into the device's memory."""


class MicroBatch:
    """The pairs of one forward pass on one rank; the global batch stays what it is.

    Args:
        config: Says the size to begin with.
        world_size: Ranks that share a global batch.
        run_dir: Keeps a size found too large for the next attempt, where given.
    """

    def __init__(self, config: Config, world_size: int, run_dir: Path | None) -> None:
        self._config, self._path = config, run_dir / FILE if run_dir else None
        self.micro_batch = config.optim.micro_batch_size or config.optim.batch_size // world_size
        if self._path and self._path.exists():
            self.micro_batch = min(self.micro_batch, int(self._path.read_text()))

    def halve(self) -> None:
        """Halve after a step that ran out of memory.

        Raises:
            MemoryLimitError: It was one pair already.
        """
        if self.micro_batch == 1:
            needed = cost(self._config)
            raise MemoryLimitError(
                f"out of memory with one pair at a time: the configuration has {needed.params / 1e6:.1f} M parameters "
                f"and keeps about {needed.activation_bytes / 2**20:.0f} MiB a pair: choose a smaller model or larger patches"
            )
        self.micro_batch //= 2
        log.warning("out of memory: going on with micro-batches of %d pairs, the same global batch", self.micro_batch)
        if self._path:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._path.write_text(str(self.micro_batch))
