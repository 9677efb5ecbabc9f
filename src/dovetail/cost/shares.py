"""What share of its roofline a matrix product reaches, interpolated between the shapes that were measured.

Shares come from measured products of the same format. Between their shapes: the mean of log share with weights
1 / d^4, d the distance between shapes in (log m, log n, log k) per group. How wrong that is, the measured points say
themselves: each is predicted from the others, and the root mean square of these errors, at the median distance to
the nearest neighbour, sets the band. The band shrinks in proportion as a shape comes closer to a measured one, and
is never less than the spread between measurements of one shape. So a shape that nobody measured (a weight gradient,
whose k is tokens) borrows from the nearest and gets a wide band; a small product inherits the measured bytes/s, a
large one the measured FLOP/s.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from statistics import mean, median

from dovetail.spec.band import Band
from dovetail.spec.hardware import FORMATS, Format, GemmPoint, Gpu

POWER = 4  # of the distance, in the weights
LAYOUT_DISTANCE = math.log(2)  # between layouts of rows: as far apart as twice the size
EXTRAPOLATION = 3.0  # the band grows with distance up to this many times that between measured points
Shape = tuple[float, float, float]  # log m, log n, log k of one group


@dataclass(frozen=True, slots=True)
class GemmShare:
    """Part of the roofline that a product reaches, and the measured product nearest to it."""

    band: Band
    nearest: GemmPoint
    distance: float  # 0: this very shape was measured


@dataclass(frozen=True, slots=True)
class _Measured:
    """The points that a format's shares come from, and how well they predict each other."""

    points: tuple[GemmPoint, ...]
    shapes: tuple[Shape, ...]
    log_shares: tuple[float, ...]
    spread: float  # of log share between measurements of one shape
    error: float  # root mean square, of each log share predicted from the others
    typical_distance: float  # of a point to its nearest neighbour
    relative: Band  # of the format's share to these points' shares


@lru_cache(maxsize=1 << 16)
def gemm_share(gpu: Gpu, format: Format, layout: str, m: float, n: float, k: float) -> GemmShare:
    """The share of its roofline that a product [m, k] x [k, n] of one group, with such groups beside it, is expected
    to reach on `gpu`; FP8 means the next wider format where there is no FP8."""
    measured = _measured(gpu, gpu.runs_as(format))
    shape = (math.log(m), math.log(n), math.log(k))
    distances = [
        _distance(shape, layout, other, point.layout)
        for other, point in zip(measured.shapes, measured.points, strict=True)
    ]
    index = min(range(len(distances)), key=distances.__getitem__)
    nearest, distance = measured.points[index], distances[index]
    share = math.exp(_interpolated(measured.log_shares, distances))
    reach = min(distance / measured.typical_distance, EXTRAPOLATION)
    half = math.exp(max(measured.error * reach, measured.spread))
    band = Band(share, share / half, share * half)
    if distance == 0 and nearest.low and nearest.high:  # measured more than once: its own band
        band = nearest.speed * (share / nearest.speed.value)
    band = band * measured.relative
    limit = max(1.0, math.exp(max(measured.log_shares)))  # small products in caches pass the roofline of memory
    return GemmShare(Band(*(min(each, limit) for each in (band.value, band.low, band.high))), nearest, distance)


@lru_cache(maxsize=256)
def _measured(gpu: Gpu, format: Format) -> _Measured:
    gemms = gpu.efficiency.gemms
    own = tuple(point for point in gemms if point.format == format)
    relative = gpu.efficiency.gemm_relative.get(format)
    # Another format's shares where there are none: the widest, which is nearest to the formats left out.
    other = next(each for each in reversed(FORMATS) if any(point.format == each for point in gemms))
    points = own or tuple(point for point in gemms if point.format == other)
    shapes = tuple((math.log(point.m), math.log(point.n), math.log(point.k)) for point in points)
    log_shares = tuple(math.log(gpu.ideal_seconds(point) * point.speed.value / point.flop) for point in points)
    twice = [math.log(point.speed.high / point.speed.low) / 2 for point in points if point.low and point.high]
    error, typical = _leave_one_out(points, shapes, log_shares)
    return _Measured(
        points=points,
        shapes=shapes,
        log_shares=log_shares,
        spread=mean(twice) if twice else 0.0,
        error=error,
        typical_distance=typical,
        relative=relative.band if relative and not own else Band.exact(1.0),
    )


def _leave_one_out(
    points: Sequence[GemmPoint], shapes: Sequence[Shape], log_shares: Sequence[float]
) -> tuple[float, float]:
    """Root mean square error of each point from the others, and the median distance to the nearest of them."""
    if len(points) == 1:
        return math.log(2), math.log(2)  # nothing to judge by: a factor of two at twice the size
    errors, nearest = [], []
    for index, (shape, point) in enumerate(zip(shapes, points, strict=True)):
        others = [i for i in range(len(points)) if i != index]
        distances = [_distance(shape, point.layout, shapes[i], points[i].layout) for i in others]
        errors.append(_interpolated([log_shares[i] for i in others], distances) - log_shares[index])
        nearest.append(min(distances))
    return math.sqrt(mean(error * error for error in errors)), max(median(nearest), 1e-9)


def _interpolated(values: Sequence[float], distances: Sequence[float]) -> float:
    """The mean with weights 1 / distance^POWER; the value itself at distance 0."""
    exact = [value for value, distance in zip(values, distances, strict=True) if distance == 0]
    if exact:
        return mean(exact)
    weights = [distance**-POWER for distance in distances]
    return sum(weight * value for weight, value in zip(weights, values, strict=True)) / sum(weights)


def _distance(shape: Shape, layout: str, other: Shape, other_layout: str) -> float:
    rows = 0.0 if layout == other_layout else LAYOUT_DISTANCE
    return math.hypot(shape[0] - other[0], shape[1] - other[1], shape[2] - other[2], rows)
