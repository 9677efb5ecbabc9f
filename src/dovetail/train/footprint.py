"""What a training step takes, measured on a real one: FLOP as torch counts them, bytes as autograd holds them."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

from dovetail.model.moe import LocalDispatcher
from dovetail.model.transformer import Transformer
from dovetail.text.corpus import Batch
from dovetail.train.loop import Run
from dovetail.train.step import compute_losses


@dataclass(frozen=True, slots=True, kw_only=True)
class StepFootprint:
    flop_per_token: float  # forward and backward, MTP included
    saved_bytes: int  # kept between forward and backward, parameters apart
    gradient_bytes: int


def measure_step(model: Transformer, length: int, batch_size: int) -> StepFootprint:
    """One forward and backward pass on random tokens; leaves no gradients behind."""
    device = model.norm.weight.device
    tokens = torch.randint(model.spec.vocab_size, (batch_size, length + 1), device=device)
    batch = Batch(tokens=tokens, document_ids=torch.zeros_like(tokens, dtype=torch.int32))
    own = {each.untyped_storage().data_ptr() for each in model.parameters()}
    saved: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(note, lambda tensor: tensor):
        losses = compute_losses(model, batch, separate_documents=False)
    torch.stack([losses.token, *losses.mtp]).sum().backward()
    gradients = sum(each.grad.nbytes for each in model.parameters() if each.grad is not None)
    model.zero_grad(set_to_none=True)
    return StepFootprint(
        flop_per_token=flop_per_token(model, batch), saved_bytes=sum(saved.values()), gradient_bytes=gradients
    )


def flop_per_token(model: Transformer, batch: Batch) -> float:
    """Forward and backward as torch counts them, in FP32: it sees its own products, not those of our BF16 kernels.

    More than the rule of `cost.count` by the attention scores, which are made a second time in the backward pass.
    """
    wide = copy.deepcopy(model).float()
    wide.dispatcher = LocalDispatcher(row_multiple=1)
    with FlopCounterMode(display=False) as counter:
        losses = compute_losses(wide, batch, separate_documents=False)
        torch.stack([losses.token, *losses.mtp]).sum().backward()
    return counter.get_total_flops() / batch.tokens[:, 1:].numel()


def state_bytes(run: Run) -> int:
    """Weights, FP32 masters, moments and the moving average, each storage once."""
    tensors = [*run.model.parameters(), *run.model.buffers()]
    tensors += [each for part in run.optimizer.state().values() for each in part.values()]
    tensors += [] if run.ema is None else run.ema.average.values()
    return sum({each.untyped_storage().data_ptr(): each.untyped_storage().nbytes() for each in tensors}.values())
