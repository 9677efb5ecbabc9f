"""Mixtures of BF16 rows: every row and column counts once, and none depends on those beside it."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from dovetail.numerics import capability
from dovetail.numerics.cpu.kernels import array, kernel
from dovetail.numerics.cpu.mixtures_numba import mix_rows

Draw = Callable[..., Tensor]

pytestmark = pytest.mark.skipif(not capability.has_bf16_instructions(), reason="needs AVX-512 BF16")


@kernel
def mix(p, w, rows, out):  # type: ignore[no-untyped-def]
    """out = p @ w[rows]."""
    flat, stride, columns = w.reshape(-1), p.shape[1], w.shape[1]
    mix_rows(p.reshape(-1), 0, stride, len(p), flat, rows * columns, len(rows), columns, out.reshape(-1), 0, columns)


def mixture(p: Tensor, w: Tensor, rows: list[int]) -> Tensor:
    """p [M, S] over rows [S] of w [., C] -> [M, C]."""
    padded = torch.cat((p, p.new_zeros(len(p), p.shape[1] % 2)), dim=1)
    out = torch.full((len(p), w.shape[1]), 7.0).bfloat16()
    mix(array(padded.contiguous()), array(w), np.array(rows), array(out))
    return out


@pytest.mark.parametrize("width", [1, 20, 32, 33, 64, 100])
@pytest.mark.parametrize("count", [1, 2, 3, 7, 8, 13])
def test_mixtures_of_small_integers_are_exact(count: int, width: int) -> None:
    generator = torch.Generator().manual_seed(0)
    w = torch.randint(-2, 3, (50, width), generator=generator)
    for num in (1, 2, 9, 24):
        p = torch.randint(-2, 3, (count, num), generator=generator)
        rows = torch.randperm(50, generator=generator)[:num].tolist()
        assert torch.equal(mixture(p.bfloat16(), w.bfloat16(), rows), (p @ w[rows]).bfloat16())


def test_a_mixture_has_the_same_bits_in_any_company(draw: Draw) -> None:
    p, w = draw(21, 301, dtype=torch.bfloat16), draw(400, 70, dtype=torch.bfloat16)
    rows = torch.randperm(400, generator=torch.Generator().manual_seed(1))[:301].tolist()
    together = mixture(p, w, rows)
    for first, count in ((0, 1), (20, 1), (3, 2), (5, 4), (9, 8), (2, 19)):
        assert torch.equal(mixture(p[first : first + count].clone(), w, rows), together[first : first + count])
