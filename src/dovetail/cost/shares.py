"""What share of its roofline a matrix product reaches, and of the BF16 peak attention, interpolated between the shapes
that were measured.

Measurements that differ in one number only (rows of a product, length of attention's sequences) make a curve: log
share, straight between its points in the log of that number.

products    Of measured products of the same format. The mean of all curves at the product's rows, weighted 1 / d^4; d
            is the distance of shapes to the curve's nearest point, in the logs of m, n, k and groups. So a small
            product inherits the measured bytes/s, a large one the measured FLOP/s.
attention   Curves lie side by side by rows (heads of all sequences): straight between two of them. Below what was
            measured both ways go on as they end, for a kernel that cannot fill the GPU; above, the share stays.

How wrong that is, the measured points say themselves: each is predicted from the others, and the root mean square of
these errors, at the median distance to the nearest neighbour, sets the band. It shrinks in proportion as a shape comes
closer to a measured one, and is never less than the spread between measurements of one shape. So a shape that nobody
measured (a weight gradient, whose k is tokens) borrows from the nearest and gets a wide band. A format that nobody
measured takes another's shares; where these are low for latencies, its times.
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

LAYOUT_DISTANCE = math.log(2)  # between layouts of rows: as far apart as twice the size
EXACT = 1e-12  # squared distances up to this are none
EXTRAPOLATION = 3.0  # the band grows with distance up to this many times that between measured points


@dataclass(frozen=True, slots=True)
class GemmShare:
    """Part of the roofline that a product reaches, and the measured product nearest to it."""

    band: Band
    nearest: GemmPoint
    distance: float  # 0: this very shape was measured


@dataclass(frozen=True, slots=True)
class _Curve:
    """Log share over the log of what its measurements differ in; `place` is what they have in common."""

    layout: str
    place: tuple[float, ...]  # of products log n, log k, log groups; of attention log rows
    at: tuple[float, ...]  # ascending
    log_shares: tuple[float, ...]
    lower: tuple[float, ...]  # how far, in logs, other measurements of the same shape lie under each
    upper: tuple[float, ...]  # and over it
    points: tuple[GemmPoint, ...] = ()

    def nearest(self, x: float) -> int:
        """The measurement next to `x`."""
        right = bisect_left(self.at, x)
        return min((i for i in (right - 1, right) if 0 <= i < len(self.at)), key=lambda i: abs(self.at[i] - x))

    def without(self, index: int) -> tuple[_Curve, ...]:
        """This curve without one measurement; nothing if that was all."""
        fields = (self.at, self.log_shares, self.lower, self.upper)
        at, log_shares, lower, upper = (values[:index] + values[index + 1 :] for values in fields)
        return (_Curve(self.layout, self.place, at, log_shares, lower, upper),) if at else ()


@dataclass(frozen=True, slots=True)
class _Found:
    """Between curves: log share and its spread, the distance to the nearest measurement, and that one's curve."""

    log_share: float
    lower: float
    upper: float
    distance: float
    curve: _Curve


Predict = Callable[[Sequence[_Curve], _Curve, float], tuple[float, float]]  # log share of others, distance to them


@dataclass(frozen=True, slots=True)
class _Measured:
    """The measurements that shares come from, and how well they predict each other."""

    curves: tuple[_Curve, ...]
    error: float  # root mean square, of each log share predicted from the others
    typical_distance: float  # of a point to its nearest neighbour

    def half_band(self, distance: float) -> float:
        """In logs, to either side."""
        return self.error * min(distance / self.typical_distance, EXTRAPOLATION)

    @property
    def best(self) -> float:
        return math.exp(max(max(curve.log_shares) for curve in self.curves))


@lru_cache(maxsize=1 << 16)
def gemm_share(gpu: Gpu, format: Format, layout: str, m: float, n: float, k: float, groups: int = 1) -> GemmShare:
    """The share of its roofline that `groups` products [m, k] x [k, n] are expected to reach on `gpu`; FP8 means the
    next wider format where there is no FP8."""
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
    limit = max(1.0, measured.best)  # in caches: above memory's
    band = Band(*(min(each, limit) for each in (band.value, band.low, band.high)))
    return GemmShare(band, found.curve.points[found.curve.nearest(rows)], found.distance)


@lru_cache(maxsize=1 << 14)
def attention_share(gpu: Gpu, kind: AttentionKind, rows: float, length: float) -> Band:
    """The share of the BF16 peak that attention is expected to reach: `rows` heads of all queries' sequences (decoding:
    of all queries), `length` keys each."""
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
    """The format itself, or where it has no points the widest that has: nearest to the formats left out."""
    there = {point.format for point in gpu.efficiency.products}
    return format if format in there else next(each for each in reversed(FORMATS) if each in there)


@lru_cache(maxsize=64)
def _best_shares(gpu: Gpu) -> dict[bool, float]:
    return gpu.best_shares()


def _in_format(gpu: Gpu, format: Format, measured: Format, shape: tuple[float, float, float], share: float) -> float:
    """The share of its roofline that a product reaches in `format`, as it reaches `share` in the one `measured`."""
    best = _best_shares(gpu)
    ratio = gpu.roofline_seconds(format, *shape) / gpu.roofline_seconds(measured, *shape)
    moved = share * ratio / moved_seconds(1.0, ratio, share, best[gpu.is_compute_bound(measured, *shape)])
    return min(moved, max(share, best[gpu.is_compute_bound(format, *shape)]))


@lru_cache(maxsize=64)
def _attention(gpu: Gpu, kind: AttentionKind) -> _Measured | None:
    """None: not measured by shape."""
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
    """Of the points that differ in their rows only. Those measured once are taken to spread as the others do."""
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
    """Root mean square error of each measurement from the others, and the median distance to the nearest of them."""
    errors, distances = [], []
    for place, curve in enumerate(curves):
        for index, (x, log_share) in enumerate(zip(curve.at, curve.log_shares, strict=True)):
            rest = (*curves[:place], *curve.without(index), *curves[place + 1 :])
            if not rest:
                return math.log(2), math.log(2)  # nothing to judge by: a factor of two at twice the size
            predicted, distance = predict(rest, curve, x)
            errors.append(predicted - log_share)
            distances.append(distance)
    return math.sqrt(mean(error * error for error in errors)), max(median(distances), 1e-9)


def _weighted(curves: Sequence[_Curve], layout: str, place: tuple[float, ...], x: float) -> _Found:
    """The mean over curves with weights 1 / distance^4, the value itself at distance 0. A search asks for thousands of
    shapes: written out for speed."""
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
        part = before / (before + after) if left != right else 0.0  # on the way to `right`
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
    """Log share straight between the two curves (ascending) beside `log_rows`, and the distance to the nearest
    measurement."""
    distance = min(math.hypot(curve.place[0] - log_rows, curve.at[curve.nearest(x)] - x) for curve in curves)
    rows = [curve.place[0] for curve in curves]
    shares = [_extended(x, curve.at, curve.log_shares) for curve in curves]
    for index in range(1, len(rows)):  # more rows take no less time, which counts where curves are extended
        shares[index] = min(shares[index], shares[index - 1] + rows[index] - rows[index - 1])
    return _extended(log_rows, rows, shares), distance


def _extended(x: float, at: Sequence[float], values: Sequence[float]) -> float:
    """Straight between points; above them as at the last; below them on at the first slope, of 0 to 1: less work takes
    no more time, and no less than in proportion."""
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
