"""Builds fat trees of two and three layers of switches.

Switches have k ports, half of them down and half up, except at the top:

    full          endpoints   switches   cables between switches
    two layers    k^2 / 2     3 k / 2    k^2 / 2                   [ISCA Table 3: FT2]
    three layers  k^3 / 4     5 k^2 / 4  k^3 / 2                   [ISCA Table 3: FT3]

With fewer endpoints there are as few leaves (and pods) as hold them, and above them the smallest number of switches
that takes every cable up evenly. The cables of a leaf are bundled then, so no bandwidth is lost.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from dovetail.network.fabric.planes import Plane

Ids = NDArray[np.int64]


def fat_tree(endpoints: int, radix: int, layers: int, rails: int) -> Plane:
    """Build a fat tree. Endpoints fill leaves in order.

    With `rails` above 1, endpoint i is on the leaves of rail i mod rails, and the spines join all rails. Raises
    ValueError for an odd radix, more endpoints than fit, and rails that do not divide the leaves of a pod.
    """
    if radix % 2 or radix < 4:
        nearest = f"{radix - 1} or {radix + 1}" if radix > 4 else "4"
        raise ValueError(f"radix = {radix}: half of a leaf's ports go down and half up; use an even one, {nearest}")
    most = radix**2 // 2 if layers == 2 else radix**3 // 4
    if endpoints > most:
        raise ValueError(f"endpoints = {endpoints} on one plane: {_remedy(endpoints, radix, layers, most)}")
    return _two_layers(endpoints, radix, rails) if layers == 2 else _three_layers(endpoints, radix, rails)


def _remedy(endpoints: int, radix: int, layers: int, most: int) -> str:
    wider = radix
    while (wider**2 // 2 if layers == 2 else wider**3 // 4) < endpoints:
        wider += 2
    deeper = "layers = 3, " if layers == 2 and endpoints <= radix**3 // 4 else ""
    return (
        f"{'two' if layers == 2 else 'three'} layers of {radix}-port switches hold at most {most}; "
        f"use {deeper}radix = {wider}, or fewer endpoints"
    )


def _two_layers(endpoints: int, radix: int, rails: int) -> Plane:
    half = radix // 2
    if rails == 1:
        attached = np.arange(endpoints) // half
    else:
        per_rail = -(-(endpoints // rails) // half)
        node, rail = np.divmod(np.arange(endpoints), rails)
        attached = rail * per_rail + node // half
    leaves = int(attached.max()) + 1
    if leaves > radix:
        raise ValueError(
            f"endpoints = {endpoints} on {rails} rails need {leaves} leaves, a spine of radix = {radix} has a port "
            f"for {radix}: use at most {radix // rails * half * rails} endpoints, or layers = 3"
        )
    spines = _evenly(half, leaves, radix) if leaves > 1 else 0
    cables = _bundles(np.arange(leaves), leaves + np.arange(spines), half)
    return Plane(
        switches=leaves + spines,
        cables=cables.astype(np.int32),
        layer=np.repeat(np.array([0, 1], np.int8), [leaves, spines]),
        group=np.full(leaves + spines, -1, np.int32),
        attached=attached.astype(np.int32),
    )


def _three_layers(endpoints: int, radix: int, rails: int) -> Plane:
    half = radix // 2
    if half % rails:
        legal = [each for each in range(1, half + 1) if half % each == 0]
        nearest = min(legal, key=lambda each: abs(each - rails))
        raise ValueError(f"{rails} rails do not divide the {half} leaves of a pod of radix = {radix}: use {nearest}")
    pod_size = half * half
    if endpoints <= pod_size:  # one pod needs no third layer
        return _two_layers(endpoints, radix, rails)
    pod, place = np.divmod(np.arange(endpoints), pod_size)
    node, rail = np.divmod(place, rails)
    leaf_in_pod = place // half if rails == 1 else rail * (half // rails) + node // half
    # Leaves without an endpoint are left out.
    used, attached = np.unique(pod * half + leaf_in_pod, return_inverse=True)
    leaf_pod = used // half
    pods, leaves = int(leaf_pod[-1]) + 1, len(used)
    first_core = leaves + pods * half
    lower = np.column_stack([np.repeat(np.arange(leaves), half), np.repeat(leaf_pod * half, half) + leaves])
    lower[:, 1] += np.tile(np.arange(half), leaves)
    cores = _evenly(half, pods, radix)  # for each place in a pod
    upper = [
        _bundles(leaves + np.arange(pods) * half + place, first_core + place * cores + np.arange(cores), half)
        for place in range(half)
    ]
    return Plane(
        switches=first_core + half * cores,
        cables=np.concatenate([lower, *upper]).astype(np.int32),
        layer=np.repeat(np.array([0, 1, 2], np.int8), [leaves, pods * half, half * cores]),
        group=np.concatenate([leaf_pod, np.repeat(np.arange(pods), half), np.full(half * cores, -1)]).astype(np.int32),
        attached=attached.reshape(-1).astype(np.int32),
    )


def _evenly(cables_each: int, below: int, radix: int) -> int:
    """Return the fewest switches that take `cables_each` cables of each of `below` switches, evenly from each."""
    return next(
        above
        for above in range(1, cables_each + 1)
        if cables_each % above == 0 and below * (cables_each // above) <= radix
    )


def _bundles(below: Ids, above: Ids, cables_each: int) -> Ids:
    """Return the cables of each switch below, spread evenly over those above."""
    if not len(above):
        return np.zeros((0, 2), np.int64)
    ends = np.tile(np.repeat(above, cables_each // len(above)), len(below))
    return np.column_stack([np.repeat(below, cables_each), ends])
