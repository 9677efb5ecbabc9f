"""Cross-entropy in chunks of rows, without the whole matrix of logits.

Gradients are made on the way.

A chunk's logits exist in the compute dtype only; `loss_numba` turns them in place into the gradient of the mean
loss, from which the chunk's share of the gradients of hidden states and head follows at once. So the head's GEMMs
run three times in all, as without chunks, and never a second time in the backward pass.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dovetail.numerics import capability
from dovetail.train.step import loss_numba

LOGITS_PER_CHUNK = 1 << 24  # elements; 32 MB in BF16
IGNORED = -1  # a target that counts for nothing


def token_loss(hidden: Tensor, head: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy in nats over targets that are not IGNORED; FP32 scalar, differentiable.

    hidden [..., dim] and head [vocab, dim] in the compute dtype, targets [...] int64. 0 where no target counts.
    Raises ValueError for a target that is neither a token nor IGNORED: the kernel does not look.
    """
    return weighted_loss(hidden, head, targets, int((targets != IGNORED).sum()), 1.0)[0]


def weighted_loss(
    hidden: Tensor, head: Tensor, targets: Tensor, num_targets: int, weight: float
) -> tuple[Tensor, Tensor]:
    """What these targets add to a loss that is `weight` times a mean over `num_targets`, of which they are some.

    Returns that, differentiable, and the same without the weight, not differentiable; FP32 scalars. The weight acts
    in FP32, where the gradient is made: a factor put on the loss would be rounded to the compute dtype.
    """
    _check_targets(targets, head.shape[0])
    loss, plain = _WeightedLoss.apply(hidden.flatten(0, -2), head, targets.flatten(), max(num_targets, 1), weight)
    return loss, plain


@torch.no_grad()
def token_losses(hidden: Tensor, head: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of each target [N] FP32 in nats, 0 where IGNORED; not differentiable."""
    _check_targets(targets, head.shape[0])
    losses = torch.empty(hidden.shape[0], dtype=torch.float32, device=hidden.device)
    for start, stop in _chunks(hidden.shape[0], head.shape[0]):
        logits = F.linear(hidden[start:stop], head)
        losses[start:stop] = losses_and_gradient(logits, targets[start:stop], 0.0)
    return losses


def _check_targets(targets: Tensor, vocab: int) -> None:
    if targets.numel() and not targets.is_cuda:  # on a GPU the look would wait for the whole queue
        low, high = targets.aminmax()
        if low < IGNORED or high >= vocab:
            raise ValueError(
                f"targets from {int(low)} to {int(high)} in a vocabulary of {vocab}; a target is a token from 0 to"
                f" {vocab - 1}, or {IGNORED} where it is not to count"
            )


def token_loss_reference(hidden: Tensor, head: Tensor, targets: Tensor) -> Tensor:
    logits = F.linear(hidden, head).float().flatten(0, -2)
    return F.cross_entropy(logits, targets.flatten(), ignore_index=IGNORED)


class _WeightedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, head: Tensor, targets: Tensor, num_targets: int, weight: float
    ) -> tuple[Tensor, Tensor]:
        total = torch.zeros((), dtype=torch.float64, device=hidden.device)
        grad_hidden = torch.empty_like(hidden)
        chunks = _chunks(hidden.shape[0], head.shape[0])
        grad_head = torch.zeros(head.shape, dtype=torch.float32, device=head.device) if len(chunks) != 1 else None
        for start, stop in chunks:
            rows = hidden[start:stop]
            logits = F.linear(rows, head)
            total += losses_and_gradient(logits, targets[start:stop], weight / num_targets).double().sum()
            grad_hidden[start:stop] = logits @ head
            outer = logits.t() @ rows
            grad_head = outer if grad_head is None else grad_head.add_(outer)
        assert grad_head is not None
        ctx.save_for_backward(grad_hidden, grad_head.to(head.dtype))
        plain = (total / num_targets).float()
        ctx.mark_non_differentiable(plain)
        return plain * weight, plain

    @staticmethod
    def backward(ctx: Any, grad: Tensor, grad_of_plain: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        grad_hidden, grad_head = ctx.saved_tensors
        return grad_hidden * grad.to(grad_hidden.dtype), grad_head * grad.to(grad_head.dtype), None, None, None


def losses_and_gradient(logits: Tensor, targets: Tensor, scale: float) -> Tensor:
    """The loss of each row; logits become scale * (softmax - one_hot), zero rows where IGNORED."""
    if capability.on_cpu(logits):
        return loss_numba.losses_and_gradient(logits, targets, scale)
    return losses_and_gradient_reference(logits, targets, scale)


def losses_and_gradient_reference(logits: Tensor, targets: Tensor, scale: float) -> Tensor:
    wide = logits.float()
    losses = F.cross_entropy(wide, targets, ignore_index=IGNORED, reduction="none")
    gradient = wide.softmax(dim=-1)
    gradient[torch.arange(len(targets), device=targets.device), targets.clamp(min=0)] -= 1.0
    logits.copy_(gradient * scale * (targets != IGNORED)[:, None])
    return losses


def _chunks(rows: int, vocab: int) -> list[tuple[int, int]]:
    size = max(LOGITS_PER_CHUNK // vocab, 1)
    return [(start, min(start + size, rows)) for start in range(0, rows, size)]
