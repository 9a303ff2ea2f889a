"""Optimizers of NePS, with its ask-and-tell interface and default settings."""

from __future__ import annotations

import logging
import random
from collections.abc import Hashable
from typing import Any

import neps
import numpy as np
import torch
from curves.clock import Ending, Piece
from curves.tables import Table
from neps.space import HPOFloat, HPOInteger, SearchSpace

OPTIMIZERS: dict[str, Any] = {
    "neps priorband": neps.algorithms.priorband,
    "neps async hyperband": neps.algorithms.async_hb,
}

UNTIL = "epochs"
"""Name of the fidelity."""


class Neps:
    """An optimizer of NePS, which promotes trials from their checkpoints. It has no seed of its own."""

    def __init__(self, name: str, table: Table, seed: int, workers: int) -> None:
        logging.getLogger("neps").setLevel(logging.ERROR)
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        torch.set_num_threads(1)
        axes = zip(table.names, table.bounds, table.log, strict=True)
        space: dict[str, Any] = {name: HPOFloat(low, high, log=bool(log)) for name, (low, high), log in axes}
        space[UNTIL] = HPOInteger(1, table.epochs, is_fidelity=True)
        self._optimizer = neps.AskAndTell(OPTIMIZERS[name](SearchSpace(space)))
        self._names = table.names
        self._asked: dict[str, str] = {}
        """By trial, the name under which NePS knows its present piece."""
        self._losses: dict[Hashable, float] = {}
        self._diverged: set[str] = set()

    def ask(self) -> Piece:
        """Start or promote a trial. A promotion of a diverged one fails at no cost."""
        while True:
            asked = self._optimizer.ask()
            key = asked.id.partition("_rung_")[0]
            if key not in self._diverged:
                break
            self._optimizer.tell(asked.id, ValueError("diverged"))
        new = key not in self._asked
        self._asked[key] = asked.id
        point = {name: float(asked.config[name]) for name in self._names} if new else None
        return Piece(key, int(asked.config[UNTIL]), point)

    def report(self, key: Hashable, epoch: int, loss: float) -> bool:
        """Keep the loss until the piece ends."""
        self._losses[key] = loss
        return True

    def end(self, key: Hashable, epoch: int, ending: Ending) -> None:
        """Tell the last loss, or that the trial failed."""
        assert isinstance(key, str)
        if ending is Ending.DIVERGED:
            self._diverged.add(key)
        result: Any = ValueError("diverged") if ending is Ending.DIVERGED else self._losses[key]
        self._optimizer.tell(self._asked[key], result)
