"""The order of training samples, a function of the seed and of how many samples were consumed.

Nothing is stored and nothing is drawn in advance. With n samples, position p of training is sample
`permutation(p mod n)` of epoch `p // n`. The permutation of 0 .. n-1 is a Feistel network on the numbers below the
next power of four, applied again and again until the result is below n. So a resumed run, with any number of ranks,
continues with exactly the samples that were next. A shuffle by a generator would need n numbers in memory, and numpy
may change what its generators return.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

NUM_ROUNDS = 8
SMALLEST_HALF = 4  # bits: with 2, some orders of 3 to 5 samples are visibly more frequent than others


def sample_indices(num_samples: int, seed: int, start: int, count: int) -> NDArray[np.int64]:
    """Return the samples at positions `start` .. `start + count - 1` of training, in 0 .. num_samples-1 [count].

    Every epoch (num_samples positions) visits each sample once, in an order of its own. Raises ValueError for no
    samples and for negative numbers.
    """
    if num_samples < 1:
        raise ValueError(f"{num_samples} samples: there is nothing to order; give more text or a shorter sequence")
    if seed < 0 or start < 0 or count < 0:
        raise ValueError(f"seed {seed}, start {start} and count {count} must not be negative")
    positions = np.arange(start, start + count, dtype=np.uint64)
    epochs, values = np.divmod(positions, np.uint64(num_samples))
    keys = scramble(epochs + scramble(np.full(count, seed, dtype=np.uint64)))
    half = max((max(num_samples - 1, 1).bit_length() + 1) // 2, SMALLEST_HALF)
    values = feistel(values, keys, half)
    while (outside := values >= num_samples).any():  # cycle walking: a few rounds on average
        values[outside] = feistel(values[outside], keys[outside], half)
    return values.astype(np.int64)


def rank_slice(count: int, rank: int, world: int) -> slice:
    """Return the part of a batch of `count` samples that `rank` of `world` ranks reads.

    Ranks take consecutive blocks, so their parts one after another are the batch, whatever the number of ranks.
    Raises ValueError if they cannot share the batch evenly.
    """
    if not 0 <= rank < world:
        raise ValueError(f"rank {rank} is outside a world of {world}")
    if count % world:
        raise ValueError(f"a batch of {count} samples cannot be shared evenly by {world} ranks; make it a multiple")
    share = count // world
    return slice(rank * share, (rank + 1) * share)


def feistel(values: NDArray[np.uint64], keys: NDArray[np.uint64], half: int) -> NDArray[np.uint64]:
    """Map numbers of 2 * half bits one to one onto each other, in a way of its own for each key; both are [n]."""
    mask, shift = np.uint64((1 << half) - 1), np.uint64(half)
    left, right = values >> shift, values & mask
    for number in range(NUM_ROUNDS):
        left, right = right, left ^ (scramble(keys + right + np.uint64(number << 56)) & mask)
    return left << shift | right


def scramble(words: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Apply the finaliser of SplitMix64: every bit of the result depends on every bit of the word."""
    words = words + np.uint64(0x9E3779B97F4A7C15)  # wraps around, which is intended
    words = (words ^ words >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ words >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return words ^ words >> np.uint64(31)
