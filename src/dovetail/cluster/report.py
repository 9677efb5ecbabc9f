"""The bytes of each link of a cluster, predicted and counted, as a table and as plain data."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from dovetail.cluster.counters import KINDS, Traffic, of_node
from dovetail.cluster.run import Outcome

TITLES = {
    "predicted": ">predicted in steps",
    "in_steps": ">counted in steps",
    "beside": ">beside them",
    "sent": ">by the kernel",
    "received": ">received",
    "dropped": ">packets dropped",
}


def as_json(outcome: Outcome, told: Mapping[str, Traffic]) -> dict[str, Any]:
    """Return bytes by link; what is not known is left out. Bytes are those that a node sent, unless they say else.

    `told` has what ranks say, as `counters.read_traffic` gives it.
    """
    return {
        "nodes": outcome.shape.nodes,
        "ranks_per_node": outcome.shape.ranks,
        "nic_bytes_per_second": outcome.shape.nic,
        "latency_seconds": outcome.shape.latency,
        "threads_per_rank": outcome.shape.threads,
        "seconds": outcome.seconds,
        "failure": None if outcome.failure is None else str(outcome.failure),
        "links": list(_links(outcome, told)),
    }


def table(outcome: Outcome, told: Mapping[str, Traffic]) -> tuple[str, tuple[str, ...], list[tuple[str, ...]]]:
    """Return title, header and rows; a column that nothing is known of is left out."""
    links = list(_links(outcome, told))
    columns = [name for name in TITLES if name in links[0]]
    if not any(link["dropped"] for link in links):
        columns.remove("dropped")
    rows = [(link["link"], *(f"{link[name]:,}" for name in columns)) for link in links]
    title = f"bytes sent in {outcome.seconds:.1f} s"
    return title, ("link", *(TITLES[name] for name in columns)), rows


def _links(outcome: Outcome, told: Mapping[str, Traffic]) -> Iterator[dict[str, Any]]:
    for (node, interface), counts in outcome.counts.items():
        kind = KINDS[interface]
        ranks = range(node * outcome.shape.ranks, (node + 1) * outcome.shape.ranks)
        yield {
            "link": f"node {node} to the switch" if kind == "nic" else f"inside node {node}",
            "node": node,
            "kind": kind,
            **{name: of_node(traffic, ranks, kind) for name, traffic in told.items()},
            **{name: getattr(counts, name) for name in counts.__slots__},
        }
