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

    Raises:
        MemoryLimitError: An earlier attempt ran out of memory with one pair.
    """

    def __init__(self, config: Config, world_size: int, run_dir: Path | None) -> None:
        self._config, self._path = config, run_dir / FILE if run_dir else None
        share = config.optim.batch_size // world_size
        self.micro_batch = min(config.optim.micro_batch_size or share, share)
        if self._path and self._path.exists():
            self.micro_batch = min(self.micro_batch, int(self._path.read_text()))
        self.check()

    def halve(self) -> None:
        """Halve after a step that ran out of memory; of one pair nothing is left, which ``check`` reports."""
        self.micro_batch //= 2
        if self.micro_batch:
            log.warning("out of memory: repeating the step with micro-batches of %d pairs", self.micro_batch)
        if self._path:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            temporary = self._path.with_name(f".{FILE}.tmp")
            temporary.write_text(str(self.micro_batch))
            temporary.replace(self._path)

    def check(self) -> None:
        """Make sure that there is a size left to try.

        Raises:
            MemoryLimitError: One pair was too many.
        """
        if self.micro_batch:
            return
        needed = cost(self._config)
        noted = f" (noted in {self._path}; remove it to try again)" if self._path else ""
        raise MemoryLimitError(
            f"out of memory with one pair at a time: the configuration has {needed.params / 1e6:.1f} M parameters and "
            f"keeps about {needed.activation_bytes / 2**20:.0f} MiB a pair: choose a smaller model or larger patches{noted}"
        )
