"""Watches a recipe's quantised operands during one step, with hooks.

A step that is not watched pays nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from dovetail.model.experts.mlp import DenseMlp
from dovetail.model.experts.moe import Experts
from dovetail.numerics.linear import Linear
from dovetail.numerics.operands.health import Health, measure_health
from dovetail.numerics.operands.operands import quantize_blocks, quantize_rows
from dovetail.spec.precision import Quantization


@dataclass(slots=True)
class Watched:
    """Operands of one layer, filled while the step runs: input and weight in the forward pass, grad in the backward."""

    health: dict[str, Health] = field(default_factory=dict)

    def rows(self, name: str, x: Tensor, quantization: Quantization) -> None:
        rows = x.detach().flatten(0, -2).contiguous()
        self.health[name] = measure_health(rows, quantize_rows(rows, quantization))

    def weight(self, name: str, weight: Tensor, quantization: Quantization) -> None:
        stacked = weight.detach() if weight.ndim == 3 else weight.detach()[None]
        self.health[name] = measure_health(stacked, quantize_blocks(stacked, quantization))


@contextmanager
def watch(models: Iterable[nn.Module]) -> Iterator[dict[str, Watched]]:
    """Layers in a recipe's precision by name; what they hold is complete once forward and backward have run."""
    layers: dict[str, Watched] = {}
    handles = []
    for name, module in (named for model in models for named in model.named_modules()):
        if isinstance(module, Linear | DenseMlp | Experts) and module.precision is not None:
            layers[name] = Watched()
            handles.append(module.register_forward_hook(_observer(layers[name])))
    try:
        yield layers
    finally:
        for handle in handles:
            handle.remove()


def _observer(watched: Watched) -> Any:
    def observe(module: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        with torch.no_grad():
            if isinstance(module, Linear):
                precision = grad_precision = module.precision
                assert precision is not None
                watched.weight("weight", module.weight, precision.weight)
            else:
                precision, grad_precision = module.precision.up, module.precision.down
                up, down = (getattr(each, "weight", each) for each in (module.gate_up_proj, module.down_proj))
                watched.weight("up_weight", up, precision.weight)
                watched.weight("down_weight", down, grad_precision.weight)
            is_received = isinstance(module, Experts) and inputs[2] is not None  # rounded by another rank
            if not is_received:
                watched.rows("input", inputs[0], precision.input)
        if output.requires_grad:
            output.register_hook(lambda grad: watched.rows("grad", grad, grad_precision.grad))

    return observe
