"""Cross-entropy in chunks: kernel and chunks against F.cross_entropy in FP64."""

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dovetail.numerics.formats.errors import elementwise_error, normwise_error, tolerance
from dovetail.train.step import loss
from dovetail.train.step.loss import IGNORED, token_loss, token_loss_reference, token_losses, weighted_loss

Draw = Callable[..., Tensor]
DIM = 24


def targets_for(rows: int, vocab: int, ignored: tuple[int, ...] = ()) -> Tensor:
    targets = torch.randint(0, vocab, (rows,), generator=torch.Generator().manual_seed(rows))
    targets[list(ignored)] = IGNORED
    return targets


def truth_of(hidden: Tensor, head: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Loss and gradients in FP64."""
    leaves = hidden.detach().double().requires_grad_(), head.detach().double().requires_grad_()
    logits = F.linear(*leaves)
    total = F.cross_entropy(logits.flatten(0, -2), targets.flatten(), ignore_index=IGNORED)
    return total, *torch.autograd.grad(total, leaves)


def ours_of(hidden: Tensor, head: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    leaves = hidden.detach().requires_grad_(), head.detach().requires_grad_()
    total = token_loss(*leaves, targets)
    return total, *torch.autograd.grad(total, leaves)


def bound(hidden: Tensor, head: Tensor, dtype: torch.dtype) -> float:
    """Logits are rounded, so exponents are wrong by u times the largest; then their gradient, then the result."""
    largest = float(F.linear(hidden.double(), head.double()).abs().max())
    return tolerance(dtype, roundings=3 + 2 * largest, terms=DIM * (1 + largest) ** 2 + len(head) + hidden.shape[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "vocab"), [(1, 1), (1, 7), (5, 96), (67, 130), (40, 1003)])
def test_loss_and_gradients(rows: int, vocab: int, dtype: torch.dtype, draw: Draw) -> None:
    hidden, head = draw(rows, DIM, dtype=dtype), draw(vocab, DIM, dtype=dtype, scale=0.4)
    targets = targets_for(rows, vocab, ignored=(0, rows // 2) if rows > 2 else ())
    ours, truth = ours_of(hidden, head, targets), truth_of(hidden, head, targets)
    assert ours[0].dtype == torch.float32
    assert ours[1].dtype == ours[2].dtype == dtype
    if vocab == 1:  # one token is certain
        assert not any(each.any() for each in ours)
        return
    for mine, right in zip(ours, truth, strict=True):
        assert normwise_error(mine, right) < bound(hidden, head, dtype)
    if rows > 2:
        assert not ours[1][[0, rows // 2]].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("per_chunk", [1, 96 * 3, 96 * 10, 96 * 11])
def test_chunks_do_not_matter(per_chunk: int, dtype: torch.dtype, draw: Draw, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of 1, 3, 10 and 11 of 10 rows."""
    hidden, head = draw(2, 5, DIM, dtype=dtype), draw(96, DIM, dtype=dtype, scale=0.4)
    targets = targets_for(10, 96, ignored=(3, 4, 5)).view(2, 5)
    monkeypatch.setattr(loss, "LOGITS_PER_CHUNK", per_chunk)
    for mine, right in zip(ours_of(hidden, head, targets), truth_of(hidden, head, targets), strict=True):
        assert normwise_error(mine, right) < bound(hidden.flatten(0, 1), head, dtype)


def test_the_mean_is_over_the_targets_that_count(draw: Draw) -> None:
    hidden, head, targets = draw(6, DIM), draw(96, DIM), targets_for(6, 96)
    partly = targets.clone()
    partly[2:] = IGNORED
    few, all_of_two = token_loss(hidden, head, partly), token_loss(hidden[:2], head, targets[:2])
    assert normwise_error(few, all_of_two) < tolerance(torch.float32, terms=96)
    over_all_rows = all_of_two * 2 / 6
    assert normwise_error(few, over_all_rows) > 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_to_learn_from(dtype: torch.dtype, draw: Draw) -> None:
    """No rows, or all targets ignored: 0 and zero gradients, where torch's mean is NaN."""
    for rows in (0, 4):
        ours = ours_of(draw(rows, DIM, dtype=dtype), draw(96, DIM, dtype=dtype), torch.full((rows,), IGNORED))
        assert ours[0] == 0
        assert not ours[1].any()
        assert not ours[2].any()
        assert ours[1].shape == (rows, DIM)
        assert ours[2].shape == (96, DIM)
    assert math.isnan(token_loss_reference(draw(4, DIM), draw(96, DIM), torch.full((4,), IGNORED)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_losses_of_each_target(dtype: torch.dtype, draw: Draw, monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, head = draw(37, DIM, dtype=dtype), draw(130, DIM, dtype=dtype, scale=0.4)
    targets = targets_for(37, 130, ignored=(0, 36))
    truth = F.cross_entropy(F.linear(hidden.double(), head.double()), targets, ignore_index=IGNORED, reduction="none")
    for per_chunk in (1 << 24, 130 * 5):
        monkeypatch.setattr(loss, "LOGITS_PER_CHUNK", per_chunk)
        losses = token_losses(hidden, head, targets)
        assert losses.dtype == torch.float32
        assert not losses[[0, 36]].any()
        assert normwise_error(losses, truth) < bound(hidden, head, dtype)
    assert token_losses(hidden[:0], head, targets[:0]).shape == (0,)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_strides_do_not_matter(dtype: torch.dtype, draw: Draw) -> None:
    hidden, head = draw(9, DIM, dtype=dtype), draw(96, DIM, dtype=dtype)
    tokens = targets_for(18, 96)
    strided = hidden.t().contiguous().t(), head.t().contiguous().t(), tokens[::2]
    assert not any(each.is_contiguous() for each in strided)
    for mine, right in zip(ours_of(*strided), ours_of(hidden, head, tokens[::2].clone()), strict=True):
        assert normwise_error(mine, right) < bound(hidden, head, dtype)


def test_a_weight_acts_in_fp32(draw: Draw) -> None:
    """0.3 is 0.30078 in BF16; half of that distance tells the two apart in the mean over many elements."""
    hidden, head = (draw(n, DIM, dtype=torch.bfloat16, scale=0.4).requires_grad_() for n in (512, 96))
    targets = targets_for(512, 96)
    plain = torch.autograd.grad(token_loss(hidden, head, targets), hidden)[0].double()
    total, of_one = weighted_loss(hidden, head, targets, 512, 0.3)
    weighted = torch.autograd.grad(total, hidden)[0].double()
    factor = (plain * weighted).sum() / plain.square().sum()
    rounded = float(torch.tensor(0.3, dtype=torch.bfloat16))
    assert abs(factor - 0.3) < (rounded - 0.3) / 2
    assert abs((plain * (plain * rounded)).sum() / plain.square().sum() - 0.3) > (rounded - 0.3) / 2
    assert total == of_one * 0.3 and of_one == token_loss(hidden, head, targets) and not of_one.requires_grad


def test_parts_of_a_mean_add_up_whatever_counts_in_each(draw: Draw) -> None:
    hidden, head, targets = draw(12, DIM), draw(96, DIM), targets_for(12, 96, ignored=(0, 1, 2, 4))
    parts = [weighted_loss(hidden[k : k + 4], head, targets[k : k + 4], 8, 1.0)[0] for k in (0, 4, 8)]
    whole = token_loss(hidden, head, targets)
    assert normwise_error(sum(parts), whole) < bound(hidden, head, torch.float32)
    means = [token_loss(hidden[k : k + 4], head, targets[k : k + 4]) for k in (0, 4, 8)]
    assert normwise_error(sum(means) / 3, whole) > 10 * bound(hidden, head, torch.float32)


def test_the_gradient_scales_with_what_comes_from_above(draw: Draw) -> None:
    hidden, head, targets = draw(9, DIM).requires_grad_(), draw(96, DIM).requires_grad_(), targets_for(9, 96)
    plain = torch.autograd.grad(token_loss(hidden, head, targets), (hidden, head))
    scaled = torch.autograd.grad(0.25 * token_loss(hidden, head, targets), (hidden, head))
    assert all(torch.equal(0.25 * one, other) for one, other in zip(plain, scaled, strict=True))


def logits_through(rows: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Loss and gradient for given logits: the head is the identity."""
    head = torch.eye(rows.shape[1], dtype=rows.dtype)
    total, gradient, _ = ours_of(rows, head, targets)
    return total, gradient


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_large_logits(dtype: torch.dtype) -> None:
    rows = torch.tensor([[1e4, -1e4, 0, 0], [3e38, 0, 0, 0], [-3e38, -3e38, -3e38, -3e38], [88, 89, 90, 1e-40]])
    rows, targets = rows.to(dtype), torch.tensor([1, 0, 2, 3])
    truth = F.cross_entropy(rows.double(), targets, reduction="none")
    losses = token_losses(rows, torch.eye(4, dtype=dtype), targets)
    assert elementwise_error(losses[:1], truth[:1]) < tolerance(torch.float32, terms=4)
    # the loss is what is left of logits of 3e38 and 90
    assert losses[1] == 0
    assert abs(losses[2] - math.log(4)) < 3e38 * tolerance(torch.float32)
    assert abs(losses[3] - truth[3]) < 90 * tolerance(torch.float32, terms=4)
    gradient = logits_through(rows[[0, 3]], targets[[0, 3]])[1]
    assert normwise_error(gradient[0], torch.tensor([0.5, -0.5, 0, 0])) < tolerance(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("poison", [float("nan"), -float("nan"), float("inf")])
def test_what_is_not_finite_is_seen(poison: float, dtype: torch.dtype, draw: Draw) -> None:
    hidden, head = draw(9, DIM, dtype=dtype), draw(96, DIM, dtype=dtype)
    hidden[4, 3] = poison
    total, gradient, head_gradient = ours_of(hidden, head, targets_for(9, 96))
    assert not total.isfinite()
    assert not gradient[4].isfinite().any()
    assert gradient[[0, 8]].isfinite().all()
    assert not head_gradient.isfinite().any()
    losses = token_losses(hidden, head, targets_for(9, 96))
    assert torch.equal(losses.isfinite(), torch.arange(9) != 4)
    ignored = targets_for(9, 96, ignored=(4,))
    assert token_loss(hidden, head, ignored).isfinite()  # where it does not count, it does no harm


@pytest.mark.parametrize("target", [-100, -2, 96, 5000])
def test_targets_out_of_range_are_refused(target: int, draw: Draw) -> None:
    """-100 is the habit elsewhere; here it would have counted in the mean."""
    targets = torch.tensor([3, target])
    for function in (token_loss, token_losses):
        with pytest.raises(ValueError, match=f"{target}.*vocabulary of 96.*-1 where"):
            function(draw(2, DIM), draw(96, DIM), targets)


def test_the_reference_path_agrees(draw: Draw) -> None:
    """FP64 is not for the kernels, so chunks go through torch."""
    hidden, head, targets = draw(9, DIM).double(), draw(96, DIM).double(), targets_for(9, 96, ignored=(2,))
    for mine, right in zip(ours_of(hidden, head, targets), truth_of(hidden, head, targets), strict=True):
        assert normwise_error(mine, right) < tolerance(torch.float32, terms=96)


def test_a_shared_head_gets_both_gradients(draw: Draw) -> None:
    hidden, head, targets = draw(4, DIM), draw(96, DIM).requires_grad_(), targets_for(4, 96)
    (token_loss(hidden, head, targets) + token_loss(2 * hidden, head, targets)).backward()
    parts = [torch.autograd.grad(token_loss(each, head, targets), head)[0] for each in (hidden, 2 * hidden)]
    assert head.grad is not None
    assert normwise_error(head.grad, parts[0] + parts[1]) < tolerance(torch.float32)
