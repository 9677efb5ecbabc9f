"""The bytes of each link of a cluster, predicted and counted, as a table and as plain data."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from dovetail.cluster.counters import KINDS, Traffic, of_node
from dovetail.cluster.run import Outcome


def as_json(outcome: Outcome, counted: Traffic | None = None, predicted: Traffic | None = None) -> dict[str, Any]:
    """Return bytes by link; what is not known is left out. Bytes are those that a node sent, unless they say else."""
    return {
        "nodes": outcome.shape.nodes,
        "ranks_per_node": outcome.shape.ranks,
        "nic_bytes_per_second": outcome.shape.nic,
        "latency_seconds": outcome.shape.latency,
        "threads_per_rank": outcome.shape.threads,
        "seconds": outcome.seconds,
        "failure": None if outcome.failure is None else str(outcome.failure),
        "links": list(_links(outcome, counted, predicted)),
    }


def table(
    outcome: Outcome, counted: Traffic | None = None, predicted: Traffic | None = None
) -> tuple[str, tuple[str, ...], list[tuple[str, ...]]]:
    """Return title, header and rows; a column that nothing is known of is left out."""
    links = list(_links(outcome, counted, predicted))
    columns = [name for name in ("predicted", "counted", "sent", "received", "dropped") if name in links[0]]
    if not any(link["dropped"] for link in links):
        columns.remove("dropped")
    titles = {
        "predicted": ">predicted",
        "counted": ">counted by ranks",
        "sent": ">by the kernel",
        "received": ">received",
        "dropped": ">packets dropped",
    }
    rows = [(link["link"], *(f"{link[name]:,}" for name in columns)) for link in links]
    title = f"bytes sent in {outcome.seconds:.1f} s"
    return title, ("link", *(titles[name] for name in columns)), rows


def _links(outcome: Outcome, counted: Traffic | None, predicted: Traffic | None) -> Iterator[dict[str, Any]]:
    for (node, interface), counts in outcome.counts.items():
        kind = KINDS[interface]
        ranks = range(node * outcome.shape.ranks, (node + 1) * outcome.shape.ranks)
        known = {"predicted": predicted, "counted": counted}
        yield {
            "link": f"node {node} to the switch" if kind == "nic" else f"inside node {node}",
            "node": node,
            "kind": kind,
            **{name: of_node(traffic, ranks, kind) for name, traffic in known.items() if traffic is not None},
            **{name: getattr(counts, name) for name in counts.__slots__},
        }
