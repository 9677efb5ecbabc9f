"""Block attention against the reference in FP64, across every border of its blocks and steps."""

from collections.abc import Callable

import numba
import pytest
import torch
from torch import Tensor

from dovetail.model.attention import causal, causal_numba
from dovetail.model.attention.causal import (
    QUERY_BLOCK,
    attention_reference,
    causal_attention,
    document_starts,
    masked_attention,
)
from dovetail.numerics import capability
from dovetail.numerics.formats.errors import normwise_error, rowwise_error, tolerance

Draw = Callable[..., Tensor]
LENGTHS = [1, 40, 64, 65, 255, 256, 257, 300, 600]
QK, V, SCALE = 24, 20, 24**-0.5


@pytest.fixture(params=["fp32", "bf16", "bf16 by blocks"])
def dtype(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.dtype:
    """BF16 head by head where the machine has the instruction, and as on one that has not."""
    monkeypatch.setattr(capability, "has_amx", lambda: False)  # which would leave our kernel alone
    if request.param == "bf16 by blocks":
        monkeypatch.setattr(capability, "has_bf16_instructions", lambda: False)
    return torch.float32 if request.param == "fp32" else torch.bfloat16


def inputs(batch: int, heads: int, length: int, dtype: torch.dtype, draw: Draw) -> list[Tensor]:
    """q, k, v and the gradient of the output."""
    return [draw(batch, heads, length, dim, dtype=dtype) for dim in (QK, QK, V, V)]


def run(function: Callable[..., Tensor], tensors: list[Tensor], first: Tensor | None = None) -> list[Tensor]:
    """Output and the gradients of q, k, v."""
    leaves = [tensor.detach().requires_grad_() for tensor in tensors[:3]]
    output = function(*leaves, SCALE, first)
    return [output, *torch.autograd.grad(output, leaves, tensors[3])]


def truth_of(tensors: list[Tensor], first: Tensor | None = None) -> list[Tensor]:
    return run(attention_reference, [tensor.double() for tensor in tensors], first)


def bound(tensors: list[Tensor], dtype: torch.dtype) -> float:
    """Scores are rounded, so the exponent is wrong by u times the largest; then probabilities, their gradient and
    the result are rounded. A row may be a difference of terms sqrt(length) times its size."""
    q, k = (tensor.double() for tensor in tensors[:2])
    largest = float((q @ k.transpose(-1, -2) * SCALE).abs().max()) if q.numel() else 0.0
    return tolerance(dtype, roundings=2 * largest + 4, terms=QK * (1 + largest) ** 2 + q.shape[2])


def some_documents(length: int) -> Tensor:
    """Three rows: one document, borders off every step of 64, borders on and beside them."""
    borders = [[], [1, 3, 70, 130, 299, 300], [63, 64, 65, 128, 256, 257, 512]]
    ids = torch.zeros(3, length, dtype=torch.int32)
    for row, places in zip(ids, borders, strict=True):
        for place in places:
            row[place:] += 1
    return document_starts(ids)


@pytest.mark.parametrize("length", LENGTHS)
def test_blocks_are_the_reference(length: int, dtype: torch.dtype, draw: Draw) -> None:
    tensors = inputs(1, 2, length, dtype, draw)
    ours, truth = run(causal_attention, tensors), truth_of(tensors)
    for name, mine, right in zip(("output", "q", "k", "v"), ours, truth, strict=True):
        assert mine.dtype == dtype
        assert mine.shape == right.shape
        if name in ("q", "k") and length == 1:  # the softmax of one score has no gradient
            assert mine.abs().max() < tolerance(dtype, terms=V) * 40
        elif name == "q":  # nor has the first query; and rows near it are small beside the rest
            assert normwise_error(mine, right) < bound(tensors, dtype), name
        else:
            assert rowwise_error(mine, right) < 2 * bound(tensors, dtype), name


@pytest.mark.parametrize("length", [1, 66, 256, 600])
def test_documents_are_kept_apart(length: int, dtype: torch.dtype, draw: Draw) -> None:
    tensors, first = inputs(3, 2, length, dtype, draw), some_documents(length)
    ours, truth = run(causal_attention, tensors, first), truth_of(tensors, first)
    for name, mine, right in zip(("output", "q", "k", "v"), ours, truth, strict=True):
        if name in ("output", "v"):
            assert rowwise_error(mine, right) < 2 * bound(tensors, dtype), name
        elif length > 1:
            assert normwise_error(mine, right) < bound(tensors, dtype), name
    if length == 600:
        assert normwise_error(ours[0], truth_of(tensors)[0]) > 100 * tolerance(dtype)


@pytest.mark.parametrize("length", [65, 300])
def test_stale_columns_past_the_first_step_are_seen(length: int, draw: Draw, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bug this kernel had: beyond one step of keys the backward pass left what it should have cleared."""
    tensors = inputs(1, 2, length, torch.float32, draw)
    truth = truth_of(tensors)
    right = causal_numba.softmax_backward

    def wrong(scores: Tensor, grad: Tensor, start: int, *rest: object) -> None:
        before = grad.clone()
        right(scores, grad, start, *rest)
        step = causal_numba.STEP
        queries = torch.arange(start, start + scores.shape[1])[:, None]
        is_stale = torch.arange(scores.shape[2]) >= (queries // step + 1) * step
        grad.copy_(torch.where(is_stale, before, grad))

    monkeypatch.setattr(causal_numba, "softmax_backward", wrong)
    ours = run(causal_attention, tensors)
    assert normwise_error(ours[1], truth[1]) > 100 * bound(tensors, torch.float32)


def test_the_block_size_does_not_matter(dtype: torch.dtype, draw: Draw, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = inputs(1, 2, 150, dtype, draw)
    whole = run(causal_attention, tensors)
    for block in (37, 64, 149):
        monkeypatch.setattr(causal, "QUERY_BLOCK", block)
        for mine, right in zip(run(causal_attention, tensors), whole, strict=True):
            assert normwise_error(mine, right) < 2 * bound(tensors, dtype)


def test_threads_do_not_matter(draw: Draw) -> None:
    """Bit for bit, with a head's queries dealt to several tasks too."""
    tensors, first = inputs(3, 1, 333, torch.bfloat16, draw), some_documents(333)
    threads, results = numba.get_num_threads(), []
    try:
        for count in {1, threads, numba.config.NUMBA_NUM_THREADS}:
            numba.set_num_threads(count)
            results += [
                run(causal_attention, tensors, first),
                run(causal_attention, [x[:1] for x in tensors], first[:1]),
            ]
    finally:
        numba.set_num_threads(threads)
    for ours in results:
        assert all(torch.equal(mine, right[: len(mine)]) for mine, right in zip(ours, results[0], strict=True))


@pytest.mark.parametrize("shape", [(0, 2, 5), (2, 3, 0), (2, 1, 1)], ids=str)
def test_nothing_and_one(shape: tuple[int, int, int], dtype: torch.dtype, draw: Draw) -> None:
    tensors = inputs(*shape, dtype, draw)
    ours = run(causal_attention, tensors)
    assert [each.shape for each in ours] == [(*shape, V), (*shape, QK), (*shape, QK), (*shape, V)]
    if shape[2] == 1:  # one key takes everything
        assert torch.equal(ours[0], tensors[2])
        assert torch.equal(ours[3], tensors[3])


@pytest.mark.parametrize("length", [33, QUERY_BLOCK + 5])
def test_strides_do_not_matter(length: int, dtype: torch.dtype, draw: Draw) -> None:
    tensors, first = inputs(3, 2, length, dtype, draw), some_documents(length + 3)[:, :length]
    strided = [tensor.transpose(1, 2).contiguous().transpose(1, 2) for tensor in tensors]
    assert not any(tensor.is_contiguous() for tensor in (*strided, first))
    pairs = zip(run(causal_attention, strided, first), run(causal_attention, tensors, first.clone()), strict=True)
    assert all(normwise_error(ours, theirs) < bound(tensors, dtype) for ours, theirs in pairs)


def test_large_logits_fp32(draw: Draw) -> None:
    tensors = inputs(1, 2, 300, torch.float32, draw)
    tensors[0] *= 100
    ours, truth = run(causal_attention, tensors), truth_of(tensors)
    for mine, right in zip(ours, truth, strict=True):
        assert normwise_error(mine, right) < bound(tensors, torch.float32)


@pytest.mark.parametrize("size", [1e-40, 1e-20, 1.0, 1e3, 1e15])
def test_weights_sum_to_one_whatever_the_logits(size: float, dtype: torch.dtype, draw: Draw) -> None:
    tensors = inputs(1, 2, 270, dtype, draw)
    tensors[0] *= size
    tensors[2].fill_(1.0)
    ours = run(causal_attention, tensors)
    # the probabilities' own roundings average out in the sum; one of them may be all there is
    assert (ours[0] - 1).abs().max() <= 2 * tolerance(dtype, terms=270)
    if size < 1e6:  # beyond, the backward pass meets the rounding error of the logit itself in an exponent
        assert all(each.isfinite().all() for each in ours)


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_what_is_not_finite_reaches_those_who_see_it(poison: float, dtype: torch.dtype, draw: Draw) -> None:
    for index, is_hit in ((0, torch.arange(300) == 270), (1, torch.arange(300) >= 270)):
        tensors = inputs(1, 1, 300, dtype, draw)
        tensors[index][0, 0, 270] = poison
        if poison > 0:  # every score with the poison is +inf, not a NaN of inf - inf in the dot product
            tensors[1 - index].abs_()
        ours = run(causal_attention, tensors)
        assert torch.equal(~ours[0][0, 0].isfinite().all(dim=-1), is_hit)
        assert not ours[1].isfinite().all()
    tensors = inputs(1, 1, 300, dtype, draw)
    tensors[3][0, 0, 7] = poison  # of the gradient
    assert not run(causal_attention, tensors)[3].isfinite().all()


def test_scores_that_overflow_are_seen(draw: Draw) -> None:
    tensors = inputs(1, 1, 70, torch.float32, draw)
    tensors[0] *= 1e25
    tensors[1] *= 1e25
    assert not run(causal_attention, tensors)[0].isfinite().all()


def test_document_starts() -> None:
    ids = torch.tensor([[0, 0, 1, 1, 1, 2], [3, 3, 3, 3, 3, 3], [5, 4, 3, 3, 9, 9]])
    assert document_starts(ids).tolist() == [[0, 0, 2, 2, 2, 5], [0] * 6, [0, 1, 2, 2, 4, 4]]
    assert document_starts(ids).dtype == torch.int32
    assert document_starts(ids[:, :0]).shape == (3, 0)


def test_reference_by_hand_and_its_gradient(draw: Draw) -> None:
    q, k, v = (draw(1, 2, 5, 3).double().requires_grad_() for _ in range(3))
    first = torch.tensor([[0, 0, 0, 3, 3]], dtype=torch.int32)
    output = attention_reference(q, k, v, 0.5, first)
    for t, (low, high) in enumerate([(0, 1), (0, 2), (0, 3), (3, 4), (3, 5)]):
        weights = (q[0, :, t, None] * k[0, :, low:high]).sum(-1).mul(0.5).softmax(-1)
        by_hand = (weights[..., None] * v[0, :, low:high]).sum(1)
        assert normwise_error(output[0, :, t], by_hand) < tolerance(torch.float64, terms=5)
    assert torch.autograd.gradcheck(lambda q, k, v: attention_reference(q, k, v, 0.5, first), (q, k, v))


def test_one_head_of_keys_serves_all_queries(draw: Draw) -> None:
    q, k = draw(2, 4, 5, 6), draw(2, 1, 7, 6)
    visible = torch.arange(7) <= torch.arange(2, 7)[:, None]
    shared = masked_attention(q, k, k, 0.3, visible[None, None])
    repeated = masked_attention(q, k.expand(-1, 4, -1, -1), k.expand(-1, 4, -1, -1), 0.3, visible[None, None])
    assert normwise_error(shared, repeated) < tolerance(torch.float32, terms=13)
