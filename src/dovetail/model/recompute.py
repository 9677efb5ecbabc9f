"""Recomputes values in the backward pass that are cheap to make again [V3 §3.2.3].

They are RMSNorm outputs and MLA's up-projections.

A layer names such a value by `Recompute.again(function, *inputs)`. Whoever saves the result for its backward pass
then keeps the way to make it instead; the inputs are kept anyway. Values are bit for bit the same, since the same
function runs on the same inputs. Routing is never recomputed.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

Outputs = Tensor | tuple[Tensor, ...]


class Maker:
    """How to make the results of one call again; they are kept from the first use to the last."""

    def __init__(self, function: Callable[..., Outputs], inputs: tuple[Any, ...]) -> None:
        self._function, self._inputs = function, inputs
        self._results: tuple[Tensor, ...] | None = None
        self.uses = 0  # saved and not yet asked for

    @torch.no_grad()
    def make(self, index: int) -> Tensor:
        if self._results is None:
            outputs = self._function(*map(_unpack, self._inputs))
            self._results = outputs if isinstance(outputs, tuple) else (outputs,)
        result = self._results[index]
        self.uses -= 1
        if self.uses == 0:
            self._results = None
        return result


class Recompute:
    """The recipes of one forward pass, and the hooks that use them."""

    def __init__(self) -> None:
        self._makers: dict[int, tuple[weakref.ref[Tensor], Maker, int]] = {}

    def again(self, function: Callable[..., Any], *inputs: Any) -> Any:
        """function(*inputs), to be made again rather than saved."""
        outputs = function(*inputs)
        if torch.is_grad_enabled():
            # What is itself made again is not kept for the sake of what is made of it.
            maker = Maker(function, tuple(self._pack(x) if isinstance(x, Tensor) else x for x in inputs))
            for index, output in enumerate(outputs if isinstance(outputs, tuple) else (outputs,)):
                # A dead reference means that the memory may be somebody else's by now.
                self._makers[_address(output)] = (weakref.ref(output), maker, index)
        return outputs

    def hooks(self) -> saved_tensors_hooks:
        return saved_tensors_hooks(self._pack, _unpack)

    def _pack(self, tensor: Tensor) -> Any:
        reference, maker, index = self._makers.get(_address(tensor), (None, None, 0))
        if maker is None or reference is None or reference() is None:
            return tensor
        maker.uses += 1
        return maker, index, tensor.shape, tensor.stride(), tensor.storage_offset()


def _unpack(packed: Any) -> Any:
    if not isinstance(packed, tuple):
        return packed
    maker, index, *geometry = packed
    made: Tensor = maker.make(index)
    return made.as_strided(*geometry)


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
