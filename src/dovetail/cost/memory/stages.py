"""Divides the layers of a model among the stages of a pipeline.

Layers stay in order and every stage has at least one. Unless a layout says how many layers each stage has, the heaviest
stage is made as light as possible, in forward FLOP per token, and then the others as equal as possible. The embedding
(a look-up that counts as no work) is on the first stage; the head and the MTP modules, each of which runs a layer and
the head once more, are on the last [V3 §3.2.3]. For DeepSeek-V3 on 16 stages that is four layers on each stage but the
last, which has one layer, the MTP module and the head, as much arithmetic as five layers. DeepSeek's published profile
has four layers per chunk too [profile-data].
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate

from dovetail.cost.count import attention_flop_per_token, expert_parameters, layer_parameters, mtp_flop_per_token
from dovetail.spec.layout import Layout
from dovetail.spec.model import ModelSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """Consecutive layers of the main model, and what else is on their stage."""

    layers: tuple[int, ...]
    has_embedding: bool
    has_head: bool  # with the final norm and the losses

    def mtp_modules(self, spec: ModelSpec) -> int:
        return spec.num_nextn_predict_layers if self.has_head else 0


def stages(spec: ModelSpec, layout: Layout, context: int = 4096) -> tuple[Stage, ...]:
    """Return all stages, first to last. `context` is the length of sequences, which decides attention's FLOP."""
    counts = layout.stage_layers
    return _cut(_balanced_layers(spec, layout.num_stages, context) if counts is None else counts)


@lru_cache(maxsize=1024)
def _cut(counts: tuple[int, ...]) -> tuple[Stage, ...]:
    ends = tuple(accumulate(counts))
    return tuple(
        Stage(
            layers=tuple(range(last - count, last)),
            has_embedding=last == count,
            has_head=index == len(counts) - 1,
        )
        for index, (count, last) in enumerate(zip(counts, ends, strict=True))
    )


@lru_cache(maxsize=1024)
def _balanced_layers(spec: ModelSpec, num_stages: int, context: int) -> tuple[int, ...]:
    weights = tuple(_forward_flop(spec, layer, context) for layer in range(spec.num_hidden_layers))
    end = 2.0 * spec.vocab_size * spec.hidden_size + mtp_flop_per_token(spec, context)
    return _balanced(weights, end, num_stages)


def _forward_flop(spec: ModelSpec, layer: int, context: int) -> float:
    parameters = layer_parameters(spec, layer)
    active = parameters.total - parameters.routed_experts
    if spec.moe and parameters.routed_experts:
        active += spec.moe.num_experts_per_tok * expert_parameters(spec)
    return 2.0 * active + attention_flop_per_token(spec, context) / spec.num_hidden_layers


def _balanced(weights: tuple[float, ...], end: float, num_stages: int) -> tuple[int, ...]:
    """Return the layers per stage with the smallest maximum, then the smallest sum of squares.

    `weights` are the FLOP of each layer, and `end` those that the last stage has in addition.
    """
    layers = len(weights)
    assert 0 < num_stages <= layers, (num_stages, layers)
    before = (0.0, *accumulate(weights))
    # best[n] is for n layers on the stages so far: (largest stage, sum of squares, layers of each stage).
    best: dict[int, tuple[float, float, tuple[int, ...]]] = {0: (0.0, 0.0, ())}
    for stage in range(num_stages):
        is_last = stage == num_stages - 1
        left = num_stages - stage - 1
        reach = 2 * -(-layers // num_stages) + 1  # a stage twice as long as the mean is never the best
        found: dict[int, tuple[float, float, tuple[int, ...]]] = {}
        for start, (largest, squares, counts) in best.items():
            stops = [layers] if is_last else range(start + 1, min(layers - left, start + reach) + 1)
            for stop in stops:
                weight = before[stop] - before[start] + (end if is_last else 0.0)
                candidate = max(largest, weight), squares + weight * weight, (*counts, stop - start)
                if stop > start and (stop not in found or candidate < found[stop]):
                    found[stop] = candidate
        best = found
    return best[layers][2]
