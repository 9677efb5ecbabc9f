"""Measures what a training step takes: FLOP as torch counts them, bytes as autograd holds them."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.flop_counter import FlopCounterMode

from dovetail.catalog.precision import load_recipe
from dovetail.model.experts.moe import LocalDispatcher
from dovetail.model.precision import apply_recipe
from dovetail.model.transformer import Block, Transformer
from dovetail.text.corpus import Batch
from dovetail.train.run.state import Run
from dovetail.train.step.losses import compute_losses


@dataclass(frozen=True, slots=True, kw_only=True)
class StepFootprint:
    flop_per_token: float  # forward and backward, MTP included
    saved: dict[str, int]  # bytes kept between forward and backward, by the parts of cost.activations
    gradient_bytes: int

    @property
    def saved_bytes(self) -> int:
        return sum(self.saved.values())


def measure_step(model: Transformer, length: int, batch_size: int) -> StepFootprint:
    """One forward and backward pass on random tokens; leaves no gradients behind."""
    batch = random_batch(model, length, batch_size)
    with counting_saved(model) as ledger:
        losses = compute_losses(model, batch, separate_documents=False)
    saved = ledger.by_part()
    torch.stack([losses.token, *losses.mtp]).sum().backward()
    gradients = sum(each.grad.nbytes for each in model.parameters() if each.grad is not None)
    model.zero_grad(set_to_none=True)
    return StepFootprint(flop_per_token=flop_per_token(model, batch), saved=saved, gradient_bytes=gradients)


def flop_per_token(model: Transformer, batch: Batch) -> float:
    """Forward and backward as torch counts them, in FP32: it sees its own products, not those of our BF16 kernels.

    More than the rule of `cost.count` by the attention scores, which are made a second time in the backward pass.
    """
    wide = copy.deepcopy(model)
    apply_recipe(wide, load_recipe("bf16"))
    wide.float()
    wide.dispatcher = LocalDispatcher(row_multiple=1)
    with FlopCounterMode(display=False) as counter:
        losses = compute_losses(wide, batch, separate_documents=False)
        torch.stack([losses.token, *losses.mtp]).sum().backward()
    return counter.get_total_flops() / batch.tokens[:, 1:].numel()


def random_batch(model: Transformer, length: int, batch_size: int) -> Batch:
    tokens = torch.randint(model.spec.vocab_size, (batch_size, length + 1), device=model.norm.weight.device)
    return Batch(tokens=tokens, document_ids=torch.zeros_like(tokens, dtype=torch.int32))


class Ledger:
    """Which part of the model saved which memory first; parameters belong to none."""

    def __init__(self, model: nn.Module) -> None:
        self.part = "ends"
        self._own = {_storage(each) for each in model.parameters()}
        self._entries: dict[StorageWeakRef, tuple[str, int]] = {}
        self._shared: dict[StorageWeakRef, str] = {}

    def note(self, tensor: Tensor) -> Tensor:
        storage = _storage(tensor)
        if storage not in self._own:
            part = self._shared.get(storage, self.part)
            self._entries.setdefault(storage, (part, tensor.untyped_storage().nbytes()))
        return tensor

    def share(self, *tensors: Tensor) -> None:
        """These belong to the part at hand, whoever saves them."""
        for tensor in tensors:
            self._shared.setdefault(_storage(tensor), self.part)

    def by_part(self) -> dict[str, int]:
        """Bytes that are still held."""
        total: dict[str, int] = {}
        for storage, (part, size) in self._entries.items():
            if not storage.expired():
                total[part] = total.get(part, 0) + size
        return total


@contextmanager
def counting_saved(model: Transformer) -> Iterator[Ledger]:
    """While one microbatch's losses are computed. Raises ValueError for a model that recomputes: what it makes again
    never comes by."""
    if model.recompute:
        raise ValueError("a model with recompute = true keeps recipes in place of tensors: count one without")
    ledger = Ledger(model)
    depths = iter(range(-1, len(model.mtp)))

    def before_embedding(module: nn.Module, inputs: Any) -> None:
        depth = next(depths)
        ledger.part = "ends" if depth < 0 else f"mtp {depth}"

    def before_block(block: Block, inputs: Any) -> None:
        ledger.share(inputs[1].cos, inputs[1].sin)
        if ledger.part == "ends":
            ledger.part = f"layer {block.layer}"

    def after_block(block: Block, inputs: Any, output: Tensor) -> None:
        if ledger.part == f"layer {block.layer}":
            ledger.part = "ends"

    def after_output(module: nn.Module, inputs: Any, output: Any) -> None:
        ledger.part = "losses"

    blocks = [module for module in model.modules() if isinstance(module, Block)]
    handles = [model.embed_tokens.register_forward_pre_hook(before_embedding)]
    handles += [block.register_forward_pre_hook(before_block) for block in blocks]
    handles += [block.register_forward_hook(after_block) for block in blocks]
    handles += [module.register_forward_hook(after_output) for module in (model.norm, *model.mtp)]
    try:
        with saved_tensors_hooks(ledger.note, lambda tensor: tensor):
            yield ledger
    finally:
        for handle in handles:
            handle.remove()


def _storage(tensor: Tensor) -> StorageWeakRef:
    """Equal for tensors in the same memory; unlike an address it is never used again."""
    return StorageWeakRef(tensor.untyped_storage())


def state_bytes(run: Run) -> int:
    """Weights, FP32 masters, moments and the moving average, each storage once."""
    tensors = [*run.model.parameters(), *run.model.buffers()]
    tensors += [each for slot in run.optimizer.slots.values() for each in slot.written]
    tensors += [] if run.ema is None else run.ema.average.values()
    return sum({each.untyped_storage().data_ptr(): each.untyped_storage().nbytes() for each in tensors}.values())
