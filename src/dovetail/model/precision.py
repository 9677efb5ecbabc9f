"""Applies a recipe to a model: it gives each layer its precision."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from dovetail.model.experts.mlp import DenseMlp
from dovetail.model.experts.moe import Experts, MoeMlp
from dovetail.model.experts.quantized_mlp import MlpPrecision
from dovetail.numerics.linear import Linear
from dovetail.numerics.operands.sending import check_sent_format
from dovetail.spec.precision import Recipe, Site

LINEAR_SITES: dict[str, Site] = {
    "q_proj": "attention_down",
    "q_a_proj": "attention_down",
    "kv_a_proj_with_mqa": "attention_down",
    "q_b_proj": "attention_up",
    "kv_b_proj": "attention_up",
    "o_proj": "attention_out",
    "eh_proj": "mtp_join",
}


def apply_recipe(model: nn.Module, recipe: Recipe) -> None:
    """Raises `ValueError` for a model that is not BF16, and for a recipe that training cannot run."""
    if recipe.expert_output is not None:
        check_sent_format(recipe.expert_output)
    dtypes = {module.weight.dtype for _, module in _linears(model)}
    if recipe.sites and dtypes - {torch.bfloat16}:
        raise ValueError(f"precision {recipe.name!r} quantises BF16 layers; this model is {dtypes}: use dtype bfloat16")
    for name, module in _linears(model):
        module.precision = recipe.sites.get(LINEAR_SITES[name])
    for module in model.modules():
        if isinstance(module, DenseMlp):
            module.precision = _mlp_precision(recipe, "mlp_up", "mlp_down")
        elif isinstance(module, Experts):
            module.precision = _mlp_precision(recipe, "expert_up", "expert_down")
        elif isinstance(module, MoeMlp):
            module.expert_output = recipe.expert_output


def has_recipe(model: nn.Module) -> bool:
    """Whether any layer computes otherwise than in its weights' format."""
    return any(
        module.expert_output is not None if isinstance(module, MoeMlp) else module.precision is not None
        for module in model.modules()
        if isinstance(module, Linear | DenseMlp | Experts | MoeMlp)
    )


def _linears(model: nn.Module) -> Iterator[tuple[str, Linear]]:
    for path, module in model.named_modules():
        if isinstance(module, Linear):
            name = path.rpartition(".")[2]
            if name in LINEAR_SITES:
                yield name, module


def _mlp_precision(recipe: Recipe, up_site: Site, down_site: Site) -> MlpPrecision | None:
    up, down = recipe.sites.get(up_site), recipe.sites.get(down_site)
    if up is None and down is None:
        return None
    if up is None or down is None:
        raise ValueError(f"recipe {recipe.name!r} quantises one of {up_site} and {down_site}: give both or none")
    return MlpPrecision(up=up, down=down, saved_swiglu=recipe.saved_swiglu)
