"""`both` of `invariant_numba` with AMX tiles.

Few rows of activations are multiplied by `amx_rows_numba`, many by `amx_grouped_numba`, to the same bits.
"""

from __future__ import annotations

import numpy as np
from numba import prange
from numba.extending import register_jitable

from dovetail.numerics.cpu.kernels import kernel
from dovetail.numerics.cpu.tiles_numba import take_next
from dovetail.numerics.panels.amx_grouped_numba import grouped_gemm
from dovetail.numerics.panels.amx_numba import give_tiles, take_tiles
from dovetail.numerics.panels.amx_panels_numba import right_size
from dovetail.numerics.panels.amx_rows_numba import multiply_few, pack_activations

FEW = 64  # rows with which reading the weights takes longer than multiplying by them
MANY = 64  # rows of a group, in the mean, from which on weights are packed
BLOCK = 64  # columns of a result that a thread takes at a time


@register_jitable
def _multiply_many(x, weight, used, bounds, out, threads):  # type: ignore[no-untyped-def]
    n, k = weight.shape[1:]
    starts, sizes = np.empty((len(used), 3), np.int64), np.empty((len(used), 3), np.int64)
    strides = np.array([k, k, n])
    for i in range(len(used)):
        starts[i, 0], starts[i, 1], starts[i, 2] = bounds[i] * k, used[i] * n * k, bounds[i] * n
        sizes[i, 0], sizes[i, 1], sizes[i, 2] = bounds[i + 1] - bounds[i], n, k
    flat, flat_weight, flat_out = x.reshape(-1), weight.reshape(-1), out.reshape(-1)
    grouped_gemm(flat, flat_weight, flat_out, starts, sizes, strides, True, True, threads)


@register_jitable
def _multiply_block(x, first, rows, weight, group, block, out, packed, is_packed):  # type: ignore[no-untyped-def]
    n, k = weight.shape[1:]
    if not is_packed:
        pack_activations(x.reshape(-1), first * k, k, rows, packed)
    begin = block * BLOCK
    at, to, columns = (group * n + begin) * k, first * n + begin, min(BLOCK, n - begin)
    multiply_few(packed, rows, weight.reshape(-1), at, columns, k, out.reshape(-1), to, n)


@kernel
def both(x, weight, used, bounds, out, y, second, second_out, threads):  # type: ignore[no-untyped-def]
    """As `invariant_numba.both` has it."""
    few_x, few_y = len(x) < MANY * len(used), len(y) < MANY
    blocks = (weight.shape[1] + BLOCK - 1) // BLOCK if few_x else 0
    others = (second.shape[1] + BLOCK - 1) // BLOCK if few_y and len(y) else 0
    if len(x) and not few_x:
        _multiply_many(x, weight, used, bounds, out, threads)
    if len(y) and not few_y:
        whole = np.zeros(2, np.int64)
        whole[1] = len(y)
        _multiply_many(y, second, np.zeros(1, np.int64), whole, second_out, threads)
    most = 0
    for i in range(len(used)):
        most = max(most, bounds[i + 1] - bounds[i])
    size = max(right_size(weight.shape[2], most) if blocks else 0, right_size(second.shape[2], len(y)) if others else 0)
    tasks, counter = others + len(used) * blocks, np.zeros(1, np.int64)
    is_few = len(x) + len(y) <= FEW  # then each thread reads weights that lie together
    for thread in prange(threads if tasks else 0):
        take_tiles()
        packed, held = np.empty(size, np.uint32), -2
        task, stop = thread * tasks // threads, (thread + 1) * tasks // threads
        if not is_few:
            task, stop = take_next(counter), tasks
        while task < stop:
            if task < others:
                _multiply_block(y, 0, len(y), second, 0, task, second_out, packed, held == -1)
                held = -1
            else:
                i, block = (task - others) // blocks, (task - others) % blocks
                rows = bounds[i + 1] - bounds[i]
                _multiply_block(x, bounds[i], rows, weight, used[i], block, out, packed, held == i)
                held = i
            task = task + 1 if is_few else take_next(counter)
        give_tiles()
