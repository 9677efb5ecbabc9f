"""Bytes that training or generation needs in one process, without parallelism.

State (weights, master weights, gradients, moments, moving average) is exact: it is counted tensor by tensor from the
checkpoint's own list. Activations are those that `cost.memory.activations` lists, exact for one sequence whose expert
rows need no padding, and the logits of one chunk. The band around them covers what is not listed: expert rows padded
to whole tiles, gradients and work buffers of the current layer, the allocator's holes. The runtime itself (Python,
torch and its libraries) is not counted.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from dovetail.cost.count import cache_bytes_per_token
from dovetail.cost.memory.activations import PLAIN, microbatch_bytes
from dovetail.cost.ops.ops import BF16, FP32
from dovetail.spec.model import ModelSpec
from dovetail.spec.precision import Recipe
from dovetail.spec.tensors import stored_tensors

BAND = (0.9, 1.5)  # of the activations


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingMemory:
    """Bytes by use. The peak of `activations` is expected within `BAND`; the others are exact."""

    weights: int  # BF16; norms and router FP32
    master_weights: int  # FP32 copies of the BF16 weights
    gradients: int
    moments: int  # both of AdamW, in the recipe's dtype: BF16 [V3 §3.3.3]
    moving_average: int  # in FP32; 0 without one
    activations: int

    @property
    def state(self) -> int:
        return self.weights + self.master_weights + self.gradients + self.moments + self.moving_average

    @property
    def total(self) -> int:
        return self.state + self.activations

    @property
    def band(self) -> tuple[int, int]:
        """The least and the most total bytes to expect."""
        return self.state + int(BAND[0] * self.activations), self.state + int(BAND[1] * self.activations)


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationMemory:
    """Bytes of weights and of a full cache, both exact."""

    weights: int
    cache: int

    @property
    def total(self) -> int:
        return self.weights + self.cache


def moment_bytes(recipe: Recipe) -> int:
    """Return the bytes of one element of either of AdamW's moments."""
    return BF16 if recipe.moments == "bfloat16" else FP32


def training_memory(
    spec: ModelSpec,
    tokens: int,
    *,
    recipe: Recipe = PLAIN,
    moving_average: bool = True,
    recompute: bool = False,
    gradient_bytes: int = FP32,
    loss_chunk: int = 1 << 24,
) -> TrainingMemory:
    """Return the bytes to train `spec` on microbatches of `tokens` tokens in the precision of `recipe`.

    With `recompute` RMSNorm outputs and MLA up-projections are recomputed and not kept [V3 §3.2.3]. `gradient_bytes`
    is per parameter (FP32 where microbatches accumulate), and `loss_chunk` the number of logits that exist at once.
    """
    narrow, wide = _trained_parameters(spec)
    activations = sum(microbatch_bytes(spec, 1, tokens, recipe, recompute).values())
    activations += BF16 * min(tokens * spec.vocab_size, loss_chunk)
    return TrainingMemory(
        weights=weight_bytes(spec),
        master_weights=FP32 * narrow,
        gradients=gradient_bytes * (narrow + wide),
        moments=2 * moment_bytes(recipe) * (narrow + wide),
        moving_average=FP32 * (narrow + wide) if moving_average else 0,
        activations=activations,
    )


def generation_memory(spec: ModelSpec, batch: int, context: int, mtp: bool = False) -> GenerationMemory:
    """Return the bytes to generate with `batch` sequences of up to `context` tokens; `mtp` adds the modules' cache."""
    return GenerationMemory(weights=weight_bytes(spec), cache=batch * context * cache_bytes_per_token(spec, BF16, mtp))


def weight_bytes(spec: ModelSpec) -> int:
    """Return the bytes of the weights in use: BF16, with norms, router weights and biases in FP32."""
    return sum(
        math.prod(tensor.shape) * (FP32 if tensor.dtype == "F32" else BF16)
        for tensor in stored_tensors(spec)
        if not tensor.copy_of
    )


def _trained_parameters(spec: ModelSpec) -> tuple[int, int]:
    """Return the number of BF16 and of FP32 parameters that have a gradient; the gate's bias has none."""
    narrow = wide = 0
    for tensor in stored_tensors(spec):
        if tensor.copy_of or tensor.name.endswith("e_score_correction_bias"):
            continue
        if tensor.dtype == "F32":
            wide += math.prod(tensor.shape)
        else:
            narrow += math.prod(tensor.shape)
    return narrow, wide
