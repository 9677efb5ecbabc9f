"""The rates of flows that share links max-min fairly.

Per byte that it sends, a flow takes a share of each link on its route: 1 if there is one path, fractions if its packets
are sprayed over several. All rates are raised together, and a flow's rate is final when a link on its route is full.
So no flow can get more without taking from one that has no more than itself (the bottleneck property). Priority classes
are strict: a class gets what the classes before it leave.

    share of link l = (what is left of its capacity) / (sum of the shares of flows on it that have no rate yet)
    repeat: the link with the least share gives its flows that rate, which leaves the other links less to give

A route lists links and bundles. A bundle is a set of links with shares that many flows have in common, such as all
shortest paths between two switches, and is stored once.

Left out: the time that congestion control takes, packets, buffers and lost packets.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int32]
Longs = NDArray[np.int64]
Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]
Engine = Literal["kernel", "reference"]
Csr = tuple[Longs, Ints]

NOTHING_LEFT = 1e-9  # a link with less than this share of its capacity left is full; rounding may leave that much


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Flows:
    """Flows, one entry each. Raises ValueError for bytes that are negative or not finite, and for a time before 0."""

    source: Ints  # endpoint
    destination: Ints
    bytes: Floats
    priority: NDArray[np.int8]  # strict classes, 0 first
    start: Floats  # seconds
    queue_pair: Ints  # number within its connection, by which ECMP tells flows between the same endpoints apart

    @staticmethod
    def of(
        source: Sequence[int] | NDArray[np.integer],
        destination: Sequence[int] | NDArray[np.integer],
        bytes: float | Sequence[float] | Floats,
        priority: int | Sequence[int] = 0,
        start: float | Sequence[float] | Floats = 0.0,
        queue_pair: int | Sequence[int] | NDArray[np.integer] = 0,
    ) -> Flows:
        """Make flows from arrays; a single number is for all of them."""
        count = len(source)

        def column(values: object, dtype: type) -> np.ndarray:  # type: ignore[type-arg]
            return np.broadcast_to(np.asarray(values, dtype), count)

        return Flows(
            source=column(source, np.int32),
            destination=column(destination, np.int32),
            bytes=column(bytes, np.float64),
            priority=column(priority, np.int8),
            start=column(start, np.float64),
            queue_pair=column(queue_pair, np.int32),
        )

    def __post_init__(self) -> None:
        for name, values in (("bytes", self.bytes), ("start", self.start)):
            wrong = ~(np.isfinite(values) & (values >= 0))
            if wrong.any():
                first = int(np.argmax(wrong))
                raise ValueError(f"flow {first}: {name} = {values[first]}: must be finite and not negative")

    def __len__(self) -> int:
        return len(self.source)

    def take(self, chosen: Longs | Bools) -> Flows:
        return replace(self, **{each.name: getattr(self, each.name)[chosen] for each in fields(self)})

    def reversed(self) -> Flows:
        """Return the same bytes in the opposite direction."""
        return replace(self, source=self.destination, destination=self.source)

    def split(self, queue_pairs: int) -> Flows:
        """Return each flow as `queue_pairs` equal flows, one after another, whose rates are independent."""
        many = self.take(np.repeat(np.arange(len(self)), queue_pairs))
        pairs = np.tile(np.arange(queue_pairs, dtype=np.int32), len(self))
        return replace(many, bytes=many.bytes / queue_pairs, queue_pair=many.queue_pair * np.int32(queue_pairs) + pairs)


def joined(parts: Sequence[Flows]) -> Flows:
    """Return all flows of `parts`, in their order."""
    return Flows(**{each.name: np.concatenate([getattr(part, each.name) for part in parts]) for each in fields(Flows)})


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Bundles:
    """Bundle b has the links[offsets[b] : offsets[b + 1]], and the shares at the same places are those of its bytes."""

    offsets: Longs
    links: Ints
    shares: Floats

    def __len__(self) -> int:
        return len(self.offsets) - 1


NO_BUNDLES = Bundles(offsets=np.zeros(1, np.int64), links=np.zeros(0, np.int32), shares=np.zeros(0))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Routes:
    """The routes of flows: flow f uses items[offsets[f] : offsets[f + 1]], links and (from num_links on) bundles."""

    num_links: int
    offsets: Longs
    items: Ints
    shares: Floats = field(default_factory=lambda: np.zeros(0))  # one per item; empty if all are 1
    bundles: Bundles = NO_BUNDLES
    latency: Floats  # [flows] seconds of the longest path; 0 without one
    is_cut_off: Bools  # [flows] whether no path is left

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def item_shares(self) -> Floats:
        return self.shares if len(self.shares) else np.ones(len(self.items))

    def carried(self, values: Floats) -> Floats:
        """Return for each link the sum over flows of value times share of the link [links]."""
        total = np.zeros(self.num_links + len(self.bundles))
        step = 1 << 20  # flows at once, to limit memory
        for first in range(0, len(self), step):
            bounds = self.offsets[first : first + step + 1]
            inside = slice(int(bounds[0]), int(bounds[-1]))
            weights = np.repeat(values[first : first + step], np.diff(bounds))
            if len(self.shares):
                weights = weights * self.shares[inside]
            total += np.bincount(self.items[inside], weights, minlength=len(total))
        spread = np.repeat(total[self.num_links :], np.diff(self.bundles.offsets)) * self.bundles.shares
        return total[: self.num_links] + np.bincount(self.bundles.links, spread, minlength=self.num_links)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Sharing:
    """Routes and, for each link and bundle, the flows that use it; prepared once to find rates many times."""

    routes: Routes
    flows_of: Csr
    bundles_of: Csr
    state: NDArray[np.uint8]  # for the kernel, all 0 between calls

    @staticmethod
    def of(routes: Routes) -> Sharing:
        from dovetail.network.flows.flows_numba import transpose

        bundles = routes.bundles
        return Sharing(
            routes=routes,
            flows_of=transpose(routes.offsets, routes.items, routes.num_links + len(bundles)),
            bundles_of=transpose(bundles.offsets, bundles.links, routes.num_links),
            state=np.zeros(len(routes), np.uint8),
        )

    def fill(self, left: Floats, wanted: Longs, rates: Floats, level: float) -> None:
        """Write the `rates` of the flows `wanted`, and reduce `left` by what they take."""
        from dovetail.network.flows import flows_numba

        flows_numba.fill(left, *self._arrays(), self.flows_of, self.bundles_of, wanted, self.state, rates, level)

    def carried(self, values: Floats, chosen: Longs) -> Floats:
        """Return `Routes.carried` for the flows `chosen` alone."""
        from dovetail.network.flows import flows_numba

        return flows_numba.carry(values, chosen, *self._arrays(), self.routes.num_links)  # type: ignore[no-any-return]

    def _arrays(self) -> tuple[tuple[Longs, Ints, Floats], tuple[Longs, Ints, Floats]]:
        routes, bundles = self.routes, self.routes.bundles
        return (routes.offsets, routes.items, routes.shares), (bundles.offsets, bundles.links, bundles.shares)


def max_min_rates(
    capacity: Floats, routes: Routes, priority: NDArray[np.int8] | None = None, engine: Engine = "kernel"
) -> Floats:
    """Return the bytes/s of each flow when all send [flows].

    The rate is 0 for flows that are cut off or on a link of no capacity, and for flows with an empty route, which stay
    where they are and need none.
    """
    rates = np.zeros(len(routes))
    goes = ~routes.is_cut_off & (np.diff(routes.offsets) > 0)
    classes = np.zeros(len(routes), np.int8) if priority is None else priority
    left = capacity.astype(np.float64)
    sharing = Sharing.of(routes) if engine == "kernel" else None
    for each in np.unique(classes[goes]):
        wanted = np.flatnonzero(goes & (classes == each))
        if sharing:
            sharing.fill(left, wanted, rates, 0.0)
        else:
            fill_reference(left, routes, wanted, rates)
        left[left < NOTHING_LEFT * capacity] = 0.0
    return rates


def fill_reference(left: Floats, routes: Routes, wanted: Longs, rates: Floats) -> None:
    """Do what `Sharing.fill` does in plain NumPy, step by step as the module's docstring says."""
    share_of = share_matrix(routes)[wanted]
    is_open = np.ones(len(wanted), bool)
    while is_open.any():
        load = share_of[is_open].sum(axis=0)
        with np.errstate(divide="ignore", invalid="ignore"):
            share = np.where(load > 0, np.maximum(left, 0.0) / load, np.inf)
        link = int(np.argmin(share))
        fixed = np.flatnonzero(is_open & (share_of[:, link] > 0))
        rates[wanted[fixed]] = share[link]
        left -= share[link] * share_of[fixed].sum(axis=0)
        is_open[fixed] = False


def share_matrix(routes: Routes) -> Floats:
    """Return the shares of all flows on all links [flows, links], with bundles unpacked; for small networks."""
    matrix = np.zeros((len(routes), routes.num_links + len(routes.bundles)))
    flow = np.repeat(np.arange(len(routes)), np.diff(routes.offsets))
    np.add.at(matrix, (flow, routes.items), routes.item_shares())
    bundles = routes.bundles
    inside = np.zeros((len(bundles), routes.num_links))
    np.add.at(inside, (np.repeat(np.arange(len(bundles)), np.diff(bundles.offsets)), bundles.links), bundles.shares)
    return matrix[:, : routes.num_links] + matrix[:, routes.num_links :] @ inside


def routes_of(paths: Sequence[Sequence[int | tuple[int, float]] | None], num_links: int) -> Routes:
    """Make routes without latency from lists of links or pairs (link, share); None is a flow that is cut off."""
    pairs = [[each if isinstance(each, tuple) else (each, 1.0) for each in path or ()] for path in paths]
    flat = [pair for path in pairs for pair in path]
    return Routes(
        num_links=num_links,
        offsets=np.cumsum([0, *map(len, pairs)]).astype(np.int64),
        items=np.array([link for link, _ in flat], np.int32),
        shares=np.array([share for _, share in flat], np.float64),
        latency=np.zeros(len(paths)),
        is_cut_off=np.array([path is None for path in paths], bool),
    )
