"""Grouped products against a loop over experts in FP64: ragged shapes, views, neighbours that must not be touched."""

import itertools
from collections.abc import Callable

import numba
import pytest
import torch
from torch import Tensor

from dovetail.numerics import capability
from dovetail.numerics.formats.errors import normwise_error, tolerance
from dovetail.numerics.products.grouped import dgrad, fprop, fprop_reference, row_multiple, wgrad, wgrad_reference

Draw = Callable[..., Tensor]
EMPTY, EVEN, UNEVEN = [0, 0, 0, 0], [0, 32, 32, 64], [0, 1, 10, 27]
# Widths of rows and results: whole tiles, ragged ones, one below and one above every border of the kernel's blocks.
WIDTHS = [(24, 16), (13, 7), (1, 1), (2, 33), (31, 15), (64, 257), (300, 20)]

needs_kernel = pytest.mark.skipif(not capability.has_bf16_instructions(), reason="needs AVX-512 BF16")


@pytest.fixture(autouse=True)
def has_no_amx(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that our kernels are tested on machines that would leave them alone."""
    monkeypatch.setattr(capability, "has_amx", lambda: False)


@pytest.fixture(params=["fp32", "bf16", "bf16 without instructions", "bf16 with amx"])
def dtype(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.dtype:
    """BF16 with our kernel where the machine has the instruction, and as on those that leave it to torch."""
    if request.param == "bf16 without instructions":
        monkeypatch.setattr(capability, "has_bf16_instructions", lambda: False)
    if request.param == "bf16 with amx":
        monkeypatch.setattr(capability, "has_amx", lambda: True)
    return torch.float32 if request.param == "fp32" else torch.bfloat16


def operands(offsets: list[int], widths: tuple[int, int], dtype: torch.dtype, draw: Draw) -> tuple[Tensor, ...]:
    """rows [R, n_in], grads [R, n_out], weights [3, n_out, n_in]."""
    rows, grads = (draw(offsets[-1], width, dtype=dtype) for width in widths)
    return rows, grads, draw(3, widths[1], widths[0], dtype=dtype)


@pytest.mark.parametrize("widths", WIDTHS, ids=str)
@pytest.mark.parametrize("offsets", [EMPTY, [0, 8, 8, 40], EVEN, UNEVEN, [0, 255, 512, 1025]], ids=str)
def test_products_are_those_of_a_loop(
    offsets: list[int], widths: tuple[int, int], dtype: torch.dtype, draw: Draw
) -> None:
    rows, grads, weights = operands(offsets, widths, dtype, draw)
    wide = rows.double(), grads.double(), weights.double()
    forward = fprop(rows, weights, offsets)
    truth = fprop_reference(wide[0], wide[2], offsets)
    assert normwise_error(forward, truth) < tolerance(dtype, terms=widths[0])
    back = dgrad(grads, weights, offsets)
    truth = fprop_reference(wide[1], wide[2].transpose(1, 2), offsets)
    assert normwise_error(back, truth) < tolerance(dtype, terms=widths[1])
    outer = wgrad(grads, rows, offsets)
    truth = wgrad_reference(wide[1], wide[0], offsets)
    assert normwise_error(outer, truth) < tolerance(dtype, terms=offsets[-1] + 1)
    assert not outer[[i for i in range(3) if offsets[i] == offsets[i + 1]]].any()


def test_views_between_neighbours_that_are_not_numbers(dtype: torch.dtype, draw: Draw) -> None:
    """Columns of wider matrices, rows of longer ones: what lies around them is neither read nor written."""
    rows, grads, weights = operands([0, 19, 19, 50], (37, 21), dtype, draw)
    inside = []
    for x in (rows, grads):
        around = torch.full((60, x.shape[1] + 11), float("nan"), dtype=dtype)
        around[3:53, 5 : 5 + x.shape[1]] = x
        inside.append(around[:, 5 : 5 + x.shape[1]])
    shifted = [3, 22, 22, 53]
    results = [
        (fprop, (inside[0], weights), (rows, weights)),
        (dgrad, (inside[1], weights), (grads, weights)),
        (wgrad, tuple(inside), (rows, grads)),
    ]
    for function, ours, plain in results:
        if function is not wgrad and row_multiple(rows) > 1:
            continue  # torch's own products of all rows are not what is tested here
        view, right = function(*ours, shifted), function(*plain, [0, 19, 19, 50])
        view = view if function is wgrad else view[3:53]
        assert normwise_error(view, right.double()) < 2 * tolerance(dtype, terms=60)


@needs_kernel
def test_threads_do_not_matter(draw: Draw) -> None:
    """Bit for bit: every sum runs over k in order, whoever takes it."""
    offsets = [0, 300, 300, 811]
    rows, grads, weights = operands(offsets, (70, 270), torch.bfloat16, draw)
    threads, results = numba.get_num_threads(), []
    try:
        for count in {1, threads, numba.config.NUMBA_NUM_THREADS}:
            numba.set_num_threads(count)
            results.append((fprop(rows, weights, offsets), wgrad(grads, rows, offsets)))
    finally:
        numba.set_num_threads(threads)
    assert all(torch.equal(mine, right) for ours in results for mine, right in zip(ours, results[0], strict=True))


@needs_kernel
def test_a_row_is_the_same_in_any_company(draw: Draw) -> None:
    rows, _, weights = operands([0, 100, 200, 300], (70, 40), torch.bfloat16, draw)
    together = fprop(rows, weights, [0, 100, 200, 300])
    for row in (0, 7, 99):
        assert torch.equal(fprop(rows[row : row + 1], weights, [0, 1, 1, 1])[0], together[row])


def cancelling(rows: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """The same operands with terms that come twice, with either sign: what is left of a sum says in which order it was
    taken, where a sum rounded to BF16 seldom does."""
    half = rows.shape[1] // 2
    rows[:, half : 2 * half] = rows[:, :half]
    weights[..., half : 2 * half] = -weights[..., :half]
    return rows, weights


# Up to 8 rows take tiles of 1, 2, 4 or 8 rows; b is packed for them only where k is no multiple of 32.
@needs_kernel
@pytest.mark.parametrize("k", [32, 70, 96, 100, 320, 1])
@pytest.mark.parametrize("n", [1, 16, 33, 257])
def test_few_rows_have_the_bits_of_many(n: int, k: int, draw: Draw) -> None:
    """Groups of 1 to 9 rows, and of none."""
    counts = [1, 2, 0, 3, 4, 5, 6, 7, 8, 9]
    offsets = [0, *itertools.accumulate(counts)]
    rows, weights = draw(offsets[-1], k, dtype=torch.bfloat16), draw(len(counts), n, k, dtype=torch.bfloat16)
    truth = fprop_reference(rows.double(), weights.double(), offsets)
    assert normwise_error(fprop(rows, weights, offsets), truth) < tolerance(torch.bfloat16, terms=k)
    rows, weights = cancelling(rows, weights)
    few, many = fprop(rows, weights, offsets), draw(40, k, dtype=torch.bfloat16)
    for group, (begin, end) in enumerate(itertools.pairwise(offsets)):
        among = torch.cat((many[:23], rows[begin:end], many[23:]))
        crowd = fprop(among, weights[group : group + 1], [0, len(among)])
        assert torch.equal(crowd[23 : 23 + end - begin], few[begin:end])


@needs_kernel
@pytest.mark.parametrize("backwards", [False, True])
def test_the_order_of_sums_is_in_the_bits(backwards: bool, draw: Draw) -> None:
    """The test above tells another order of the same terms."""
    rows, weights = cancelling(draw(8, 320, dtype=torch.bfloat16), draw(1, 257, 320, dtype=torch.bfloat16))
    right = fprop(torch.cat((rows, draw(40, 320, dtype=torch.bfloat16))), weights, [0, 48])[:8]
    if backwards:
        rows, weights = rows.flip(1), weights.flip(2)
    differing = (fprop(rows, weights, [0, 8]) != right).float().mean()
    assert differing > 0.5 if backwards else differing == 0


def test_sums_are_kept_in_fp32(dtype: torch.dtype, draw: Draw) -> None:
    """The wrong variant, a sum rounded to the format after every 32 terms, is seen by the bound above."""
    rows, _, weights = operands([0, 64, 64, 64], (4096, 16), dtype, draw)
    truth = rows[:64].double() @ weights[0].double().t()
    bound = tolerance(dtype, terms=4096)
    assert normwise_error(fprop(rows, weights, [0, 64, 64, 64]), truth) < bound
    total = torch.zeros(64, 16, dtype=torch.bfloat16)
    for k in range(0, 4096, 32):
        total = (total.float() + rows[:, k : k + 32].float() @ weights[0, :, k : k + 32].float().t()).bfloat16()
    assert normwise_error(total, truth) > 2 * bound


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_what_is_not_finite_is_passed_on(poison: float, dtype: torch.dtype, draw: Draw) -> None:
    rows, grads, weights = operands(EVEN, (40, 24), dtype, draw)
    rows[33, 5] = poison
    is_finite = fprop(rows, weights.abs(), EVEN).isfinite()
    assert torch.equal(is_finite, (torch.arange(64) != 33)[:, None].expand(-1, 24))
    is_finite = wgrad(rows, grads.abs(), EVEN).isfinite()
    assert not is_finite[2, 5].any()
    is_finite[2, 5] = True
    assert is_finite.all()
