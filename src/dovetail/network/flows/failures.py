"""Turns names of failures, such as `plane:3`, into the links that fail, and draws random ones.

    plane:3     all switches of plane 3            nic:17    every port of GPU 17's NIC
    switch:40   switch 40, counted from 0          link:123  the cable of link 123, both ways

Each may be followed by @SECONDS, the time of the failure; without it the part is down from the start.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from dovetail.config import near_matches
from dovetail.network.fabric.topology import NIC, SWITCH, Fabric
from dovetail.network.flows.flows import Ints
from dovetail.network.flows.simulation import Change


class NotThereError(ValueError):
    """A part that this fabric lacks, and that another may have."""

    def __init__(self, part: str, message: str) -> None:
        super().__init__(message)
        self.part = part  # such as "plane 3"


def parse_failure(text: str, fabric: Fabric) -> Change:
    """Return the failure that `text` names.

    Raises ValueError for another form, and NotThereError, which is a ValueError, for a part that the fabric lacks.
    """
    what, at, time = text.partition("@")
    kind, colon, number = what.partition(":")
    if kind not in FAILURES:
        raise ValueError(f"--fail {text}: unknown part {kind!r}; {near_matches(kind, FAILURES)}")
    try:
        index, seconds = int(number), float(time) if at else 0.0
    except ValueError:
        raise ValueError(f"--fail {text}: expected {kind}:NUMBER or {kind}:NUMBER@SECONDS") from None
    if not 0 <= seconds < np.inf:
        raise ValueError(f"--fail {text}: fails at {seconds:g} s; give a time from 0 on, or leave it out")
    return Change(seconds=seconds, links=FAILURES[kind](fabric, index))


def links_at(fabric: Fabric, vertices: NDArray[np.integer] | list[int]) -> Ints:
    """Return the links from and to these vertices."""
    is_lost = np.isin(fabric.link_from, vertices) | np.isin(fabric.link_to, vertices)
    return np.flatnonzero(is_lost).astype(np.int32)


def links_of_plane(fabric: Fabric, plane: int) -> Ints:
    """Return all links of the switches of one plane. Raises NotThereError for an unknown plane."""
    _check("plane", plane, fabric.planes, fabric)
    return links_at(fabric, fabric.first_switch + np.flatnonzero(fabric.switch_plane == plane))


def links_of_switch(fabric: Fabric, switch: int) -> Ints:
    """Return all links of one switch, counted from 0. Raises NotThereError for an unknown switch."""
    _check("switch", switch, fabric.switches, fabric)
    return links_at(fabric, [fabric.first_switch + switch])


def links_of_nic(fabric: Fabric, gpu: int) -> Ints:
    """Return both directions of every port of a GPU's NIC. Raises NotThereError for an unknown GPU."""
    _check("nic", gpu, fabric.endpoints, fabric)
    ports = fabric.nic_link[gpu]
    ports = ports[ports >= 0]
    return np.sort(np.concatenate([ports, ports ^ 1])).astype(np.int32)


def links_of_cable(fabric: Fabric, link: int) -> Ints:
    """Return a link and its opposite. Raises NotThereError for an unknown link."""
    _check("link", link, fabric.links, fabric)
    return np.array([link & ~1, link | 1], np.int32)


def random_links(fabric: Fabric, share: float, seed: int = 0) -> Ints:
    """Return both directions of a random share of the cables between NICs and switches and between switches.

    The number of cables is rounded. Raises ValueError for a share outside 0 to 1.
    """
    if not 0 <= share <= 1:
        raise ValueError(f"{share:g} of the cables: must be from 0 to 1, such as 0.01")
    cables = np.flatnonzero(np.isin(fabric.kind[::2], (NIC, SWITCH)))
    lost = np.random.default_rng(seed).choice(cables, round(share * len(cables)), replace=False)
    return np.sort(np.concatenate([2 * lost, 2 * lost + 1])).astype(np.int32)


def _check(kind: str, number: int, count: int, fabric: Fabric) -> None:
    if not 0 <= number < count:
        numbers = f"0 to {count - 1}" if count > 1 else "0 alone"
        raise NotThereError(f"{kind} {number}", f"--fail {kind}:{number}: {fabric.name} has {kind} {numbers}")


FAILURES: dict[str, Callable[[Fabric, int], Ints]] = {
    "plane": links_of_plane,
    "switch": links_of_switch,
    "nic": links_of_nic,
    "link": links_of_cable,
}
