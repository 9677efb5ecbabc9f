"""Batch-invariant products: exact where sums are, within BF16's bound elsewhere, the same bits in any company."""

from __future__ import annotations

from collections.abc import Callable

import numba
import numpy as np
import pytest
import torch
from torch import Tensor

from dovetail.numerics import capability
from dovetail.numerics.cpu.kernels import array
from dovetail.numerics.formats.errors import normwise_error, tolerance
from dovetail.numerics.products.invariant_numba import both, product

Draw = Callable[..., Tensor]
SIZES = [(1, 32), (3, 31), (4, 100), (37, 1), (64, 33), (70, 1024), (66, 1056), (33, 2100), (5, 0)]  # N, K

pytestmark = pytest.mark.skipif(not capability.has_bf16_instructions(), reason="needs AVX-512 BF16")


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> int:
    return int(request.param)


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_sums_of_small_integers_are_exact(size: tuple[int, int]) -> None:
    """Every row and column is there once, and all of k, whatever the tiles."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randint(-2, 3, size, generator=generator)
    for rows in (0, 1, 2, 3, 5, 11, 12, 19, 48, 49, 130):
        x = torch.randint(-2, 3, (rows, size[1]), generator=generator)
        got = product(x.bfloat16(), weight.bfloat16(), torch.float32)
        assert torch.equal(got, (x @ weight.T).float())


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_a_row_has_the_same_bits_in_any_company(size: tuple[int, int], draw: Draw) -> None:
    weight, x = draw(*size, dtype=torch.bfloat16), draw(130, size[1], dtype=torch.bfloat16)
    together = product(x, weight, torch.float32)
    assert normwise_error(together, x.double() @ weight.double().T) < tolerance(torch.float32, terms=size[1])
    assert torch.equal(product(x, weight), together.bfloat16())
    for first, rows in ((0, 1), (1, 1), (129, 1), (3, 2), (5, 3), (7, 4), (20, 6), (31, 12), (40, 47), (60, 70)):
        alone = product(x[first : first + rows].clone(), weight, torch.float32)
        assert torch.equal(alone, together[first : first + rows])
    for first in range(0, size[0], 3):
        assert torch.equal(product(x[:7].clone(), weight[first:].clone(), torch.float32), together[:7, first:])


@pytest.mark.parametrize("rows", [9, 300])
def test_groups_and_a_product_beside_them_are_those_of_each_alone(rows: int, threads: int, draw: Draw) -> None:
    """As experts in use and a shared one: some have no rows, some weights are not asked for."""
    x, y = draw(rows, 96, dtype=torch.bfloat16), draw(rows, 160, dtype=torch.bfloat16)
    weight, second = draw(5, 70, 96, dtype=torch.bfloat16), draw(35, 160, dtype=torch.bfloat16)
    out, second_out = torch.empty(rows, 70).bfloat16(), torch.empty(rows, 35).bfloat16()
    used, bounds = np.array([0, 2, 3]), np.array([0, 4, 4, rows])
    both(array(x), array(weight), used, bounds, array(out), array(y), array(second[None]), array(second_out), threads)
    assert torch.equal(second_out, product(y, second))
    assert torch.equal(out[:4], product(x[:4].contiguous(), weight[0]))
    assert torch.equal(out[4:], product(x[4:].contiguous(), weight[3]))


def test_the_number_of_threads_changes_nothing(draw: Draw) -> None:
    x, weight = draw(100, 512, dtype=torch.bfloat16), draw(300, 512, dtype=torch.bfloat16)
    before, together = numba.get_num_threads(), product(x, weight)
    try:
        numba.set_num_threads(1)
        assert torch.equal(product(x, weight), together)
    finally:
        numba.set_num_threads(before)
