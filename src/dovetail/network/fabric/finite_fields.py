"""Finite fields of q = p^n elements as tables of sums and products, for slim flies.

Element number i is the polynomial over the prime p whose coefficients are i's digits in base p, the lowest first.
"""

from __future__ import annotations

from itertools import product

import numpy as np
from numpy.typing import NDArray

Table = NDArray[np.int32]


def prime_power(q: int) -> tuple[int, int] | None:
    """Return (p, n) for q = p^n with p prime, or None for another q."""
    if q < 2:
        return None
    prime = next((each for each in range(2, int(q**0.5) + 1) if q % each == 0), q)
    exponent = 0
    while q % prime == 0:
        q, exponent = q // prime, exponent + 1
    return (prime, exponent) if q == 1 else None


def field(q: int) -> tuple[Table, Table]:
    """Return the sums and the products of all elements, [q, q] each. `q` is a prime power."""
    parts = prime_power(q)
    assert parts is not None, q
    prime, degree = parts
    digits = np.arange(q)[:, None] // prime ** np.arange(degree) % prime  # [q, degree]
    weights = prime ** np.arange(degree)
    sums = ((digits[:, None] + digits[None, :]) % prime) @ weights
    raw = np.zeros((q, q, 2 * degree - 1), np.int64)
    for i in range(degree):
        for j in range(degree):
            raw[:, :, i + j] += digits[:, None, i] * digits[None, :, j]
    for low in product(range(prime), repeat=degree):  # x^degree + low is irreducible if no product of nonzeros is 0
        products = _reduced(raw, low, degree, prime) @ weights
        if (products[1:, 1:] > 0).all():
            return sums.astype(np.int32), products.astype(np.int32)
    raise AssertionError(f"no irreducible polynomial of degree {degree} over {prime}")


def _reduced(raw: NDArray[np.int64], low: tuple[int, ...], degree: int, prime: int) -> NDArray[np.int64]:
    """Return `raw` modulo x^degree + sum low_i x^i."""
    rest = raw.copy()
    for power in range(2 * degree - 2, degree - 1, -1):
        for i, coefficient in enumerate(low):
            rest[:, :, power - degree + i] -= coefficient * rest[:, :, power]
    return rest[:, :, :degree] % prime


def powers_of_a_generator(products: Table) -> list[int]:
    """Return 1, x, x^2 ... x^(q - 2) for the first x whose powers are all nonzero elements."""
    q = len(products)
    for generator in range(1, q):
        powers = [1]
        while len(powers) < q - 1 and (following := int(products[powers[-1], generator])) != 1:
            powers.append(following)
        if len(powers) == q - 1:
            return powers
    raise AssertionError(f"field of {q} elements without a generator")
