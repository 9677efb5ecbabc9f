"""FLOP of a training step as executed: what torch's own counter sees in the matrix products of a real step."""

from __future__ import annotations

import torch
from torch.utils.flop_counter import FlopCounterMode

from dovetail.model.transformer import Transformer
from dovetail.text.corpus import Batch
from dovetail.train.step import compute_losses


def measure_flop_per_token(model: Transformer, length: int, batch_size: int = 8) -> float:
    """Forward and backward, MTP included, on random tokens; leaves no gradients behind.

    More than the rule of `cost.count` by what the rule leaves out: expert rows rounded up, and attention scores
    made a second time in the backward pass.
    """
    device = model.norm.weight.device
    tokens = torch.randint(model.spec.vocab_size, (batch_size, length + 1), device=device)
    batch = Batch(tokens=tokens, document_ids=torch.zeros_like(tokens, dtype=torch.int32))
    with FlopCounterMode(display=False, custom_mapping={torch.ops.aten._grouped_mm: _grouped_mm_flop}) as counter:
        losses = compute_losses(model, batch, separate_documents=False)
        torch.stack([losses.token, *losses.mtp]).sum().backward()
    model.zero_grad(set_to_none=True)
    return counter.get_total_flops() / tokens[:, 1:].numel()


def _grouped_mm_flop(left: torch.Size, right: torch.Size, *rest: object, out_shape: object = None, **named: object) -> int:
    """[R, k] times [E, k, n] by rows of each expert, or [n, R] times [R, m] into one product per expert."""
    return 2 * left[0] * left[1] * right[-1]
