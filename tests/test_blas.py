"""numpy's BLAS uses one thread where it would compete with others, and keeps its setting."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from threadpoolctl import threadpool_info, threadpool_limits

from csmae.blas import single_threaded_blas
from csmae.data.transforms import Resize


def num_threads() -> set[int]:
    """Threads of numpy's own BLAS; scipy brings another one."""
    return {lib["num_threads"] for lib in threadpool_info() if "numpy" in lib["filepath"] and lib["user_api"] == "blas"}


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    with threadpool_limits(2, "blas"):
        assert num_threads() == {2}
        yield


def test_resizing_on_a_cpu_uses_one_thread_and_restores_the_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    used, matmul = set[int](), np.matmul

    def record(*arguments: Any, **options: Any) -> Any:
        used.update(num_threads())
        return matmul(*arguments, **options)

    monkeypatch.setattr(np, "matmul", record)
    Resize(120, 60)(torch.rand(1, 2, 120, 120, dtype=torch.float64))
    assert used == {1}
    assert num_threads() == {2}


def test_overlapping_threads_leave_the_setting_as_it_was() -> None:
    both_entered, first_left = threading.Barrier(2), threading.Event()

    def first() -> None:
        with single_threaded_blas():
            both_entered.wait(10)
        first_left.set()

    def last() -> None:
        with single_threaded_blas():
            both_entered.wait(10)
            assert first_left.wait(10)

    with ThreadPoolExecutor(2) as pool:
        futures = pool.submit(first), pool.submit(last)
        for future in futures:
            future.result()
    assert num_threads() == {2}
