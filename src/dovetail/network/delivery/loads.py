"""Computes an all-to-all among any number of GPUs from the loads of links, without simulating flows.

Flows of equal size that start together never change their rates (`network.flows.simulation`). Those over the busiest
link have the smallest rate, so they end last, when that link has carried all its bytes:

    seconds = most bytes over bandwidth of any link + latency of the longest path

The longest path need not be one over the busiest link; the result is then too long by the difference. Loads are summed
leaf by leaf: what all others send to the leaf goes over all shortest paths, in the shares of
`network.routing.paths.spray`. A dragonfly without failures looks the same from each of its groups, so the leaves of its
first group stand for all.

This holds for fabrics of one plane without rails, where bytes leave by their own GPU's NIC, with or without failures
between switches.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dovetail.network.delivery.deliver import most_messages_to_all
from dovetail.network.fabric.topology import NIC, SWITCH, Fabric
from dovetail.network.flows.flows import Bools, Floats, Longs
from dovetail.network.flows.simulation import Change
from dovetail.network.routing.paths import lengths

LEAVES = 64  # leaves treated together, to limit memory


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Loads:
    """The loads of an all-to-all."""

    fabric: Fabric
    link_flows: Floats  # [links] the number of flows over each, as a sum of shares
    path_seconds: float  # latency of the longest path
    latency_seconds: float  # time of empty messages

    def seconds(self, part: float) -> float:
        """Return the seconds until everything has arrived, if each GPU has `part` bytes for each other."""
        busiest = float((self.link_flows / self.fabric.capacity).max())
        return max(busiest * part + self.path_seconds, self.latency_seconds)


def has_loads(fabric: Fabric, gpus: int, changes: Sequence[Change]) -> bool:
    """Return whether this applies to the first `gpus`: all send by their own NICs from the start to the end."""
    if fabric.planes > 1 or fabric.spec.by_rail or any(change.seconds > 0 for change in changes):
        return False
    up, node = _up(fabric, changes), fabric.gpus_per_node
    own = [fabric.nic_link[:gpus, 0], fabric.pcie_link[:gpus], fabric.nvlink_link[:gpus]]
    return gpus > node and all((up[links[links >= 0]] & up[links[links >= 0] ^ 1]).all() for links in own)


def all_to_all_loads(fabric: Fabric, gpus: int, changes: Sequence[Change] = ()) -> Loads | None:
    """Sum the loads of an all-to-all among the first `gpus`, for which `has_loads` must hold.

    Returns None if some of them have no path to each other.
    """
    from dovetail.network.delivery.loads_numba import CUT_OFF, add_loads

    assert has_loads(fabric, gpus, changes)
    up = _up(fabric, changes)
    links = np.flatnonzero((fabric.kind == SWITCH) & up)
    first, count = fabric.first_switch, fabric.switches
    ends = fabric.link_from - np.int32(first), fabric.link_to - np.int32(first)
    into, out = (_by_end(end, links, count) for end in ends[::-1])
    leaf_of = fabric.leaf[:gpus, 0].astype(np.int64) - first
    members = np.bincount(leaf_of, minlength=count).astype(np.float64)
    targets, is_turned = np.flatnonzero(members), _is_turned(fabric, gpus, changes)
    if is_turned:
        targets = targets[fabric.switch_group[targets] == 0]
    load, length, longest = np.zeros(fabric.links), lengths(fabric), 0
    for low in range(0, len(targets), LEAVES):
        leaves = targets[low : low + LEAVES]
        amounts: Floats = members[None, :] * members[leaves, None]
        _leave_out_nodes(fabric, leaf_of, leaves, amounts)
        found = add_loads(into, out, ends, fabric.capacity, length, leaves, amounts, load)
        if found == CUT_OFF:
            return None
        longest = max(longest, found)
    if is_turned:
        load = _turned(fabric, load)
    path, empty = _latencies(fabric, gpus, longest)
    link_flows = load + _at_the_ends(fabric, gpus)
    return Loads(fabric=fabric, link_flows=link_flows, path_seconds=path, latency_seconds=empty)


def _up(fabric: Fabric, changes: Sequence[Change]) -> Bools:
    up = np.ones(fabric.links, bool)
    for change in changes:
        up[change.links] = change.is_up
    return up


def _by_end(end: np.ndarray, links: Longs, count: int) -> tuple[Longs, Longs]:  # type: ignore[type-arg]
    order = links[np.argsort(end[links], kind="stable")]
    return np.searchsorted(end[order], np.arange(count + 1)).astype(np.int64), order


def _leave_out_nodes(fabric: Fabric, leaf_of: Longs, leaves: Longs, amounts: Floats) -> None:
    """Take out of `amounts` the pairs that share a node, because they use NVLink if there is one."""
    if (fabric.nvlink_link < 0).any():
        return
    node = np.arange(len(leaf_of)) // fabric.gpus_per_node
    row = np.full(fabric.switches, -1)
    row[leaves] = np.arange(len(leaves))
    for step in range(fabric.gpus_per_node):  # pairs each GPU with the one `step` after it in its node
        mate = node * fabric.gpus_per_node + (np.arange(len(leaf_of)) + step) % fabric.gpus_per_node
        here = np.flatnonzero((mate < len(leaf_of)) & (row[leaf_of] >= 0))
        np.subtract.at(amounts, (row[leaf_of[here]], leaf_of[mate[here]]), 1.0)


def _at_the_ends(fabric: Fabric, gpus: int) -> Floats:
    """Return the flows over NICs, PCIe and NVLink of the GPUs that take part [links]."""
    load = np.zeros(fabric.links)
    node = np.arange(gpus) // fabric.gpus_per_node
    mates = np.bincount(node)[node] - 1 if (fabric.nvlink_link >= 0).all() else np.zeros(gpus, np.int64)
    for links, flows in (
        (fabric.nic_link[:gpus, 0], gpus - 1 - mates),
        (fabric.pcie_link[:gpus], gpus - 1 - mates),
        (fabric.nvlink_link[:gpus], mates),
    ):
        chosen = links >= 0
        for way in (0, 1):
            load[links[chosen] ^ way] = flows[chosen]
    return load


def _latencies(fabric: Fabric, gpus: int, longest: int) -> tuple[float, float]:
    """Return the latency of the longest path, and the seconds of empty messages posted one after another.

    Messages are posted as in `network.delivery.deliver`. All NICs are alike, and so are all cables between switches.
    """
    hop = float(fabric.latency[fabric.kind == SWITCH].max(initial=0.0))
    outside = 2 * float(fabric.latency[fabric.kind == NIC].max()) + longest * hop
    within = 2 * float(fabric.latency[fabric.nvlink_link[0]]) if fabric.nvlink_link[0] >= 0 else 0.0
    posted = outside + fabric.spec.posting_seconds(most_messages_to_all(fabric, gpus))
    return max(outside, within), max(posted, within)


def _is_turned(fabric: Fabric, gpus: int, changes: Sequence[Change]) -> bool:
    """Return whether a dragonfly looks the same from each group: all GPUs take part, evenly, and nothing fails."""
    counts = np.bincount(fabric.leaf[:, 0] - fabric.first_switch, minlength=fabric.switches)
    nodes = fabric.leaf[:, 0].reshape(fabric.nodes, -1)
    return (
        fabric.spec.kind == "dragonfly"
        and gpus == fabric.endpoints
        and not changes
        and bool((counts == counts[0]).all() and (nodes == nodes[:, :1]).all())
    )


def _turned(fabric: Fabric, load: Floats) -> Floats:
    """Return the loads towards the leaves of all groups from those towards the leaves of the first group.

    Links between the same two places in groups at the same distance are alike. Each gets the sum over these links.
    """
    groups = int(fabric.switch_group.max()) + 1
    size = fabric.switches // groups
    links = np.flatnonzero(fabric.kind == SWITCH)
    one, other = fabric.link_from[links] - fabric.first_switch, fabric.link_to[links] - fabric.first_switch
    apart = (other // size - one // size) % groups
    kind = (one % size * size + other % size) * groups + apart
    _, place, number = np.unique(kind, return_inverse=True, return_counts=True)
    found = np.zeros(fabric.links)
    # Parallel cables are alike, so each link of a kind gets the kind's mean.
    found[links] = (np.bincount(place, load[links]) * groups / number)[place]
    return found
