"""Products of BF16 matrices that are batch-invariant, with a CPU's BF16 instructions.

A row of a result has the same bits however many rows are computed with it; libraries choose another order of sums for
each number of rows. `dot_tiles_numba` says in which order these are summed, and `amx_rows_numba` in which where the CPU
has AMX tiles.
"""

from __future__ import annotations

import numba
import numpy as np
import torch
from numba import prange
from numba.extending import register_jitable
from torch import Tensor

from dovetail.numerics import capability
from dovetail.numerics.cpu.dot_tiles_numba import multiply, room
from dovetail.numerics.cpu.kernels import array, kernel, serial_kernel
from dovetail.numerics.cpu.tiles_numba import take_next
from dovetail.numerics.panels import amx_invariant_numba

FEW = 64  # rows with which reading the weights takes longer than multiplying by them


@register_jitable
def columns_of(k):  # type: ignore[no-untyped-def]
    """How many columns of a result a thread takes at a time: long rows of activations are read again for each."""
    return 64 if k >= 1024 else 32


@register_jitable
def blocks_of(n, k):  # type: ignore[no-untyped-def]
    return (n + columns_of(k) - 1) // columns_of(k)


@register_jitable
def block_product(x, first, rows, weight, group, block, out):  # type: ignore[no-untyped-def]
    """Columns of one block of `rows` rows of x [P, K] from `first` on, by weight [., N, K] of `group`."""
    n, k = weight.shape[1:]
    begin = block * columns_of(k)
    columns = min(columns_of(k), n - begin)
    flat, lanes = weight.reshape(-1), np.empty(room(rows, columns, k), np.float32)
    at, to = (group * n + begin) * k, first * n + begin
    multiply(x.reshape(-1), first * k, rows, flat, at, columns, k, out.reshape(-1), to, n, lanes)


@kernel
def _both(x, weight, used, bounds, out, y, second, second_out, threads):  # type: ignore[no-untyped-def]
    """Two products in one parallel region.

    `out`: rows bounds[i] : bounds[i + 1] of x [P, K] by weight [., N, K] of group used[i] -> [P, N].
    `second_out`: y [R, L] by second [1, M, L] -> [R, M].
    """
    blocks, others = blocks_of(*weight.shape[1:]), blocks_of(*second.shape[1:])
    tasks, counter = others + len(used) * blocks, np.zeros(1, np.int64)
    is_few = len(x) + len(y) <= FEW  # then each thread reads weights that lie together
    for place in prange(tasks if is_few else threads):
        task = place if is_few else take_next(counter)
        while task < tasks:
            if task < others:
                block_product(y, 0, len(y), second, 0, task, second_out)
            else:
                i, block = (task - others) // blocks, (task - others) % blocks
                block_product(x, bounds[i], bounds[i + 1] - bounds[i], weight, used[i], block, out)
            task = tasks if is_few else take_next(counter)


both = amx_invariant_numba.both if capability.has_tiles() else _both


@register_jitable
def alone(matrix):  # type: ignore[no-untyped-def]
    """As the only one of a group."""
    return matrix.reshape((1, matrix.shape[0], matrix.shape[1]))


@serial_kernel
def linear_into(x, weight, out, threads):  # type: ignore[no-untyped-def]
    """out [R, N], BF16 or FP32, = x [R, K] weight [N, K]^T."""
    nothing, none = np.empty((0, 0), np.uint16), np.empty(0, np.int64)
    none_out = np.empty((0, 0), out.dtype)  # as `out`, or products of one more kind would be compiled
    both(nothing, np.empty((0, 0, 0), np.uint16), none, none, none_out, x, alone(weight), out, threads)


@register_jitable
def linear(x, weight, threads):  # type: ignore[no-untyped-def]
    """x [R, K] weight [N, K]^T -> [R, N] BF16."""
    out = np.empty((len(x), len(weight)), np.uint16)
    linear_into(x, weight, out, threads)
    return out


@register_jitable
def linear_twice(x, weight, y, second, threads):  # type: ignore[no-untyped-def]
    """x [R, K] weight [N, K]^T and y [S, L] second [M, L]^T, in one parallel region."""
    out, second_out = np.empty((len(x), len(weight)), np.uint16), np.empty((len(y), len(second)), np.uint16)
    bounds = np.zeros(2, np.int64)
    bounds[1] = len(x)
    both(x, alone(weight), np.zeros(1, np.int64), bounds, out, y, alone(second), second_out, threads)
    return out, second_out


def product(x: Tensor, weight: Tensor, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """x [R, K] weight [N, K]^T -> [R, N] in BF16 or FP32; both operands are BF16 and contiguous."""
    out = torch.empty(len(x), len(weight), dtype=dtype)
    linear_into(array(x), array(weight), array(out), numba.get_num_threads())
    return out
