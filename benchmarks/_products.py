"""The products that `fp8_gemm.py` times: DeepGEMM's published shapes, with operands for each side."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from _gpu import ROWS, WEIGHTS
from torch import Tensor
from torch.nn.functional import ScalingType

from dovetail.numerics.formats.quantized import BLOCK_TILE, COLUMN_TILE, ROW_TILE, Quantized, transposed

BF16, LIBRARY = "torch BF16", "torch scaled_mm"


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """`groups` products of `rows` rows each by weights [n, k]; for wgrad: [n, rows] by [rows, k]."""

    layout: str  # dense, contiguous, masked, wgrad
    name: str
    groups: int
    rows: int
    n: int
    k: int
    published: float | None  # TFLOPS on an H800 [DeepGEMM]

    @property
    def flop(self) -> float:
        return 2.0 * self.groups * self.rows * self.n * self.k

    @property
    def num_bytes(self) -> float:
        """FP8 operands, FP32 scales, and the output: BF16, FP32 for wgrad."""
        if self.layout == "wgrad":
            operands = self.groups * self.rows * (self.n + self.k) * (1 + 4 / 128)
            return operands + 4.0 * self.groups * self.n * self.k
        activations = self.groups * self.rows * self.k * (1 + 4 / 128)
        return activations + self.groups * self.n * self.k * (1 + 4 / 128**2) + 2.0 * self.groups * self.rows * self.n

    @property
    def label(self) -> str:
        count = f"{self.groups} x " if self.groups > 1 else ""
        return f"{self.layout} {count}{self.rows} x {self.n} x {self.k}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Sides:
    """What is timed, and the operands of the check."""

    ours: Callable[[Any], Tensor]  # takes a blocking or None
    rivals: dict[str, Callable[[], Tensor]]
    products: list[tuple[Quantized, Quantized]]  # of each group: a and b, so that its output is a b^T
    parts: Callable[[Tensor], list[Tensor]]  # a result, group by group


def cases() -> list[Case]:
    found = [
        Case(layout="dense", name=name, groups=1, rows=rows, n=n, k=k, published=rate)
        for name, (n, k, rates) in WEIGHTS.items()
        for rows, rate in zip(ROWS, rates, strict=True)
    ]
    up, down = WEIGHTS["gate + up"][:2], WEIGHTS["down"][:2]
    grouped = {  # TFLOPS of gate + up and of down on an H800 [DeepGEMM]
        "contiguous": {(4, 8192): (1346, 1214), (8, 4096): (1346, 1214)},
        "masked": {(1, 1024): (1233, 925), (2, 512): (1040, 916), (4, 256): (932, 815)},
        "wgrad": {(4, 8192): (None, None)},
    }
    for layout, table in grouped.items():
        for (groups, rows), rates in table.items():
            for name, (n, k), rate in zip(("gate + up", "down"), (up, down), rates, strict=True):
                found.append(Case(layout=layout, name=name, groups=groups, rows=rows, n=n, k=k, published=rate))
    return found


def prepare(case: Case, device: torch.device) -> Sides:
    return _prepare_wgrad(case, device) if case.layout == "wgrad" else _prepare_rows(case, device)


def _prepare_rows(case: Case, device: torch.device) -> Sides:
    from dovetail.numerics.formats import quantize_triton
    from dovetail.numerics.products import scaled_triton

    x = torch.randn(case.groups * case.rows, case.k, device=device, dtype=torch.bfloat16)
    w = torch.randn(case.groups, case.n, case.k, device=device, dtype=torch.bfloat16)
    a = quantize_triton.quantize(x, ROW_TILE)
    each_weight = [quantize_triton.quantize(each, BLOCK_TILE) for each in w]
    weight = _stacked(each_weight)
    offsets = [case.rows * g for g in range(case.groups + 1)]
    counts = torch.full((case.groups,), case.rows, dtype=torch.int32, device=device)
    rows = [_rows(a, start, stop) for start, stop in pairwise(offsets)]

    def ours(blocking: Any) -> Tensor:
        if case.layout == "masked":
            return scaled_triton.masked_fprop(a, weight, counts, blocking=blocking)
        return scaled_triton.fprop(a, weight, offsets, blocking=blocking)

    ends = torch.tensor(offsets[1:], dtype=torch.int32, device=device)
    bf16: dict[str, Callable[[], Tensor]] = {
        "dense": lambda: x @ w[0].t(),
        "contiguous": lambda: F.grouped_mm(x, w.transpose(1, 2), offs=ends),
        "masked": lambda: torch.bmm(x.view(case.groups, case.rows, case.k), w.transpose(1, 2)),
    }
    library = [_library_product(*pair) for pair in zip(rows, each_weight, strict=True)]
    return Sides(
        ours=ours,
        rivals={BF16: bf16[case.layout], LIBRARY: lambda: torch.cat([product() for product in library])
                if len(library) > 1 else library[0]()},
        products=list(zip(rows, each_weight, strict=True)),
        parts=lambda result: [result[start:stop] for start, stop in pairwise(offsets)],
    )  # fmt: skip


def _prepare_wgrad(case: Case, device: torch.device) -> Sides:
    from dovetail.numerics.formats import quantize_triton
    from dovetail.numerics.products import scaled_triton

    tokens = case.groups * case.rows
    grad, x = (torch.randn(tokens, size, device=device, dtype=torch.bfloat16) for size in (case.n, case.k))
    left, right = (quantize_triton.quantize(each, COLUMN_TILE) for each in (grad, x))
    offsets = [case.rows * g for g in range(case.groups + 1)]
    ends = torch.tensor(offsets[1:], dtype=torch.int32, device=device)
    pairs = [
        (transposed(_rows(left, start, stop, 128)), transposed(_rows(right, start, stop, 128)))
        for start, stop in pairwise(offsets)
    ]
    library = [_library_product(*pair, ScalingType.BlockWise1x128) for pair in pairs]
    return Sides(
        ours=lambda blocking: scaled_triton.wgrad(left, right, offsets, dtype=torch.float32, blocking=blocking),
        rivals={
            BF16: lambda: F.grouped_mm(grad.t(), x, offs=ends),
            LIBRARY: lambda: torch.stack([product() for product in library]),
        },
        products=pairs,
        parts=list,
    )


def _library_product(
    a: Quantized, b: Quantized, recipe: ScalingType = ScalingType.BlockWise128x128
) -> Callable[[], Tensor]:
    """F.scaled_mm with its layout of scales, which are laid out once, outside the time: one column after another,
    and those of 128x128 blocks padded to multiples of four along K."""
    a_scale = a.scale.t().contiguous().t()
    if recipe == ScalingType.BlockWise128x128:
        b_scale = F.pad(b.scale, (0, -b.scale.shape[1] % 4)).contiguous().t()
    else:
        b_scale = b.scale.t().contiguous().t()
    left, right = a.data.contiguous(), b.data.contiguous().t()
    return lambda: F.scaled_mm(left, right, a_scale, ScalingType.BlockWise1x128, b_scale, recipe)


def _stacked(parts: Sequence[Quantized]) -> Quantized:
    """Matrices of one shape, as one."""
    data, scale = torch.stack([part.data for part in parts]), torch.stack([part.scale for part in parts])
    return replace(parts[0], data=data, scale=scale)


def _rows(quantized: Quantized, start: int, stop: int, height: int = 1) -> Quantized:
    scale = quantized.scale[start // height : stop // height]
    return replace(quantized, data=quantized.data[start:stop], scale=scale)
