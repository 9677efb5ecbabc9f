"""AdamW with FP32 master weights and BF16 moments, as V3 trains [V3 §3.3.3, §4.2].

The compute copies of weights are BF16. A precision recipe may have FP32 moments.

    m = b1 m + (1 - b1) g;  v = b2 v + (1 - b2) g^2
    w = w - lr * (m / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + eps) + weight_decay * w)

m and v are updated in FP32 and stored rounded; the update uses the unrounded ones. The published betas leave BF16
moments room to move; values nearer to 1 are refused (`check_moments`). Parameters that are FP32
already (norms, gates) are their own master. Weight decay applies to matrices, not to norm weights (the paper
does not say; this is the field's habit).

torch.optim.AdamW takes BF16 moments beside FP32 parameters only on CUDA with fused=True, so this is written out.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import astuple, dataclass, replace
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from dovetail.config import Record
from dovetail.numerics import capability
from dovetail.parallel.weights.pieces import Piece
from dovetail.train.step import optim_numba


class AdamWConfig(Record):
    """Keys of a run file's [optimizer] table; defaults are V3's [V3 §4.2]."""

    beta1: float = Field(default=0.9, ge=0, lt=1)
    beta2: float = Field(default=0.95, ge=0, lt=1)
    eps: float = Field(default=1e-8, gt=0)
    weight_decay: float = Field(default=0.1, ge=0)
    max_grad_norm: float = Field(default=1.0, gt=0)


def check_moments(config: AdamWConfig, dtype: torch.dtype) -> None:
    """Raise ValueError where a moment could not follow its gradients.

    A step moves a moment x by (1 - beta) (new - x), so by (1 - beta) x where gradients have vanished. Numbers of the
    dtype are up to eps x apart, and a move of less than half of that is rounded away: x stays for ever.
    """
    room = torch.finfo(dtype).eps / 2  # 2^-8 for BF16
    for name in ("beta1", "beta2"):
        beta = getattr(config, name)
        if 1 - beta < room:
            raise ValueError(
                f"optimizer.{name} = {beta:g}: its moment is kept in {str(dtype).removeprefix('torch.')}, and would "
                f"stand still because 1 - {name} = {1 - beta:.2g} is below half the spacing of its numbers, "
                f'{room:.2g}; set train.precision to a recipe with moments = "float32", such as bf16-fp32-moments, '
                f"or {name} to at most {math.floor(1000 * (1 - room)) / 1000:g}"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Slot:
    """What one parameter needs; `master` is the parameter itself where that is FP32."""

    parameter: Tensor
    master: Tensor
    moment1: Tensor
    moment2: Tensor
    weight_decay: float

    @property
    def written(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.parameter.detach(), self.master, self.moment1, self.moment2


class AdamW:
    def __init__(
        self,
        parameters: Iterable[tuple[str, Tensor | Piece]],
        config: AdamWConfig,
        moments: Literal["bfloat16", "float32"] = "bfloat16",
    ) -> None:
        """Of a `Piece` of a parameter, that piece alone is updated, by its gradient [n], and its state is pieces too.

        Raises ValueError for a beta so near 1 that moments of that dtype would stand still.
        """
        self.config, dtype = config, getattr(torch, moments)
        check_moments(config, dtype)
        self.updates = 0
        self.slots: dict[str, Slot] = {}
        self._pieces: dict[str, Piece] = {}
        for name, given in parameters:
            if isinstance(given, Piece):
                self._pieces[name] = given
            parameter = given.flat if isinstance(given, Piece) else given
            data = parameter.detach()
            self.slots[name] = Slot(
                parameter=parameter,
                master=data if data.dtype == torch.float32 else data.float(),
                moment1=torch.zeros_like(data, dtype=dtype),
                moment2=torch.zeros_like(data, dtype=dtype),
                weight_decay=config.weight_decay if len(given.shape) > 1 else 0.0,
            )

    def grad_norm(self, gradients: Mapping[str, Tensor]) -> float:
        """Euclidean norm over all gradients; inf or nan if any element is."""
        return float(torch.stack(list(self.squares(gradients).values())).sum().sqrt())

    def squares(self, gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The sum of squares of each gradient, FP64."""
        found = sums_of_squares([gradients[name] for name in self.slots])
        return dict(zip(self.slots, found, strict=True))

    @torch.no_grad()
    def step(self, gradients: Mapping[str, Tensor], learning_rate: float, grad_scale: float) -> None:
        """One update with gradients (BF16 or FP32) times grad_scale, which is where clipping comes in."""
        self.updates += 1
        config = self.config
        correction1 = 1.0 - config.beta1**self.updates
        correction2 = 1.0 - config.beta2**self.updates
        coefficients = Coefficients(
            rate=learning_rate,
            corrected_rate=learning_rate / correction1,
            inverse_correction2=1.0 / correction2,
            grad_scale=grad_scale,
        )
        update(list(self.slots.values()), [gradients[name] for name in self.slots], config, coefficients)

    def state(self) -> dict[str, dict[str, Tensor | Piece]]:
        """What makes up the state, to be saved or loaded in place; `updates` is apart."""
        return {
            part: self.placed({name: getattr(slot, part) for name, slot in self.slots.items()})
            for part in ("master", "moment1", "moment2")
        }

    def placed(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor | Piece]:
        """Tensors shaped as the masters, such as their averages: as pieces where the parameters are."""
        return {
            name: replace(self._pieces[name], flat=tensor) if name in self._pieces else tensor
            for name, tensor in tensors.items()
        }

    @torch.no_grad()
    def refresh_parameters(self) -> None:
        """Round the masters into the compute copies, after masters were loaded."""
        for slot in self.slots.values():
            if slot.master is not slot.parameter:
                slot.parameter.copy_(slot.master)


@dataclass(frozen=True, slots=True, kw_only=True)
class Coefficients:
    rate: float
    corrected_rate: float  # divided by 1 - b1^t
    inverse_correction2: float
    grad_scale: float


def update(slots: Sequence[Slot], gradients: Sequence[Tensor], config: AdamWConfig, coefficients: Coefficients) -> None:
    rate, *others = astuple(coefficients)
    by_format = defaultdict[tuple[torch.dtype, ...], list[tuple[Slot, Tensor]]](list)
    for slot, gradient in zip(slots, gradients, strict=True):
        written = slot.written
        is_plain = slot.master.dtype == torch.float32 and all(tensor.is_contiguous() for tensor in written)
        if is_plain and capability.on_cpu(gradient, *written):
            by_format[*(tensor.dtype for tensor in (*written, gradient))].append((slot, gradient))
        else:
            update_reference(slot, gradient, config, coefficients)
    for pairs in by_format.values():
        optim_numba.update(
            [slot.written for slot, _ in pairs],
            [gradient for _, gradient in pairs],
            [rate * slot.weight_decay for slot, _ in pairs],
            (*others, config.beta1, config.beta2, config.eps),
        )


def update_reference(slot: Slot, gradient: Tensor, config: AdamWConfig, coefficients: Coefficients) -> None:
    g = gradient.float() * coefficients.grad_scale
    moment1 = config.beta1 * slot.moment1.float() + (1 - config.beta1) * g
    moment2 = config.beta2 * slot.moment2.float() + (1 - config.beta2) * g * g
    denominator = (moment2 * coefficients.inverse_correction2).sqrt() + config.eps
    master = (
        slot.master
        - slot.master * (coefficients.rate * slot.weight_decay)
        - coefficients.corrected_rate * moment1 / denominator
    )
    slot.master.copy_(master)
    slot.parameter.copy_(master)
    slot.moment1.copy_(moment1)
    slot.moment2.copy_(moment2)


def sums_of_squares(gradients: Sequence[Tensor]) -> list[Tensor]:
    """Of each, in FP64."""
    squares = {
        index: sum_of_squares_reference(each) for index, each in enumerate(gradients) if not capability.on_cpu(each)
    }
    by_format = defaultdict[torch.dtype, list[int]](list)
    for index, gradient in enumerate(gradients):
        if index not in squares:
            by_format[gradient.dtype].append(index)
    for indices in by_format.values():
        squares |= zip(indices, optim_numba.sums_of_squares([gradients[index] for index in indices]), strict=True)
    return [squares[index] for index in range(len(gradients))]


def sum_of_squares_reference(gradient: Tensor) -> Tensor:
    return gradient.double().square().sum()
