"""Where arrays lie in memory changes no bit.

LLVM compiles a loop that stores twice: in vectors, for arrays that lie apart, and one element after the other, for
arrays that may overlap. Here the second way is taken: arrays overlap so that each element is read before it is written,
which gives what arrays that lie apart give, if both ways round alike.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numba.extending import register_jitable

from dovetail.engine.steps import block_numba, rows_numba
from dovetail.numerics.cpu import scalars_numba
from dovetail.numerics.cpu.kernels import serial_kernel

FACTOR = np.float32(1.37)
Place = tuple[int, int, type]  # first byte, elements, kind


@serial_kernel
def scale_row(x, weight, out):  # type: ignore[no-untyped-def]
    scalars_numba.scale_row(x, FACTOR, weight, out)


@serial_kernel
def gated_row(gate, up, out):  # type: ignore[no-untyped-def]
    block_numba.gated_row(gate, up, out)


@serial_kernel
def rotate(x, cos, sin):  # type: ignore[no-untyped-def]
    rows_numba.rotate(x, cos, sin, x)


@serial_kernel
def rotate_row(x, cos, sin, out):  # type: ignore[no-untyped-def]
    rows_numba.rotate(x, cos, sin, out)


@serial_kernel
def add(x, y):  # type: ignore[no-untyped-def]
    block_numba.add(x, y)


@serial_kernel
def weigh_row(total, x):  # type: ignore[no-untyped-def]
    block_numba.weigh_row(total, FACTOR, x)


@register_jitable
def fast(x, cos, sin, out):  # type: ignore[no-untyped-def]
    """The wrong variant: either product may be the one that is rounded."""
    for i in range(len(cos)):
        even, odd = x[2 * i], x[2 * i + 1]
        out[2 * i] = even * cos[i] - odd * sin[i]
        out[2 * i + 1] = even * sin[i] + odd * cos[i]


@serial_kernel
def rotate_row_fast(x, cos, sin, out):  # type: ignore[no-untyped-def]
    fast(x, cos, sin, out)


FP32, BF16 = np.float32, np.uint16
CASES: list[tuple[Callable[..., Any], list[Place]]] = [
    (scale_row, [(8, 203, FP32), (2000, 203, FP32), (0, 203, FP32)]),
    (scale_row, [(8, 203, BF16), (2000, 203, FP32), (0, 203, BF16)]),
    (gated_row, [(8, 203, FP32), (2000, 203, FP32), (0, 203, FP32)]),
    (gated_row, [(8, 203, BF16), (2000, 203, BF16), (0, 203, BF16)]),
    (rotate, [(0, 202, BF16), (8, 101, FP32), (2000, 101, FP32)]),
    (rotate_row, [(8, 202, FP32), (2000, 101, FP32), (3000, 101, FP32), (0, 202, FP32)]),
    (add, [(0, 203, FP32), (8, 203, FP32)]),
    (add, [(0, 203, BF16), (8, 203, BF16)]),
    (weigh_row, [(0, 203, FP32), (410, 203, BF16)]),
]


def results(function: Callable[..., Any], places: list[Place]) -> tuple[np.ndarray, ...]:
    """What is in the array written to, where arrays overlap and where each lies elsewhere."""
    numbers = np.random.default_rng(3).normal(size=8192).astype(np.float32)
    if any(kind == BF16 for _, _, kind in places):  # either half of an FP32 is a BF16 then
        numbers = (numbers.view(np.uint32) >> 16).astype(np.uint16)
    together = [np.frombuffer(numbers.data, kind, count, first) for first, count, kind in places]
    apart = [np.copy(each) for each in together]
    for arrays in (apart, together):
        function(*arrays)
    written = next(number for number, place in enumerate(places) if place[0] == 0)
    return apart[written], together[written]


@pytest.mark.parametrize(("function", "places"), CASES)
def test_arrays_that_overlap_have_the_bits_of_those_that_do_not(function: Any, places: list[Place]) -> None:
    apart, together = results(function, places)
    assert apart.tobytes() == together.tobytes()
    assert len(np.unique(apart)) > 50


def test_fast_arithmetic_would_change_bits() -> None:
    apart, together = results(rotate_row_fast, CASES[5][1])
    assert apart.tobytes() != together.tobytes()
