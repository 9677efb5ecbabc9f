"""Cuts products of groups into blocks that threads take as they get free."""

from __future__ import annotations

import numpy as np
from numba.extending import register_jitable


@register_jitable
def list_tasks(sizes, rows, columns):  # type: ignore[no-untyped-def]
    """(group, first row, first and last column) of blocks of c [m, n], `rows` x `columns`; sizes [G, 3]: m, n, k."""
    tasks = []
    for g in range(len(sizes)):
        for row in range(0, sizes[g, 0], rows):
            for column in range(0, sizes[g, 1], columns):
                end = min(column + columns, sizes[g, 1])
                tasks.append((np.int64(g), np.int64(row), np.int64(column), np.int64(end)))
    return tasks
