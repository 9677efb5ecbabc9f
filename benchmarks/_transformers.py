"""The other side: transformers' DeepseekV3ForCausalLM with the weights of our model, and ways to run it.

What it does of itself: the experts' `grouped_mm` runs in the dtype of the weights (autocast does not reach it),
`loop` is its eager loop over experts, `batched_mm` gathers the weights of every choice of every token.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, DeepseekV3ForCausalLM

from dovetail.model.transformer import Transformer, initialize
from dovetail.numerics.cpu.allocator import keep_freed_memory
from dovetail.spec.hf_config import write_hf
from dovetail.spec.model import ModelSpec

SEED = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Rival:
    """One way to run it."""

    attention: str = "eager"  # or sdpa
    experts: str = "grouped_mm"  # or eager (a loop), batched_mm
    keeps_memory: bool = True  # the allocator setting that dovetail has
    is_compiled: bool = False
    has_static_cache: bool = False  # decoding only: room for all tokens from the start, nothing joined

    @property
    def name(self) -> str:
        parts = [self.attention, "loop" if self.experts == "eager" else self.experts]
        parts += [] if self.keeps_memory else ["default malloc"]
        parts += ["static cache"] if self.has_static_cache else []
        parts += ["compiled"] if self.is_compiled else []
        return "transformers " + ", ".join(parts)


def parse_rival(text: str) -> Rival:
    """From words joined by +, in any order: eager sdpa, grouped_mm loop batched_mm, malloc, compiled, static."""
    words = text.split("+")
    known = {"eager", "sdpa", "grouped_mm", "loop", "batched_mm", "malloc", "compiled", "static"}
    if unknown := set(words) - known:
        raise ValueError(f"{text!r}: {', '.join(sorted(unknown))} is not among {', '.join(sorted(known))}")
    experts = next((word for word in words if word in ("grouped_mm", "loop", "batched_mm")), "grouped_mm")
    return Rival(
        attention="sdpa" if "sdpa" in words else "eager",
        experts="eager" if experts == "loop" else experts,
        keeps_memory="malloc" not in words,
        is_compiled="compiled" in words,
        has_static_cache="static" in words,
    )


def build_rival(spec: ModelSpec, rival: Rival, dtype: torch.dtype) -> Any:
    """The model of `spec` without MTP, weights of seed SEED as `initialize` draws them."""
    if rival.keeps_memory:
        keep_freed_memory()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    config: Any = AutoConfig.for_model(**write_hf(spec.model_copy(update={"num_nextn_predict_layers": 0})))
    config._attn_implementation, config._experts_implementation = rival.attention, rival.experts
    model: Any = DeepseekV3ForCausalLM(config)  # its annotations do not hold under a strict checker
    ours = build_ours(spec, torch.float32)
    weights = {key: value for name, tensor in ours.state_dict().items() for key, value in _renamed(name, tensor)}
    model.load_state_dict(weights)
    model.to(dtype)
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.data = buffer.data.float()  # as its own loader keeps them
    return model


def build_ours(spec: ModelSpec, dtype: torch.dtype, with_mtp: bool = False) -> Transformer:
    """Ours, of the same seed; MTP weights are drawn last, so the rest is alike with and without."""
    kept = spec if with_mtp else spec.model_copy(update={"num_nextn_predict_layers": 0})
    model = Transformer(kept, dtype=dtype)
    initialize(model, SEED)
    return model


def _renamed(name: str, tensor: Tensor) -> list[tuple[str, Tensor]]:
    """Our name and tensor as theirs: their stacked experts are ours, their gate and up matrices are apart."""
    prefix = "" if name.startswith("lm_head") else "model."
    if name.endswith("gate_up_proj.weight"):
        gate, up = tensor.chunk(2)
        return [
            (prefix + name.replace("gate_up_proj", "gate_proj"), gate),
            (prefix + name.replace("gate_up_proj", "up_proj"), up),
        ]
    return [(prefix + name, tensor)]
