"""Threads that wait for one that computes no more are ended, and what computes after it gets the same bits."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable
from pathlib import Path

import numba
import pytest
import torch
from torch import Tensor

from dovetail.engine.steps.rows_numba import head
from dovetail.numerics.cpu.kernels import array
from dovetail.numerics.cpu.process import leave_threads

Draw = Callable[..., Tensor]


def computed(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """By torch's threads and by numba's, which are OpenMP's both."""
    logits = torch.empty(len(x), len(weight))
    head(array(x), array(weight), logits.numpy())
    return x @ weight.t(), logits


def num_threads() -> int:
    return len(list(Path("/proc/self/task").iterdir()))


def in_a_thread(function: Callable[[], tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    results: list[tuple[Tensor, Tensor]] = []
    thread = threading.Thread(target=lambda: results.append(function()))
    thread.start()
    thread.join()
    return results[0]


def test_whoever_computes_next_gets_the_same_bits(draw: Draw) -> None:
    """In another thread, and in the same one again."""
    x, weight = draw(64, 300), draw(1000, 300)
    before, count = computed(x, weight), torch.get_num_threads()
    leave_threads()
    after = in_a_thread(lambda: computed(x, weight))
    again = computed(x, weight)
    for mine, theirs, same in zip(before, after, again, strict=True):
        assert torch.equal(mine, theirs) and torch.equal(mine, same)
    assert torch.get_num_threads() == count, "no setting has changed"


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "omp_pause_resource_all"), reason="another kind of OpenMP")
def test_threads_that_wait_are_ended(draw: Draw) -> None:
    torch_threads, numba_threads = torch.get_num_threads(), numba.get_num_threads()
    try:
        torch.set_num_threads(4)
        _ = draw(600, 600) @ draw(600, 600)
        waiting = num_threads()
        leave_threads()
        assert num_threads() <= waiting - 3
    finally:
        torch.set_num_threads(torch_threads)
        numba.set_num_threads(numba_threads)


def test_an_openmp_without_the_call_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda name: object())
    leave_threads()
