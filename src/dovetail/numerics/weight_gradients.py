"""Weight gradients apart from input gradients: the one hook where a backward pass can be cut in two.

A layer's backward pass has two halves. The gradient of its input is what the layer before it waits for; nobody waits
for the gradient of its weight. Zero-bubble schedules and DualPipe fill idle time with the second half
[arXiv 2401.10241; V3 §3.2.1]. Every layer that multiplies by a matrix makes its weight's gradient through
`now_or_later`: at once, or, where the layer has been given a `WeightGradients`, when that is told to.

Left out are norm weights, whose gradient comes with the input's in one pass over memory, the embedding, which has no
input gradient, and the head, whose gradient the loss makes in its forward pass.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


class WeightGradients:
    """Gradients that wait to be made, in the order of the backward pass that put them off."""

    def __init__(self) -> None:
        self._waiting: list[tuple[Tensor, Callable[[], Tensor]]] = []

    def __len__(self) -> int:
        return len(self._waiting)

    def put_off(self, weight: Tensor, make: Callable[[], Tensor]) -> None:
        self._waiting.append((weight, make))

    def take(self) -> WeightGradients:
        """What waits here, to be made later; after this nothing waits here. So the input half of the next micro-batch
        may run before the weight half of this one."""
        taken = WeightGradients()
        taken._waiting, self._waiting = self._waiting, taken._waiting
        return taken

    @torch.no_grad()
    def make(self) -> None:
        """Make all that waits and add it to each weight's `.grad`."""
        for weight, make in self.take()._waiting:
            gradient = make()
            weight.grad = gradient if weight.grad is None else weight.grad + gradient


def now_or_later(later: WeightGradients | None, weight: Tensor, make: Callable[[], Tensor]) -> Tensor | None:
    """`make()`, or None where it is put off: what an autograd function returns for its weight."""
    if later is None:
        return make()
    later.put_off(weight, make)
    return None
