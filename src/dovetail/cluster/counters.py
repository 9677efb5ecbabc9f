"""Bytes of each link of a cluster, as the kernel counts them, and as ranks do.

A rank's own counts are payload: bytes that it hands over to go to ranks of other nodes ("nic"), and to other ranks of
its own node ("node"). Rank 0 leaves those of all ranks in a file `traffic.json`, in up to three tables:

    {"predicted": {"0": {"nic": 1048576, "node": 524288}, "1": ...}, "in_steps": {...}, "beside": {...}}
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from dovetail.cluster.links import NIC, Links, run_program
from dovetail.config import read_json

Traffic = Mapping[int, Mapping[str, int]]  # bytes that each rank sent, by kind of link
KINDS = {NIC: "nic", "lo": "node"}  # of link, by interface
TABLES = ("predicted", "in_steps", "beside")  # of training steps, counted in them, and beside them


@dataclass(frozen=True, slots=True, kw_only=True)
class Counts:
    """Of one interface, headers included: Ethernet's 14 bytes, IP's and TCP's 40 to 52, and acknowledgements."""

    sent: int  # bytes
    received: int
    packets_sent: int
    packets_received: int
    dropped: int  # packets, on the way in or out

    def since(self, before: Counts) -> Counts:
        return Counts(**{name: getattr(self, name) - getattr(before, name) for name in self.__slots__})


def read_counts(links: Links) -> dict[tuple[int, str], Counts]:
    """Return the counts of each node's interfaces so far, by node and interface."""
    return {
        (node, interface): _interface(name, interface, links.switch, node)
        for node, name in enumerate(links.nodes)
        for interface in KINDS
    }


def read_traffic(path: Path, world_size: int, since: float) -> dict[str, Traffic]:
    """Read the tables of `traffic.json`; none where there is no file that was written after the time `since`.

    Raises ValueError where it is not as described above, or has other ranks than 0 to `world_size` - 1.
    """
    if not path.exists() or path.stat().st_mtime < since:
        return {}
    found = read_json(path)
    try:
        tables = {name: _by_rank(found[name]) for name in TABLES if name in found}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        wanted = "{table: {rank: {nic: bytes, node: bytes}}}"
        raise ValueError(f"{path}: expected {wanted}, got {found!r:.60}") from error
    for name, traffic in tables.items():
        if sorted(traffic) != list(range(world_size)):
            raise ValueError(f"{path}: {name} has ranks {sorted(traffic)}, but {world_size} ran")
    return tables


def of_node(traffic: Traffic, ranks: Iterable[int], kind: str) -> int:
    """Return the bytes that `ranks`, those of one node, sent over links of `kind` together."""
    return sum(traffic[rank][kind] for rank in ranks)


def _by_rank(table: Mapping[str, Mapping[str, float]]) -> Traffic:
    return {int(rank): {kind: int(counts[kind]) for kind in KINDS.values()} for rank, counts in table.items()}


def _interface(name: str, interface: str, switch: str, node: int) -> Counts:
    (link,) = json.loads(run_program("ip", "-n", name, "-j", "-s", "link", "show", "dev", interface))
    sent, received = link["stats64"]["tx"], link["stats64"]["rx"]
    queues = [(name, NIC), (switch, f"port{node}")] if interface == NIC else []
    return Counts(
        sent=sent["bytes"],
        received=received["bytes"],
        packets_sent=sent["packets"],
        packets_received=received["packets"],
        dropped=sent["dropped"] + received["dropped"] + sum(_drops(*queue) for queue in queues),
    )


def _drops(name: str, interface: str) -> int:
    queues = json.loads(run_program("tc", "-n", name, "-j", "-s", "qdisc", "show", "dev", interface))
    return sum(queue["drops"] for queue in queues)
