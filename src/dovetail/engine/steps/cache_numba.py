"""CPU kernels of `stores`: latents to FP8 and back.

An entry is the latent in E4M3, a scale in FP32 for each TILE of it, and the rotary key in BF16. `data` has one as bytes
[., N], `scales` and `halves` are the same memory as FP32 and as 16 bits.
"""

from __future__ import annotations

import numpy as np
from numba import prange

from dovetail.numerics.cpu.kernels import exact_kernel
from dovetail.numerics.cpu.scalars_numba import load, store
from dovetail.numerics.formats.rounding_numba import code_of, scale_of, value_of

TILE = 128


@exact_kernel
def pack(entries, places, data, scales, halves, first_scale, first_half, form):  # type: ignore[no-untyped-def]
    """data[places[r]] = entries[r] [R, latent + rope] BF16."""
    rope = halves.shape[1] - first_half
    latent = entries.shape[1] - rope
    for r in prange(len(entries)):
        row, place = entries[r], places[r]
        for tile in range((latent + TILE - 1) // TILE):
            begin, end = tile * TILE, min((tile + 1) * TILE, latent)
            largest = np.float32(0.0)
            for i in range(begin, end):
                largest = max(largest, abs(load(row, i)))
            scale = scale_of(largest, form, False)
            scales[place, first_scale + tile] = scale
            for i in range(begin, end):
                data[place, i] = code_of(load(row, i) / scale, form)
        for i in range(rope):
            halves[place, first_half + i] = row[latent + i]


@exact_kernel
def unpack(data, scales, halves, first_scale, first_half, places, form, entries):  # type: ignore[no-untyped-def]
    """entries[r] = data[places[r]], in BF16."""
    rope = halves.shape[1] - first_half
    latent = entries.shape[1] - rope
    for r in prange(len(places)):
        row, place = entries[r], places[r]
        for i in range(latent):
            store(row, i, value_of(data[place, i], form) * scales[place, first_scale + i // TILE])
        for i in range(rope):
            row[latent + i] = halves[place, first_half + i]
