"""Dispatchers that take tokens to experts on other ranks: in one hop, or in two [V3 §3.2.2].

    OneHop    a row for each choice, straight to the rank of its expert; the token's rank weighs and sums what comes
              back, in the order of choices: bit for bit what `LocalDispatcher` does
    TwoHop    a row for each node that has one of the token's experts, over the NIC to the rank with the same index
              there, and from it a row for each rank of the node that has one. Combine goes the same way back: the
              experts' rank weighs and sums a token's rows, the rank with the same index sums those of its node, so
              that one row per token and node goes over the NIC, and the token's rank sums the nodes

Where the gate limits a token to M nodes [V3 §2.1.2], the NIC carries at most M rows of it in two hops, and up to K, the
number of its experts, in one.

Sums are FP32; each is rounded to the rows' type once, and for a wire to its format (`parallel.experts.formats`). Rows
of an expert are in the order of ranks and tokens, as `LocalDispatcher` has them with the tokens of all ranks, so that
experts compute the same numbers. Rank m of the ep group has the m-th block of E / ep experts.

One exchange of counts tells each rank how many rows to expect. In two hops a row has its token's choices and weights
with it, 8 bytes a choice; gradients of weights come home on their own, 4 bytes a choice.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dovetail.model.experts.gate import Routing
from dovetail.model.experts.moe import Dispatched, Places, plan_rows, weighted
from dovetail.numerics.products.grouped import row_multiple
from dovetail.parallel.experts.formats import ALL_PLAIN, Format, Formats, decode, encode, received
from dovetail.parallel.experts.path import Path, Sort, arrived, carried, home
from dovetail.parallel.experts.wire import Wire, swap
from dovetail.parallel.mesh import Group, Mesh
from dovetail.parallel.traffic import Traffic


@dataclass(frozen=True, slots=True, kw_only=True)
class _OneHopBack:
    by_expert: Places  # of a row for each choice, on the token's rank
    path: Path  # of these rows


@dataclass(frozen=True, slots=True, kw_only=True)
class _TwoHopBack:
    path: Path
    places: Places  # of the experts' rows among the copies that came
    weights: Tensor  # [copies, K] FP32


class OneHop:
    """All-to-all over the ep group. `row_multiple` is that of `LocalDispatcher`."""

    def __init__(self, mesh: Mesh, formats: Formats = ALL_PLAIN, row_multiple: int | None = None) -> None:
        self.mesh, self.formats = mesh, formats
        self.row_multiple = row_multiple
        self.traffic = Traffic()

    def dispatch(self, x: Tensor, routing: Routing) -> Dispatched:
        group = self.mesh.ep
        _, row_ids, token_ids = plan_rows(routing.expert_ids, routing.counts, 1)
        by_expert = Places(row_ids=row_ids, token_ids=token_ids)
        given = routing.counts.view(group.size, -1)  # [ranks, experts of a rank]
        taken = swap(given, group, self.traffic)
        wire = Wire(group=group, sent=given.sum(1).tolist(), received=taken.sum(1).tolist(), traffic=self.traffic)
        experts = torch.arange(taken.shape[1], device=x.device)
        expert_of = experts.repeat(group.size).repeat_interleave(taken.flatten())
        multiple = self.row_multiple or row_multiple(x)
        offsets, row_ids, token_ids = plan_rows(expert_of[:, None], taken.sum(0), multiple)
        path = (wire, Sort(places=Places(row_ids=row_ids, token_ids=token_ids)))
        whole, format = (Sort(places=by_expert), *path), self.formats.out
        sent = carried(whole, format.encode(x.detach()))
        return _dispatched(whole, x, sent, format, offsets, _OneHopBack(by_expert=by_expert, path=path))

    def combine(self, rows: Tensor, dispatched: Dispatched, routing: Routing) -> Tensor:
        back = dispatched.way_back
        assert isinstance(back, _OneHopBack)
        return weighted(home(back.path, rows, self.formats), routing.weights, back.by_expert)


class TwoHop:
    """Over the NIC once per token and node, then on inside the node. `row_multiple` is that of `LocalDispatcher`."""

    def __init__(self, mesh: Mesh, formats: Formats = ALL_PLAIN, row_multiple: int | None = None) -> None:
        self.mesh, self.formats = mesh, formats
        self.row_multiple = row_multiple
        self.traffic = Traffic()

    def dispatch(self, x: Tensor, routing: Routing) -> Dispatched:
        mesh, choices = self.mesh, routing.expert_ids.shape[1]
        experts = len(routing.counts) // mesh.ep.size  # of a rank
        to_rank = self._reached(routing.expert_ids // experts)
        sources, from_nodes = self._swap_counts(to_rank)
        across = self._hop(to_rank.any(2), mesh.rail, from_nodes)
        message = carried(across, _packed(self.formats.out.encode(x.detach()), routing))
        _, ids, _ = _unpacked(message, choices)
        inside = self._hop(self._reached(ids // experts)[:, mesh.rail.index], mesh.node, sources.sum(0).tolist())
        rows, ids, weights = _unpacked(carried(inside, message), choices)
        own = ids - mesh.ep.index * experts
        own = own.masked_fill((own < 0) | (own >= experts), -1)
        counts = torch.bincount(own[own >= 0], minlength=experts)
        offsets, places = _plan_in_order(own, counts, self.row_multiple or row_multiple(x), _order(sources))
        path, to_experts = (*across, *inside), Sort(places=places)
        sent = carried((to_experts,), rows)
        back = _TwoHopBack(path=path, places=places, weights=weights)
        return _dispatched((*path, to_experts), x, sent, self.formats.out, offsets, back)

    def combine(self, rows: Tensor, dispatched: Dispatched, routing: Routing) -> Tensor:
        back = dispatched.way_back
        assert isinstance(back, _TwoHopBack)
        weights = arrived(back.path, routing.weights, back.weights)
        return home(back.path, weighted(rows, weights, back.places), self.formats)

    def _reached(self, ranks: Tensor) -> Tensor:
        """Ranks of the ep group [N, K] -> whether a token goes to each [N, nodes, ranks of a node]."""
        mesh = self.mesh
        is_reached = torch.zeros(len(ranks), mesh.ep.size, dtype=torch.bool, device=ranks.device)
        return is_reached.scatter_(1, ranks, True).unflatten(1, (mesh.rail.size, mesh.node.size))

    def _swap_counts(self, to_rank: Tensor) -> tuple[Tensor, list[int]]:
        """The copies that will come from each rank's tokens [nodes, ranks of a node], and from each node over the NIC.

        A rank tells each other both, the second to those with its own index only.
        """
        mesh = self.mesh
        told = torch.zeros(*to_rank.shape[1:], 2, dtype=torch.int64, device=to_rank.device)
        told[..., 0] = to_rank.sum(0)
        told[:, mesh.node.index, 1] = to_rank.any(2).sum(0)
        heard = swap(told.flatten(0, 1), mesh.ep, self.traffic).view_as(told)
        return heard[..., 0], heard[:, mesh.node.index, 1].tolist()

    def _hop(self, is_sent: Tensor, group: Group, received: Sequence[int]) -> tuple[Sort, Wire]:
        """is_sent [N, ranks of the group]."""
        counts = is_sent.sum(0)
        members = torch.arange(group.size, device=is_sent.device)
        _, row_ids, token_ids = plan_rows(torch.where(is_sent, members, -1), counts, 1)
        wire = Wire(group=group, sent=counts.tolist(), received=received, traffic=self.traffic)
        return Sort(places=Places(row_ids=row_ids, token_ids=token_ids)), wire


def _dispatched(
    path: Path, x: Tensor, sent: Tensor, format: Format, offsets: list[int], way_back: object
) -> Dispatched:
    """x [N, dim] is where `path` begins, `sent` [R, width] what came to its end."""
    rows, quantized = received(sent, x, format)
    return Dispatched(rows=arrived(path, x, rows), offsets=offsets, way_back=way_back, quantized=quantized)


def _packed(rows: Tensor, routing: Routing) -> Tensor:
    """Bytes of each token's row, choices and weights."""
    return torch.cat((rows, encode(routing.expert_ids.int()), encode(routing.weights.detach())), dim=1)


def _unpacked(message: Tensor, choices: int) -> tuple[Tensor, Tensor, Tensor]:
    """Bytes of rows, expert ids [N, K] int64 and weights [N, K] FP32."""
    rows, ids, weights = message.tensor_split((-8 * choices, -4 * choices), dim=1)
    return rows, decode(ids, torch.int32).long(), decode(weights, torch.float32)


def _order(sources: Tensor) -> Tensor:
    """The copies that came, those of the first rank's tokens first.

    sources [nodes, ranks of a node] are copies by their token's rank; they came by index, and by node for each index.
    """
    ranks = torch.arange(sources.numel(), device=sources.device).view_as(sources)
    return ranks.t().flatten().repeat_interleave(sources.t().flatten()).argsort(stable=True)


def _plan_in_order(ids: Tensor, counts: Tensor, multiple: int, order: Tensor) -> tuple[list[int], Places]:
    """`plan_rows` as if tokens were in `order`."""
    offsets, ordered, positions = plan_rows(ids[order], counts, multiple)
    row_ids = torch.empty_like(ordered)
    row_ids[order] = ordered
    token_ids = torch.where(positions < 0, -1, order[positions.clamp(min=0)])
    return offsets, Places(row_ids=row_ids, token_ids=token_ids)
