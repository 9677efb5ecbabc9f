"""What one process makes of rows that are rounded as wires round them, and faults of formats and of wires."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from experts_on_ranks import CHOICES, Case, Result, layer_of, on_ranks, routing_of
from torch import Tensor

from dovetail.catalog.precision import load_recipe
from dovetail.model.experts.moe import LocalDispatcher, Places, summed, weighted
from dovetail.numerics.formats.floats import float_format
from dovetail.numerics.formats.quantize import dequantize
from dovetail.numerics.formats.quantized import Quantized
from dovetail.numerics.operands.operands import quantize_rows
from dovetail.numerics.operands.sending import sent
from dovetail.parallel.experts import wire
from dovetail.parallel.experts.formats import Plain, Scaled, formats_of
from dovetail.parallel.experts.wire import Wire
from dovetail.parallel.traffic import DamagedError
from dovetail.spec.precision import Quantization

Rounding = Callable[[Tensor], Tensor]


def on_one_in_formats(cases: list[Case]) -> list[list[Result]]:
    """What one process makes of the tokens of each ep group: rank 0 does it."""
    if dist.get_rank() > 0:
        return []
    return [
        [_alone(case.part(first, first + case.ep)) for first in range(0, len(case.tokens), case.ep)] for case in cases
    ]


def _alone(case: Case) -> Result:
    """The recipe itself quantises what experts take; rows come home, and gradients go out, as they are sent."""
    x, routing, layer = case.x.clone().requires_grad_(), routing_of(case, len(case.down)), layer_of(case)
    dispatched = LocalDispatcher().dispatch(x, routing)
    places = dispatched.way_back
    assert isinstance(places, Places)
    made = layer(dispatched.rows, dispatched.offsets)
    is_one, back = case.hops == "one", _back(case)
    arrived = (back(made) if is_one else made).detach().requires_grad_()
    output = weighted(arrived, routing.weights, places)
    grad = case.grad if is_one else _gradient(case, case.grad)
    arrived_grad, weights = torch.autograd.grad(output, (arrived, routing.weights), grad)
    made_grad = _gradient(case, arrived_grad) if is_one else arrived_grad
    leaves = (dispatched.rows, layer.gate_up_proj, layer.down_proj)
    rows_grad, gate_up, down = torch.autograd.grad(made, leaves, made_grad)
    if is_one:
        x_grad = summed(rows_grad, places.row_ids)
    else:
        output = _in_two_hops(case, made.detach(), case.weights, places.row_ids, back)
        x_grad = _in_two_hops(case, rows_grad, torch.ones_like(case.weights), places.row_ids, lambda rows: rows)
    return Result(output=output.detach(), x=x_grad, weights=weights, gate_up=gate_up, down=down)


def _back(case: Case) -> Rounding:
    return lambda rows: rows if case.back == "bf16" else sent(rows, case.back)


def _gradient(case: Case, grad: Tensor) -> Tensor:
    """As it arrives at the experts."""
    site = load_recipe(case.recipe).sites.get("expert_down")
    if site is None or site.grad.tile != "row" or not site.grad.power_of_two:
        return grad
    return dequantize(quantize_rows(grad.contiguous(), site.grad), grad.dtype)


def _in_two_hops(case: Case, rows: Tensor, weights: Tensor, row_ids: Tensor, rounding: Rounding) -> Tensor:
    """Sums on each rank, then on each node, then on the token's rank; rounded on each wire that there is."""
    tokens, here = torch.arange(len(weights)), len(case.down) // case.ep
    each = min(case.ep, case.ranks_per_node)
    copies, has_copy = [], []
    for rank in range(case.ep):
        is_here = case.ids // here == rank
        ids = row_ids.masked_fill(~is_here, -1)
        token_ids = torch.full((len(rows),), -1).scatter_(0, ids[ids >= 0], tokens[:, None].expand_as(ids)[ids >= 0])
        copies.append(weighted(rows, weights, Places(row_ids=ids, token_ids=token_ids)))
        has_copy.append(is_here.any(1))

    def add(parts: list[Tensor], is_there: list[Tensor], has_wire: bool) -> Tensor:
        places = [torch.where(there, tokens + part * len(tokens), -1) for part, there in enumerate(is_there)]
        sent_home = torch.cat([rounding(part) if has_wire else part for part in parts])
        return summed(sent_home, torch.stack(places, 1))

    nodes, has_node = [], []
    for first in range(0, case.ep, each):
        nodes.append(add(copies[first : first + each], has_copy[first : first + each], each > 1))
        has_node.append(torch.stack(has_copy[first : first + each]).any(0))
    return add(nodes, has_node, case.ep > each)


# ---- Formats with a fault each ----


def with_faults(cases: list[Case], fault: str) -> list[Result]:
    with FAULTS[fault]():
        return on_ranks(cases)


@contextmanager
def _changed_scales(change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    quantized = Scaled.quantized

    def changed(self: Scaled, sent: Tensor, columns: int) -> Quantized:
        right = quantized(self, sent, columns)
        return replace(right, scale=change(right.scale).contiguous())

    with patch.object(Scaled, "quantized", changed):
        yield


@contextmanager
def _quantised_on_the_way() -> Iterator[None]:
    """Rows of two tiles are made numbers where they arrive, and FP8 once more, under other scales."""
    exchange, format = Wire._exchange, Scaled(Quantization())

    def again(self: Wire, rows: Tensor, given: list[int], taken: list[int], operation: str) -> Tensor:
        arrived = exchange(self, rows, given, taken, operation)
        if operation != "dispatch":
            return arrived
        row, choices = arrived.tensor_split([-8 * CHOICES], dim=1)
        return torch.cat((format.encode(format.decode(row, row.shape[1] - 8, torch.bfloat16)), choices), dim=1)

    with patch.object(Wire, "_exchange", again):
        yield


FAULTS: dict[str, Callable[[], Any]] = {
    "none": nullcontext,
    "quantised on the way": _quantised_on_the_way,
    "scales lost": lambda: _changed_scales(torch.ones_like),
    "scales of the next tile": lambda: _changed_scales(lambda scale: scale.roll(1, 1)),
    "scales of the next row": lambda: _changed_scales(lambda scale: scale.roll(1, 0)),
}


# ---- Bits that flip on their way ----


class _Flipping:
    """A collective under way, of which one bit flips."""

    def __init__(self, work: Any, message: Callable[[], Tensor], chance: random.Random) -> None:
        self.work, self.message, self.chance = work, message, chance

    def wait(self) -> None:
        self.work.wait()
        message = self.message()  # [bytes] uint8, a view
        bit = self.chance.randrange(8 * len(message))
        message[bit // 8] ^= 1 << bit % 8


def flipped(case: Case, exchange: int, seed: int) -> tuple[int, str, bool]:
    """Exchange number `exchange` brings each rank a message of which one bit has flipped: the world's rank that it is
    from, what this rank says, and whether there was such an exchange. Every rank has a fault in the same exchange,
    so that none waits for one that has given up."""
    chance, count, source = random.Random(100 * seed + dist.get_rank()), 0, -1
    all_to_all = dist.all_to_all_single

    def flipping(arrived: Tensor, rows: Tensor, taken: list[int], given: list[int], **rest: Any) -> Any:
        nonlocal count, source
        work = all_to_all(arrived, rows, taken, given, **rest)
        count += 1
        if count != exchange + 1:
            return work
        some = [index for index, size in enumerate(taken) if size]
        if not some:
            return work
        member = chance.choice(some)
        source = dist.get_process_group_ranks(rest["group"])[member]
        return _Flipping(work, lambda: arrived.split(taken)[member].view(-1), chance)

    try:
        with patch.object(wire.dist, "all_to_all_single", flipping):
            on_ranks([case])
    except DamagedError as error:
        return source, str(error), count > exchange
    return source, "", count > exchange


def formats_named(recipes: list[str]) -> dict[str, tuple[str, str]]:
    """What goes out under each, forwards and backwards."""

    def name(format: object) -> str:
        if isinstance(format, Plain):
            return "plain"
        assert isinstance(format, Scaled)
        return float_format(format.quantization.format).name

    found = {recipe: formats_of(load_recipe(recipe), "bf16") for recipe in recipes}
    return {recipe: (name(formats.out), name(formats.out_gradient)) for recipe, formats in found.items()}
