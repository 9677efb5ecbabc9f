"""The share of its peak that an operation reaches, interpolated between measured shapes.

For a matrix product it is the share of its roofline, for attention that of the BF16 peak. Measurements that differ in
one number only (rows of a product, length of attention's sequences) make a curve: the log of the share, in straight
lines between the points over the log of that number.

products    The mean over all curves of the same format at the product's rows, each with weight 1 / d^4. d is the
            distance of the shape to the curve's nearest point, in the logs of m, n, k and groups. So a small product
            inherits the measured bytes/s, a large one the measured FLOP/s.
attention   Each curve is for one number of rows (heads of all sequences); between two curves the line is straight.
            Below the measured rows and lengths the lines are extended, since a kernel no longer fills the GPU; above
            them the share stays.

The measured points also show how wrong that is. Each is predicted from the others; the root mean square of these errors
is the half band at the median distance of a point to its nearest neighbour. The band shrinks in proportion as a shape
comes closer to a measured one, but never below the spread between measurements of one shape. So a shape that nobody
measured (a weight gradient, whose k is tokens) borrows from the nearest and gets a wide band. A format that nobody
measured takes another format's shares, and its times where latencies make the shares low.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from statistics import mean, median

from dovetail.spec.band import Band
from dovetail.spec.hardware import Gpu
from dovetail.spec.measurements import FORMATS, AttentionKind, Format, GemmPoint, moved_seconds

LAYOUT_DISTANCE = math.log(2)  # two layouts of rows count as different as two sizes that differ by a factor of two
EXACT = 1e-12  # squared distances up to this count as zero
EXTRAPOLATION = 3.0  # the band grows up to this many times the typical distance between measured points


@dataclass(frozen=True, slots=True)
class GemmShare:
    """The share of its roofline that a product reaches, and the measured product nearest to it."""

    band: Band
    nearest: GemmPoint
    distance: float  # 0 if this shape was measured


@dataclass(frozen=True, slots=True)
class _Curve:
    """Log shares over the log of the number `at` in which the measurements differ; they have `place` in common."""

    layout: str
    place: tuple[float, ...]  # log n, log k, log groups of products; log rows of attention
    at: tuple[float, ...]  # ascending
    log_shares: tuple[float, ...]
    lower: tuple[float, ...]  # how far below each, in logs, other measurements of the same shape lie
    upper: tuple[float, ...]  # how far above
    points: tuple[GemmPoint, ...] = ()

    def nearest(self, x: float) -> int:
        """Return the index of the measurement nearest to `x`."""
        right = bisect_left(self.at, x)
        return min((i for i in (right - 1, right) if 0 <= i < len(self.at)), key=lambda i: abs(self.at[i] - x))

    def without(self, index: int) -> tuple[_Curve, ...]:
        """Return this curve without one measurement, or nothing if it has no other."""
        fields = (self.at, self.log_shares, self.lower, self.upper)
        at, log_shares, lower, upper = (values[:index] + values[index + 1 :] for values in fields)
        return (_Curve(self.layout, self.place, at, log_shares, lower, upper),) if at else ()


@dataclass(frozen=True, slots=True)
class _Found:
    """An interpolated log share with its spread, the distance to the nearest measurement, and that one's curve."""

    log_share: float
    lower: float
    upper: float
    distance: float
    curve: _Curve


Predict = Callable[
    [Sequence[_Curve], _Curve, float], tuple[float, float]
]  # the log share from the others, and the distance


@dataclass(frozen=True, slots=True)
class _Measured:
    """The measurements that shares come from, and how well they predict each other."""

    curves: tuple[_Curve, ...]
    error: float  # root mean square error of the log shares, each predicted from the others
    typical_distance: float  # the median distance of a point to its nearest neighbour

    def half_band(self, distance: float) -> float:
        """Return half the width of the band, in logs."""
        return self.error * min(distance / self.typical_distance, EXTRAPOLATION)

    @property
    def best(self) -> float:
        return math.exp(max(max(curve.log_shares) for curve in self.curves))


@lru_cache(maxsize=1 << 16)
def gemm_share(gpu: Gpu, format: Format, layout: str, m: float, n: float, k: float, groups: float = 1) -> GemmShare:
    """Return the share of their roofline that `groups` products [m, k] x [k, n] are expected to reach on `gpu`.

    A format that the GPU has no products in means the next wider one.
    """
    format = gpu.runs_as(format)
    measured_format = _measured_format(gpu, format)
    measured = _measured(gpu, measured_format)
    rows, place = math.log(m), (math.log(n), math.log(k), math.log(groups))
    found = _weighted(measured.curves, layout, place, rows)
    share, half = math.exp(found.log_share), measured.half_band(found.distance)
    band = Band(share, share * math.exp(-max(half, found.lower)), share * math.exp(max(half, found.upper)))
    if measured_format != format:
        band = band * (_in_format(gpu, format, measured_format, (m, n, k), share) / share)
        relative = gpu.efficiency.gemm_relative.get(format)
        band = band * relative.band if relative else band
    limit = max(1.0, measured.best)  # above 1 where measured operands stay in caches
    band = Band(*(min(each, limit) for each in (band.value, band.low, band.high)))
    return GemmShare(band, found.curve.points[found.curve.nearest(rows)], found.distance)


@lru_cache(maxsize=1 << 14)
def attention_share(gpu: Gpu, kind: AttentionKind, rows: float, length: float) -> Band:
    """Return the share of the BF16 peak that attention is expected to reach.

    `rows` are the heads of all sequences (in decoding: of all queries), and `length` the keys of each sequence.
    """
    estimate, measured = gpu.efficiency.attention_estimate(kind), _attention(gpu, kind)
    if measured is None:
        return estimate.band
    log_share, distance = _between(measured.curves, math.log(rows), math.log(length))
    share, half = min(math.exp(log_share), 1.0), math.exp(measured.half_band(distance))
    low, high = estimate.low / estimate.value / half, estimate.high / estimate.value * half
    return Band(share, share * low, min(1.0, share * high))


@lru_cache(maxsize=256)
def _measured(gpu: Gpu, format: Format) -> _Measured:
    curves = _gemm_curves(gpu, [point for point in gpu.efficiency.products if point.format == format])

    def predict(rest: Sequence[_Curve], curve: _Curve, x: float) -> tuple[float, float]:
        found = _weighted(rest, curve.layout, curve.place, x)
        return found.log_share, found.distance

    return _Measured(curves, *_left_out(curves, predict))


@lru_cache(maxsize=256)
def _measured_format(gpu: Gpu, format: Format) -> Format:
    """Return the format if it has points, else the widest format that has, which is nearest to those without."""
    there = {point.format for point in gpu.efficiency.products}
    return format if format in there else next(each for each in reversed(FORMATS) if each in there)


@lru_cache(maxsize=64)
def _best_shares(gpu: Gpu) -> dict[bool, float]:
    return gpu.best_shares()


def _in_format(gpu: Gpu, format: Format, measured: Format, shape: tuple[float, float, float], share: float) -> float:
    """Return the share of its roofline that a product reaches in `format` if it reaches `share` in `measured`."""
    best = _best_shares(gpu)
    ratio = gpu.roofline_seconds(format, *shape) / gpu.roofline_seconds(measured, *shape)
    moved = share * ratio / moved_seconds(1.0, ratio, share, best[gpu.is_compute_bound(measured, *shape)])
    return min(moved, max(share, best[gpu.is_compute_bound(format, *shape)]))


@lru_cache(maxsize=64)
def _attention(gpu: Gpu, kind: AttentionKind) -> _Measured | None:
    """Return the measurements of attention by shape, or None if there are none of this kind."""
    peak = gpu.peak("bf16") / 1e12
    curves = [
        _Curve(
            layout=kind,
            place=(math.log(sweep.rows),),
            at=tuple(math.log(length) for length in sweep.length),
            log_shares=tuple(math.log(tflops / peak) for tflops in sweep.tflops),
            lower=(0.0,) * len(sweep.length),
            upper=(0.0,) * len(sweep.length),
        )
        for sweep in gpu.efficiency.attention
        if sweep.kind == kind
    ]
    if not curves:
        return None
    curves.sort(key=lambda curve: curve.place)
    left_out = _left_out(curves, lambda rest, curve, x: _between(rest, curve.place[0], x))
    return _Measured(tuple(curves), *left_out)


def _gemm_curves(gpu: Gpu, points: Sequence[GemmPoint]) -> tuple[_Curve, ...]:
    """Return a curve of all points that differ in their rows only.

    Points that were measured once are taken to have the mean spread of the others.
    """
    twice = [math.log(point.speed.high / point.speed.low) / 2 for point in points if point.low and point.high]
    spread = mean(twice) if twice else 0.0
    families: dict[tuple[str, tuple[float, ...]], list[GemmPoint]] = {}
    for point in points:
        logs = (math.log(point.n), math.log(point.k), math.log(point.groups))
        families.setdefault((point.layout, logs), []).append(point)
    curves = []
    for (layout, place), family in families.items():
        family.sort(key=lambda point: point.m)
        shares = [gpu.ideal_seconds(point) * point.speed.value / point.flop for point in family]
        curve = _Curve(
            layout=layout,
            place=place,
            at=tuple(math.log(point.m) for point in family),
            log_shares=tuple(map(math.log, shares)),
            lower=tuple(math.log(point.tflops / point.low) if point.low else spread for point in family),
            upper=tuple(math.log(point.high / point.tflops) if point.high else spread for point in family),
            points=tuple(family),
        )
        curves.append(curve)
    return tuple(curves)


def _left_out(curves: Sequence[_Curve], predict: Predict) -> tuple[float, float]:
    """Return the root mean square error of predicting each measurement from the others, and the median distance."""
    errors, distances = [], []
    for place, curve in enumerate(curves):
        for index, (x, log_share) in enumerate(zip(curve.at, curve.log_shares, strict=True)):
            rest = (*curves[:place], *curve.without(index), *curves[place + 1 :])
            if not rest:
                return math.log(2), math.log(2)  # a single one: assume a factor of two at twice the size
            predicted, distance = predict(rest, curve, x)
            errors.append(predicted - log_share)
            distances.append(distance)
    return math.sqrt(mean(error * error for error in errors)), max(median(distances), 1e-9)


def _weighted(curves: Sequence[_Curve], layout: str, place: tuple[float, ...], x: float) -> _Found:
    """Return the mean over curves with weights 1 / distance^4, or the measured value at distance 0.

    It is written out for speed, because a search asks for thousands of shapes.
    """
    log_n, log_k, log_groups = place
    total = lower = upper = weights = 0.0
    least, nearest = math.inf, curves[0]
    for curve in curves:
        n, k, groups = curve.place
        at = curve.at
        right = bisect_left(at, x)
        left = max(right - 1, 0)
        right = min(right, len(at) - 1)
        before, after = abs(x - at[left]), abs(at[right] - x)
        part = before / (before + after) if left != right else 0.0  # of the way to `right`
        gap = min(before, after)
        squared = (n - log_n) ** 2 + (k - log_k) ** 2 + (groups - log_groups) ** 2 + gap * gap
        if curve.layout != layout:
            squared += LAYOUT_DISTANCE**2
        weight = 1 / (squared * squared) if squared > EXACT else 1 / EXACT**2
        if squared < least:
            least, nearest = squared, curve
        weights += weight
        total += weight * (curve.log_shares[left] + part * (curve.log_shares[right] - curve.log_shares[left]))
        lower += weight * (curve.lower[left] + part * (curve.lower[right] - curve.lower[left]))
        upper += weight * (curve.upper[left] + part * (curve.upper[right] - curve.upper[left]))
    distance = math.sqrt(least) if least > EXACT else 0.0
    return _Found(total / weights, lower / weights, upper / weights, distance, nearest)


def _between(curves: Sequence[_Curve], log_rows: float, x: float) -> tuple[float, float]:
    """Return the log share between the two curves on either side of `log_rows`, and the distance to a measurement."""
    distance = min(math.hypot(curve.place[0] - log_rows, curve.at[curve.nearest(x)] - x) for curve in curves)
    rows = [curve.place[0] for curve in curves]
    shares = [_extended(x, curve.at, curve.log_shares) for curve in curves]
    for index in range(1, len(rows)):  # more rows must not take less time, as they might where curves are extended
        shares[index] = min(shares[index], shares[index - 1] + rows[index] - rows[index - 1])
    return _extended(log_rows, rows, shares), distance


def _extended(x: float, at: Sequence[float], values: Sequence[float]) -> float:
    """Return the value at `x`: straight between points, the last value above them, the first slope below them.

    That slope is limited to 0 to 1, so that less work takes no more time, and no less than in proportion.
    """
    right = bisect_left(at, x)
    if right == len(at):
        return values[-1]
    if right > 0:
        return _line(x, at[right - 1 : right + 1], values[right - 1 : right + 1])
    slope = (values[1] - values[0]) / (at[1] - at[0]) if len(at) > 1 else 0.0
    return values[0] - min(max(slope, 0.0), 1.0) * (at[0] - x)


def _line(x: float, at: Sequence[float], values: Sequence[float]) -> float:
    place = (x - at[0]) / (at[1] - at[0])
    return values[0] + place * (values[1] - values[0])
