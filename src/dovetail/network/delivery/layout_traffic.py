"""Simulates the exchanges of all groups of a layout at the same time on a fabric.

In closed forms (`network.demands.closed_forms`) an exchange has the links of its own ranks to itself. Here every group
of the layout has its exchange at the same time, on the GPUs of its ranks, over paths that a routing chooses, and with
failures:

    slowdown = seconds of all groups at once / seconds of one group alone, with sprayed packets and no failures

The closed form is multiplied by it, so that it keeps what was measured of kernels. It is 1 if the network has room for
all groups. The group alone is the first one that stays in its node, or leaves it, as the closed form assumes; where
groups do not divide nodes, other groups may differ in that. Loads are equal: each rank sends the mean.

Ranks are numbered through all stages, and within a stage as in `cost.ops.step`: neighbours share the experts, the ranks
of a collective are `stride` apart, and a pipeline's next stage is gpus / pp ranks further. The first GPUs are used.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import cast

import numpy as np

from dovetail.catalog.fabrics import load_fabric, resized
from dovetail.cost.ops.ops import Collective, Exchange, Send
from dovetail.network.delivery.deliver import Delivery, deliver
from dovetail.network.delivery.memory import MOST_BYTES, needed_bytes
from dovetail.network.demands.closed_forms import Mode, Transfer
from dovetail.network.demands.collectives import Demand, Ring, Step, in_rings, ring_orders
from dovetail.network.demands.distinct import distinct_bins
from dovetail.network.demands.experts import posted
from dovetail.network.fabric.topology import Fabric, build
from dovetail.network.flows.failures import parse_failure
from dovetail.network.flows.flows import Flows, Longs, joined
from dovetail.network.flows.link_use import link_uses
from dovetail.network.flows.simulation import Change
from dovetail.network.routing.route import Adaptive, Policy, policy_of
from dovetail.spec.hardware import Cluster

LONE_NODE = "ft2"  # the fabric of a single node, which does not use it

Sent = Exchange | Collective | Send


@dataclass(frozen=True, slots=True, kw_only=True)
class AtOnce:
    """One kind of exchange: simulated seconds of one group alone, and of all of them together."""

    groups: int
    ranks: int  # in a group
    alone: float
    together: float
    busiest: str  # the kind of link that is used most by all together

    @property
    def slowdown(self) -> float:
        return self.together / self.alone


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LayoutTraffic:
    """A network and the GPUs of a layout on it. Each exchange is simulated once."""

    fabric: Fabric
    gpus: int
    routing: str
    failures: tuple[str, ...]
    policy: Policy
    changes: tuple[Change, ...]
    _known: dict[tuple[Sent, Mode], AtOnce] = field(default_factory=dict)

    def __str__(self) -> str:
        return ", ".join([self.fabric.name, self.routing, *(f"without {each}" for each in self.failures)])

    def slowed(self, transfer: Transfer, sent: Sent, mode: Mode = "normal") -> Transfer:
        """Return `transfer`, from a closed form, slowed by all groups at once. Raises ValueError as `at_once` does."""
        if not self.is_sent(sent):
            return transfer
        ratio = self.at_once(sent, mode).slowdown
        formula = f"{transfer.formula}, x {ratio:.4g} with all groups at once on {self}"
        return replace(transfer, seconds=ratio * transfer.seconds, formula=formula)

    def is_sent(self, sent: Sent) -> bool:
        """Return whether anything leaves a rank."""
        if isinstance(sent, Send):
            return sent.bytes > 0 and sent.distance < self.gpus
        return sent.ranks > 1 and (sent.tokens if isinstance(sent, Exchange) else sent.bytes) > 0

    def at_once(self, sent: Sent, mode: Mode = "normal") -> AtOnce:
        """Simulate one group alone and all groups at once; `sent` must not be empty.

        Raises ValueError if failures cut GPUs off, and if more than 4 GiB of memory are needed.
        """
        key = replace(sent, name="dispatch") if isinstance(sent, Exchange) else sent, mode  # combine takes as long
        if key not in self._known:
            self._known[key] = self._simulated(sent, mode)
        return self._known[key]

    def _simulated(self, sent: Sent, mode: Mode) -> AtOnce:
        first_ranks, each = _first_ranks(sent, self.gpus), self.fabric.gpus_per_node
        one = _group_step(sent, mode, _like_closed_form(sent, first_ranks, each), each)
        alone = deliver(self.fabric, _demand(one), Adaptive())
        everyone = _all_groups(sent, mode, first_ranks, each)
        self._check_memory(len(everyone.flows))
        together = deliver(self.fabric, _demand(everyone), self.policy, changes=self.changes)
        if not together.is_complete:
            raise ValueError(self._cut_off(together))
        uses = link_uses(self.fabric, together.link_bytes, together.seconds)
        return AtOnce(
            groups=len(first_ranks),
            ranks=sent.ranks if not isinstance(sent, Send) else 2,
            alone=alone.seconds,
            together=together.seconds,
            busiest=uses[0].name if uses else "",
        )

    def _check_memory(self, flows: int) -> None:
        needed = needed_bytes(self.fabric, self.gpus, flows, self.policy, self.changes)
        if needed > MOST_BYTES:
            raise ValueError(
                f"exchanges of {self.gpus} GPUs on {self.fabric.name} are {flows:,} flows at once and would need about "
                f"{needed / 2**30:,.1f} GiB, more than {MOST_BYTES / 2**30:.0f}: plan with fewer --gpus, or with "
                "--network closed-forms"
            )

    def _cut_off(self, delivery: Delivery) -> str:
        lost = delivery.cut_off
        gpus = np.unique(np.concatenate([lost.source, lost.destination]))
        named = ", ".join(map(str, gpus[:4])) + (", ..." if len(gpus) > 4 else "")
        return (
            f"--fail {', '.join(self.failures)} on {self.fabric.name}: {len(lost):,} flows among GPUs {named} have no "
            "path left, so no step is finished; plan without these GPUs, or on a fabric that survives it"
        )


def layout_traffic(
    cluster: Cluster, gpus: int, fabric: str | None = None, routing: str = "adaptive", failures: Sequence[str] = ()
) -> LayoutTraffic:
    """Put the first `gpus` of `cluster` on its fabric, or on another of the catalog, with the cluster's own bandwidths.

    Raises ValueError for a cluster without a fabric, a fabric that cannot be built for it, an unknown routing, and
    failures of parts that do not exist or that begin during a step.
    """
    policy = policy_of(routing)
    wired = build_for(cluster, fabric)
    changes = tuple(parse_failure(text, wired) for text in failures)
    for text, change in zip(failures, changes, strict=True):
        if change.seconds:
            raise ValueError(
                f"--fail {text}: a plan is for many steps, and failures are present from the first one on; "
                f"write {text.partition('@')[0]}"
            )
    return LayoutTraffic(
        fabric=wired,
        gpus=gpus,
        routing=routing,
        failures=tuple(failures),
        policy=policy,
        changes=changes,
    )


def build_for(cluster: Cluster, fabric: str | None = None) -> Fabric:
    """Build the fabric that joins the nodes of `cluster`, or the one named, for its GPUs and with its bandwidths."""
    name = LONE_NODE if cluster.nodes == 1 and fabric is None else fabric or cluster.fabric
    if name is None:
        raise ValueError(
            f'{cluster.name} does not say how its nodes are joined: add fabric = "mpft", or another name that '
            "`dovetail network show` knows, to its file, or give --fabric"
        )
    spec = load_fabric(name)
    nic = spec.nic
    if cluster.scale_out is not None:  # keep the fabric's latency: the cluster's is one figure for all paths
        nic = cluster.scale_out.model_copy(update={"latency_us": spec.nic.latency_us})
    changes = {"endpoints": cluster.gpus, "gpus_per_node": cluster.gpus_per_node, "nvlink": cluster.scale_up}
    return build(resized(spec, nic=nic, **changes))


def _demand(step: Step) -> Demand:
    return Demand(name="", ranks=0, size=0.0, bus_factor=1.0, steps=(step,))


def _first_ranks(sent: Sent, gpus: int) -> Longs:
    """Return the first rank of each group."""
    if isinstance(sent, Send):
        return np.arange(gpus - sent.distance)
    stride = sent.stride if isinstance(sent, Collective) else 1
    block = sent.ranks * stride
    blocks = np.arange(0, gpus - block + 1, block)
    return (blocks[:, None] + np.arange(stride)).ravel()


def _like_closed_form(sent: Sent, first_ranks: Longs, gpus_per_node: int) -> int:
    """Return the first rank of a group that stays in one node if `network.demands.closed_forms` assumes so.

    Otherwise it is that of a group that leaves its node.
    """
    if isinstance(sent, Send):
        span, leaves = sent.distance, sent.gpus > gpus_per_node
    else:
        stride = sent.stride if isinstance(sent, Collective) else 1
        span, leaves = (sent.ranks - 1) * stride, sent.ranks > max(1, gpus_per_node // stride)
    crosses = first_ranks // gpus_per_node != (first_ranks + span) // gpus_per_node
    return int(first_ranks[np.argmax(crosses == leaves)])


def _group_step(sent: Sent, mode: Mode, first: int, gpus_per_node: int) -> Step:
    """Return the exchange of the group whose first rank is `first`."""
    if isinstance(sent, Send):
        return Step(flows=Flows.of([first], [first + sent.distance], sent.bytes))
    if isinstance(sent, Exchange):
        members = first + np.arange(sent.ranks)
        copies = _straight(members, sent) if mode == "low-latency" else _by_node(members, gpus_per_node, sent)
        return posted(copies, sent.bytes_per_copy, mode, sent.experts // sent.ranks)
    members = first + sent.stride * np.arange(sent.ranks)
    channels = max(1, min(sent.ranks, gpus_per_node // sent.stride))
    rings = ring_orders(members.tolist(), gpus_per_node, channels)
    return in_rings(cast(Ring, sent.name.replace("_", "-")), rings, sent.bytes).steps[0]


def _all_groups(sent: Sent, mode: Mode, first_ranks: Longs, gpus_per_node: int) -> Step:
    """Return the exchange of all groups. Those that begin at the same place of a node differ only in their nodes."""
    flows, messages = [], []
    for place in np.unique(first_ranks % gpus_per_node):
        firsts = first_ranks[first_ranks % gpus_per_node == place]
        step = _group_step(sent, mode, int(firsts[0]), gpus_per_node)
        shift, one = np.repeat(firsts - firsts[0], len(step.flows)), np.tile(np.arange(len(step.flows)), len(firsts))
        many = step.flows.take(one)
        flows.append(replace(many, source=many.source + shift, destination=many.destination + shift))
        messages.append(np.broadcast_to(step.messages, len(step.flows))[one])
    return replace(step, flows=joined(flows), messages=np.concatenate(messages))


def _by_node(members: Longs, gpus_per_node: int, sent: Exchange) -> Flows:
    """Return copies to the GPU of the same index on every other node, and on to all others of that node.

    If that node has no such index, it is the next one that it has. On its own node the sender passes copies on itself.
    """
    node = members // gpus_per_node
    nodes, start, count = np.unique(node, return_index=True, return_counts=True)
    index = np.arange(len(members)) - start[np.searchsorted(nodes, node)]
    mate = start[None, :] + index[:, None] % count[None, :]
    to_node = np.array([_copies_to(sent, int(ranks)) for ranks in count])
    row, column = np.nonzero(node[:, None] != nodes[None, :])
    across = Flows.of(members[row], members[mate[row, column]], to_node[column])
    served = np.bincount(mate.ravel(), minlength=len(members)).astype(
        np.float64
    )  # ranks whose tokens each rank passes on
    row, column = np.nonzero((node[:, None] == node[None, :]) & ~np.eye(len(members), dtype=bool))
    within = Flows.of(members[row], members[column], _copies_to(sent, 1) * served[row])
    return joined([across, within])


def _copies_to(sent: Exchange, ranks: int) -> float:
    """Return the number of a rank's tokens that have an expert on any of `ranks` neighbouring ranks."""
    bins = sent.ranks / ranks
    return sent.tokens * distinct_bins(sent, bins) / bins


def _straight(members: Longs, sent: Exchange) -> Flows:
    """Return a copy for each expert, with the same number to every rank."""
    row, column = np.nonzero(~np.eye(len(members), dtype=bool))
    return Flows.of(members[row], members[column], sent.tokens * sent.choices / sent.ranks)
