"""The fastest products of packed BF16 operands that this CPU has, under one set of names.

Which they are depends on what numba compiles for, and on nothing else: it is the same in each process of a machine.
"""

from __future__ import annotations

from dovetail.numerics import capability

if capability.has_tiles():
    from dovetail.numerics.panels.amx_panels_numba import (
        float_product,
        give_tiles,
        left_size,
        pack_left,
        pack_right,
        panel_size,
        product,
        right_size,
        take_tiles,
    )
else:
    from dovetail.numerics.panels.vectors_numba import (
        float_product,
        give_tiles,
        left_size,
        pack_left,
        pack_right,
        panel_size,
        product,
        right_size,
        take_tiles,
    )

__all__ = [
    "float_product",
    "give_tiles",
    "left_size",
    "pack_left",
    "pack_right",
    "panel_size",
    "product",
    "right_size",
    "take_tiles",
]
