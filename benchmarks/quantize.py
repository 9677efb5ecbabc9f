"""Quantisation kernels on one GPU, at the operands of the products that DeepGEMM publishes: ours and torch eager.

Every result is compared with the reference first, bit for bit. Floor: bytes read and
written at the measured memory rate. What is checked for NaN waits for the GPU, so kernels run with `check` off.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Annotated, Any

import torch
import typer
from _gpu import ROWS, WEIGHTS, Times, describe_gpu, measure_ceilings, require_gpu, time_gpu
from _sides import append_rows, print_table, progress
from torch import Tensor

from dovetail.numerics.formats import logfmt
from dovetail.numerics.formats import quantize as reference
from dovetail.numerics.formats.quantize import dequantize
from dovetail.numerics.formats.quantized import LogFmt, Quantized, grid_values

OURS, EAGER = "dovetail", "torch eager"
CAPABILITY = (8, 9)  # the first that casts to FP8
LOGFMT_ROWS, LOGFMT_BITS = 4096, 10


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One kernel on one shape."""

    name: str
    rows: int
    columns: int
    num_bytes: float  # read and written
    ours: Callable[[], Any]
    eager: Callable[[], Any]
    allowed: float  # share of values that may differ from the reference's

    @property
    def label(self) -> str:
        return f"{self.name} {self.rows} x {self.columns}"


def cases(device: torch.device) -> list[Case]:
    widths = sorted({k for _, k, _ in WEIGHTS.values()})
    found = [_quantize(rows, width, (1, 128), False, device) for rows in ROWS for width in widths]
    found += [_quantize(ROWS[-1], width, (1, 128), True, device) for width in widths]
    found += [_quantize(ROWS[-1], width, (128, 1), False, device) for width in widths]
    found += [_quantize(n, k, (128, 128), False, device) for n, k, _ in WEIGHTS.values()]
    return found + _logfmt(LOGFMT_ROWS, WEIGHTS["down"][0], device)


def _quantize(rows: int, columns: int, tile: tuple[int, int], power_of_two: bool, device: torch.device) -> Case:
    from dovetail.numerics.formats import quantize_triton

    x = _values(rows, columns, device)
    scales = -(-rows // tile[0]) * -(-columns // tile[1])
    return Case(
        name=f"quantise {tile[0]}x{tile[1]}" + (", power of two" if power_of_two else ""),
        rows=rows,
        columns=columns,
        num_bytes=3.0 * rows * columns + 4.0 * scales,
        ours=lambda: quantize_triton.quantize(x, tile, power_of_two=power_of_two, check=False),
        eager=lambda: reference.quantize_reference(x, tile, power_of_two=power_of_two, check=False),
        allowed=0.0,
    )


def _logfmt(rows: int, columns: int, device: torch.device) -> list[Case]:
    from dovetail.numerics.formats import logfmt_triton

    x = _values(rows, columns, device)
    encoded = logfmt.encode_reference(x, LOGFMT_BITS)
    num_bytes = 2.0 * x.numel() + encoded.num_bytes
    found = []
    for work, allowed in ((torch.float64, 0.0), (torch.float32, 1e-3)):
        inside = str(work).removeprefix("torch.")
        found += [
            Case(
                name=f"LogFMT-{LOGFMT_BITS} encode in {inside}",
                rows=rows,
                columns=columns,
                num_bytes=num_bytes,
                ours=lambda work=work: logfmt_triton.encode(x, LOGFMT_BITS, check=False, work=work),
                eager=lambda: logfmt.encode_reference(x, LOGFMT_BITS, check=False),
                allowed=allowed,
            ),
            Case(
                name=f"LogFMT-{LOGFMT_BITS} decode in {inside}",
                rows=rows,
                columns=columns,
                num_bytes=num_bytes,
                ours=lambda work=work: logfmt_triton.decode(encoded, torch.bfloat16, work=work),
                eager=lambda: logfmt.decode_reference(encoded, torch.bfloat16),
                allowed=allowed,
            ),
        ]
    return found


def _values(rows: int, columns: int, device: torch.device) -> Tensor:
    spread = torch.exp(torch.randn(rows, 1, device=device))
    return (torch.randn(rows, columns, device=device) * spread).to(torch.bfloat16)


def share_of_differences(ours: Any, theirs: Any) -> float:
    """Of values and of scales, whichever is larger."""
    if isinstance(ours, tuple):
        return max(share_of_differences(mine, other) for mine, other in zip(ours, theirs, strict=True))
    if isinstance(ours, Quantized):
        pairs = [(grid_values(ours), grid_values(theirs)), (ours.scale, theirs.scale)]
        far = (dequantize(ours) - dequantize(theirs)).abs() > dequantize(
            theirs
        ).abs() / 4 + theirs.scale.max() * 2.0**-8
        if bool(far.any()):
            return 1.0
    elif isinstance(ours, LogFmt):
        pairs = [(ours.data, theirs.data), (ours.minimum, theirs.minimum), (ours.step, theirs.step)]
    else:
        pairs = [(ours, theirs)]
    return max((mine != other).float().mean().item() for mine, other in pairs)


def measure(case: Case, repeats: int) -> tuple[dict[str, Times], float]:
    """Times by side, and the share of values that differ. ValueError if these are more than allowed."""
    different = share_of_differences(case.ours(), case.eager())
    if different > case.allowed:
        raise ValueError(f"{case.label}: {different:.2%} differ from the reference, allowed are {case.allowed:.2%}")
    return {OURS: time_gpu(case.ours, repeats), EAGER: time_gpu(case.eager, max(repeats // 4, 3))}, different


def main(
    repeats: Annotated[int, typer.Option(help="Runs of each kernel.")] = 20,
    record: bool = True,
) -> None:
    device = require_gpu(CAPABILITY)
    torch.manual_seed(0)
    ceilings, rows, lines, failures = measure_ceilings(), [], [], []
    for case in cases(device):
        progress(case.label)
        try:
            times, different = measure(case, repeats)
        except ValueError as error:
            failures.append(str(error))
            continue
        floor = case.num_bytes / ceilings.memory_bytes_per_s
        for side, each in times.items():
            rate, share, faster = case.num_bytes / each.median, floor / each.median, times[EAGER].median / each.median
            cells = [
                f"{each.median * 1e6:.1f}",
                f"{rate / 1e9:.0f}",
                f"{share:.0%}",
                f"{faster:.1f}",
                f"{different:.1e}",
            ]
            lines.append([case.label, side, *cells])
            row = {"case": case.name, "rows": case.rows, "columns": case.columns, "side": side, **each.summary()}
            row |= {
                "gb_per_s": rate / 1e9,
                "floor_s": floor,
                "share_of_floor": share,
                "times_faster_than_eager": faster,
            }
            row |= {"share_different": different, "gpu": describe_gpu(), "ceilings": asdict(ceilings)}
            rows.append(row)
    print(f"quantisation; measured ceilings: {ceilings}")
    print_table(["case", "side", "us", "GB/s", "of floor", "x eager", "different"], lines)
    print(*failures, sep="\n")
    if record and rows:
        append_rows("quantize", rows)
    if failures:
        sys.exit(f"{len(failures)} kernels were wrong and not timed.")


if __name__ == "__main__":
    typer.run(main)
