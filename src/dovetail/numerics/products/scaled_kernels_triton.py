"""The products of `numerics.products.scaled_reference` as Triton kernels, for FP8 Tensor Cores (Hopper first).

    scaled_matmul            one matrix by another                                 fprop, dgrad
    grouped_scaled_matmul    each expert's rows, which lie one after another       prefill and training
    masked_scaled_matmul     each expert's first rows of a fixed number            decoding: no shape depends on routing
    scaled_outer, grouped_scaled_outer    sums over rows, of all or of each expert wgrad

`HopperAccumulator(promotion)` multiplies as FP8; how the Tensor Core adds within an interval is its own. Under
`Fp32Accumulator` values are widened to FP16, which is exact, and added in FP32, at half the rate.
Operands are fast when contiguous along K with rows that begin at multiples of 16 bytes; others are correct.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
import triton
from torch import Tensor

from dovetail.numerics.formats.quantize import Quantized
from dovetail.numerics.products.accumulate import Accumulator, Fp32Accumulator, HopperAccumulator
from dovetail.numerics.products.scaled_blocks_triton import CONTIGUOUS, DENSE, MASKED, multiply, sum_outer
from dovetail.numerics.products.scaled_reference import transposed
from dovetail.spec.tensors import scale_shape

HOPPER = HopperAccumulator()
HOPPER_MULTIPROCESSORS = 132  # where there is no device to ask
FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)


@dataclass(frozen=True, slots=True, kw_only=True)
class Blocking:
    """How a product is cut up."""

    rows: int
    columns: int
    warps: int
    stages: int  # tiles of K in flight

    @property
    def options(self) -> dict[str, int]:
        return {"BLOCK_M": self.rows, "BLOCK_N": self.columns, "num_warps": self.warps, "num_stages": self.stages}


# Besides the total a program holds the sum under way, in FP32: a larger block than 128 x 128 leaves the registers.
BLOCKINGS = (
    Blocking(rows=128, columns=128, warps=8, stages=3),
    Blocking(rows=64, columns=128, warps=4, stages=3),
    Blocking(rows=64, columns=64, warps=4, stages=4),
    Blocking(rows=64, columns=32, warps=4, stages=5),
    Blocking(rows=64, columns=16, warps=4, stages=6),
)
BAND = 8  # rows of blocks that run side by side
# A row or column of a block brings 128 bytes per tile of K, at some 40 bytes a cycle and multiprocessor; an output is
# 128 products, at 4096 a cycle: reading one costs as much as computing this many. An estimate, not a measurement.
EDGE_COST = 100


def choose_blocking(rows: Sequence[int], columns: int, multiprocessors: int = HOPPER_MULTIPROCESSORS) -> Blocking:
    """The blocks that finish first when every multiprocessor takes one after another; `rows` of each group."""

    def cost(blocking: Blocking) -> int:
        blocks = sum(triton.cdiv(each, blocking.rows) for each in rows) * triton.cdiv(columns, blocking.columns)
        edges = blocking.rows + blocking.columns
        return triton.cdiv(blocks, multiprocessors) * (blocking.rows * blocking.columns + EDGE_COST * edges)

    return min(BLOCKINGS, key=cost)


def scaled_matmul(
    a: Quantized,
    b: Quantized,
    accumulator: Accumulator = HOPPER,
    dtype: torch.dtype = torch.bfloat16,
    blocking: Blocking | None = None,
) -> Tensor:
    """a [M, K] times b [N, K] transposed -> [M, N]; tiles of one width, of any height."""
    out = a.data.new_empty(a.data.shape[0], b.data.shape[0], dtype=dtype)
    weights = b.data[None], b.scale[None]
    _launch(a, weights, b, out, DENSE, None, [out.shape[0]], accumulator, blocking)
    return out


def grouped_scaled_matmul(
    a: Quantized,
    b: Sequence[Quantized],
    offsets: Sequence[int],
    accumulator: Accumulator = HOPPER,
    dtype: torch.dtype = torch.bfloat16,
    blocking: Blocking | None = None,
) -> Tensor:
    """Rows offsets[e] : offsets[e + 1] of a [R, K] (tiles of height 1) times b[e] [N, K] transposed -> [R, N].

    Weights that are slices of one tensor are taken where they lie; others are copied together first.
    """
    _check_rows(a, len(b))
    if len(offsets) != len(b) + 1 or offsets[0] != 0 or offsets[-1] != len(a.data) or list(offsets) != sorted(offsets):
        raise ValueError(f"offsets {list(offsets)} do not divide {len(a.data)} rows among {len(b)} experts")
    out = a.data.new_empty(a.data.shape[0], b[0].data.shape[0], dtype=dtype)
    counts = [stop - start for start, stop in pairwise(offsets)]
    _launch(a, _stacked(b), b[0], out, CONTIGUOUS, list(offsets), counts, accumulator, blocking)
    return out


def masked_scaled_matmul(
    a: Quantized,
    b: Sequence[Quantized],
    counts: Tensor,
    accumulator: Accumulator = HOPPER,
    dtype: torch.dtype = torch.bfloat16,
    blocking: Blocking | None = None,
) -> Tensor:
    """a [E * capacity, K]: `capacity` rows of each expert, of which the first counts[e] (int32 on a's device) hold
    values. They are multiplied by b[e] [N, K] transposed -> [E * capacity, N], whose other rows are left as they are
    in fresh memory. Nothing waits for the GPU [DeepGEMM's masked layout]."""
    _check_rows(a, len(b))
    if len(a.data) % len(b) or counts.shape != (len(b),) or counts.dtype != torch.int32:
        raise ValueError(
            f"{len(a.data)} rows for {len(b)} experts with counts {counts.dtype} {list(counts.shape)}: rows must be"
            f" as many for each expert, and counts int32 [{len(b)}]"
        )
    capacity = len(a.data) // len(b)
    out = a.data.new_empty(a.data.shape[0], b[0].data.shape[0], dtype=dtype)
    _launch(a, _stacked(b), b[0], out, MASKED, counts, [capacity] * len(b), accumulator, blocking)
    return out


def scaled_outer(
    left: Quantized, right: Quantized, accumulator: Accumulator = HOPPER, dtype: torch.dtype = torch.float32
) -> Tensor:
    """left [R, N] transposed times right [R, M] -> [N, M]. Both in tiles of width 1, such as 128x1."""
    return scaled_matmul(transposed(left), transposed(right), accumulator, dtype)


def grouped_scaled_outer(
    left: Quantized,
    right: Quantized,
    offsets: Sequence[int],
    accumulator: Accumulator = HOPPER,
    dtype: torch.dtype = torch.float32,
    blocking: Blocking | None = None,
) -> Tensor:
    """left [R, N] transposed times right [R, M], both in tiles 128x1, for each expert's rows -> [E, N, M].

    As in the reference, rows are tiled expert by expert. Fast where both are K-major, as `quantize_triton` writes such
    tiles, and every expert's rows begin at a multiple of 128.
    """
    height, width, tile = left.data.shape[1], right.data.shape[1], left.tile[0]
    counts = [stop - start for start, stop in pairwise(offsets)]
    tiles = [triton.cdiv(count, tile) for count in counts]
    firsts = [sum(tiles[:e]) for e in range(len(tiles))]
    for each in (left, right):
        expected = (sum(tiles), each.data.shape[1])
        if each.tile != (tile, 1) or each.data.dtype not in FP8 or each.scale.shape != expected:
            raise ValueError(
                f"{each.format} {list(each.data.shape)} in tiles {list(each.tile)}, scales {list(each.scale.shape)}:"
                f" experts with rows {list(offsets)} need FP8 in tiles {[tile, 1]} with scales {list(expected)}"
            )
    promotion, is_wide = _interval(accumulator, tile, max(counts, default=0))
    out = left.data.new_empty(len(counts), height, width, dtype=dtype)
    if not out.numel():
        return out
    table = _table(zip(offsets, counts, firsts, strict=False), out.device)
    blocking = blocking or choose_blocking([height] * len(counts), width, _multiprocessors(out.device))
    grid = (triton.cdiv(height, blocking.rows) * triton.cdiv(width, blocking.columns), len(counts))
    sum_outer[grid](
        left.data, left.scale.contiguous(), right.data, right.scale.contiguous(), out, table, height, width,
        *left.data.stride(), *right.data.stride(), WIDTH=tile, PROMOTION=promotion,
        IS_EVEN=all(count % tile == 0 for count in counts), IS_WIDE=is_wide, **blocking.options,
    )  # fmt: skip
    return out


def _launch(
    a: Quantized,
    weights: tuple[Tensor, Tensor],
    b: Quantized,
    out: Tensor,
    layout: object,
    groups: Sequence[int] | Tensor | None,
    counts: Sequence[int],
    accumulator: Accumulator,
    blocking: Blocking | None,
) -> None:
    """`groups`: offsets (CONTIGUOUS) or numbers of rows (MASKED); `counts`: rows of each group, at most."""
    _check_operands(a, b)
    promotion, is_wide = _interval(accumulator, a.tile[1], a.data.shape[1])
    if not out.numel():
        return
    columns, inner = out.shape[1], a.data.shape[1]
    blocking = blocking or choose_blocking(counts, columns, _multiprocessors(out.device))
    table, rows = groups, counts[0]
    if layout == CONTIGUOUS:
        assert isinstance(groups, list)
        bounds = enumerate(pairwise(groups))
        entries = [(g, first, stop) for g, (start, stop) in bounds for first in range(start, stop, blocking.rows)]
        table = _table(entries, out.device)
    blocks = sum(triton.cdiv(count, blocking.rows) for count in counts) * triton.cdiv(columns, blocking.columns)
    data, scale = weights
    multiply[(blocks,)](
        a.data, a.scale, data, scale, out, table, rows, columns, inner, *a.data.stride(), *a.scale.stride(),
        *data.stride(), *scale.stride(), A_TILE=a.tile[0], B_TILE=b.tile[0], LAYOUT=layout, WIDTH=a.tile[1],
        PROMOTION=promotion, IS_EVEN=inner % promotion == 0, IS_WIDE=is_wide, BAND=BAND, **blocking.options,
    )  # fmt: skip


def _check_operands(a: Quantized, b: Quantized) -> None:
    if a.data.ndim != 2 or b.data.ndim != 2 or a.data.shape[1] != b.data.shape[1]:
        raise ValueError(f"a is {list(a.data.shape)} and b {list(b.data.shape)}; expected [M, K] and [N, K]")
    if a.tile[1] != b.tile[1]:
        raise ValueError(
            f"tiles {list(a.tile)} of a and {list(b.tile)} of b differ in width, which the kernel does not take;"
            " quantise one of them anew"
        )
    for each in (a, b):
        expected = scale_shape(tuple(each.data.shape), each.tile)
        if each.data.dtype not in FP8 or tuple(each.scale.shape) != expected:
            raise ValueError(
                f"the kernel multiplies FP8 with scales {list(expected)}, not {each.data.dtype} {list(each.data.shape)}"
                f" in tiles {list(each.tile)} with scales {list(each.scale.shape)}"
            )


def _check_rows(a: Quantized, experts: int) -> None:
    if a.tile[0] != 1 or not experts:
        raise ValueError(f"rows of {experts} experts, in tiles of height {a.tile[0]}; expected experts, and height 1")


def _interval(accumulator: Accumulator, width: int, inner: int) -> tuple[int, bool]:
    """Elements of K between promotions, and whether values are widened."""
    if isinstance(accumulator, Fp32Accumulator):
        promotion = width
    else:
        promotion = accumulator.promotion or max(inner, width)
        if inner <= width:
            promotion = min(promotion, width)
        elif width % promotion:
            raise ValueError(
                f"promotion = {accumulator.promotion} with one scale per {width} of K = {inner}: no Tensor Core applies"
                f" scales within its sums; take a divisor of {width}, or the reference in numerics.fp8_gemm"
            )
    if promotion < 32 or promotion & (promotion - 1) and promotion % 128:
        raise ValueError(f"sums over {promotion} of K: the kernel takes 32, 64 and multiples of 128")
    return promotion, isinstance(accumulator, Fp32Accumulator)


def _stacked(b: Sequence[Quantized]) -> tuple[Tensor, Tensor]:
    """Data [E, N, K] and scales [E, tiles, tiles], without a copy if each is a slice of one tensor."""
    for each in b[1:]:
        if each.data.shape != b[0].data.shape or each.tile != b[0].tile or each.data.dtype != b[0].data.dtype:
            raise ValueError(
                f"weights of experts differ: {list(b[0].data.shape)} in tiles {list(b[0].tile)} and"
                f" {list(each.data.shape)} in tiles {list(each.tile)}"
            )
    return _stack([each.data for each in b]), _stack([each.scale for each in b])


def _stack(parts: Sequence[Tensor]) -> Tensor:
    first = parts[0]
    places = [part.storage_offset() for part in parts]
    step = places[1] - places[0] if len(parts) > 1 else first.numel()
    is_regular = step > 0 and all(place == places[0] + i * step for i, place in enumerate(places))
    storages = {part.untyped_storage().data_ptr() for part in parts}
    if is_regular and len(storages) == 1 and all(part.stride() == first.stride() for part in parts):
        return first.as_strided((len(parts), *first.shape), (step, *first.stride()))
    return torch.stack(list(parts))


def _table(entries: Iterable[Sequence[int]], device: torch.device) -> Tensor:
    return torch.tensor(list(entries), dtype=torch.int32).to(device, non_blocking=True)


def _multiprocessors(device: torch.device) -> int:
    return (
        torch.cuda.get_device_properties(device).multi_processor_count
        if device.type == "cuda"
        else HOPPER_MULTIPROCESSORS
    )
