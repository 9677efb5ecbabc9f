"""Bytes on one GPU in serving: weights, the cache of latents, and buffers of exchanges.

Weights are those of the published FP8 checkpoint: codes and one FP32 scale for every 128 x 128 block, with embedding,
head and eh_proj in BF16, and norms and router in FP32. A rank has its share of the routed experts, redundant ones
included, and a copy of all other weights except attention's heads, which tp ranks share [V3 §3.4]. Where attention is
absorbed (decoding), kv_b is kept in BF16 [V3repo]. The cache is in BF16 by default; with tp > 1 every rank has all of
its sequences' latents.
"""

from __future__ import annotations

from dataclasses import dataclass

from dovetail.cost.count import cache_bytes_per_token
from dovetail.cost.memory.held import Held, held_by_ends, held_by_layer, held_by_mtp
from dovetail.cost.memory.stages import stages
from dovetail.cost.ops.ops import BF16, FP32
from dovetail.spec.layout import Layout
from dovetail.spec.model import ModelSpec

LOW_LATENCY_HEADER = 16  # bytes before each message [DeepEP]


@dataclass(frozen=True, slots=True, kw_only=True)
class InferenceMemory:
    """Bytes on one GPU. `cache_per_token` is for all layers that it holds."""

    experts: int  # weights of routed experts, with redundant copies
    others: int  # all other weights
    buffers: int
    cache_per_token: int

    @property
    def weights(self) -> int:
        return self.experts + self.others

    def tokens_that_fit(self, memory_bytes: float, reserved: float = 0.0) -> int:
        """Return the number of cached tokens that fit beside weights, buffers and `reserved` bytes, at least 0.

        `reserved` is for the runtime and for activations.
        """
        left = memory_bytes - self.weights - self.buffers - reserved
        return max(0, int(left // self.cache_per_token))


def inference_memory(
    spec: ModelSpec,
    layout: Layout,
    *,
    fp8: bool = True,
    absorbed: bool = True,
    mtp: bool = False,
    cache_element_bytes: float = BF16,
    low_latency_tokens: int = 0,
    rank: int = 0,
) -> InferenceMemory:
    """Return the bytes on pipeline rank `rank`.

    With `mtp` the MTP modules are served too. `low_latency_tokens` is the most tokens per rank and step that
    low-latency exchanges have buffers for, 0 for no buffers. Raises ValueError if attention is not MLA.
    """
    all_stages = stages(spec, layout)
    mine = [all_stages[index] for index in layout.stages_of(rank)]
    layers = [layer for stage in mine for layer in stage.layers]
    modules = sum(stage.mtp_modules(spec) for stage in mine) if mtp else 0
    held = [each for layer in layers for each in held_by_layer(spec, layer, layout)]
    held += modules * held_by_mtp(spec, layout)
    ends = spec if mtp else spec.model_copy(update={"num_nextn_predict_layers": 0})
    held += held_by_ends(ends, layout, mine)
    experts = [each for each in held if each.name.startswith("experts")]
    others = [each for each in held if not each.name.startswith("experts")]
    cached = cache_bytes_per_token(spec, cache_element_bytes) * (len(layers) + modules) // spec.num_hidden_layers
    slots = spec.moe.n_routed_experts + layout.redundant_experts if spec.moe else 0
    return InferenceMemory(
        experts=sum(_stored(each, fp8, absorbed) for each in experts),
        others=sum(_stored(each, fp8, absorbed) for each in others),
        buffers=low_latency_buffer(spec.hidden_size, low_latency_tokens, slots),
        cache_per_token=cached,
    )


def low_latency_buffer(hidden: int, tokens: int, experts: int) -> int:
    """Return the bytes of DeepEP's low-latency buffers for `tokens` per rank.

    There are two sets, each with a message to send and one to receive for every expert and token: 1.78 GiB for 128
    tokens and 256 experts at a hidden size of 7168.
    """
    scales = FP32 * hidden // 128
    message = max(LOW_LATENCY_HEADER + max(BF16 * hidden, hidden + scales), scales + BF16 * hidden)
    return 2 * message * tokens * (experts + experts) if tokens else 0


def _stored(held: Held, fp8: bool, absorbed: bool) -> int:
    if held.is_wide:
        return FP32 * held.elements
    is_coded = fp8 and held.site is not None and not held.is_stored_plain and not (absorbed and held.name == "kv_b")
    return held.elements + FP32 * held.blocks if is_coded else BF16 * held.elements
