"""CPU kernel of `sampler`: who wins the race of tokens."""

from __future__ import annotations

import math

import numpy as np
from numba.extending import register_jitable

from dovetail.numerics.cpu.kernels import serial_kernel


@register_jitable
def mixed(x):  # type: ignore[no-untyped-def]
    """64 bits that look random [Steele, Lea, Flood 2014: SplitMix64]."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


@serial_kernel
def first(distribution, seed, position):  # type: ignore[no-untyped-def]
    """The token i for which E_i / distribution[i] is smallest, E_i = -log(u_i), u_i in (0, 1) with 53 random bits.
    Token 0 where no probability is above 0: those of logits that are no numbers."""
    key = mixed(mixed(np.uint64(seed)) ^ np.uint64(position))
    winner, best = 0, np.inf
    for i in range(len(distribution)):
        if distribution[i] > 0:
            bits = mixed(key ^ mixed(np.uint64(i))) >> np.uint64(11)
            time = -math.log((np.float64(bits) + 0.5) * 2.0**-53) / distribution[i]
            if time < best:
                winner, best = i, time
    return winner
