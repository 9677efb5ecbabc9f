"""Reads single tensors from a checkpoint's shards: dequantised, in the wanted dtype, and checked.

A value that is not finite is refused by file and tensor, in every dtype, unless the reader was told to take it: one NaN
in a weight makes every completion nonsense, and only seldom an error.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dovetail.model.checkpoint.inventory import Entry
from dovetail.numerics.formats.quantize import dequantize
from dovetail.numerics.formats.quantized import Quantized
from dovetail.spec.tensors import SCALE_SUFFIX, Stored


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """The tensors of a checkpoint, and how they are to be read."""

    entries: Mapping[str, Entry]
    tile: tuple[int, int]  # of one FP8 scale
    allow_non_finite: bool = False


@contextmanager
def opened(file: Path) -> Iterator[Any]:
    """A shard open for reading; what safetensors refuses is a `ValueError` that names the file."""
    try:
        with safe_open(file, framework="pt") as shard:
            yield shard
    except SafetensorError as error:
        raise ValueError(f"{file}: {error}") from error


def load_tensor(shard: Any, source: Source, name: str, out: Tensor) -> None:
    """Copy tensor `name` of an open shard into `out`, dequantised if FP8; its scales may lie in another shard."""
    values: Tensor = shard.get_tensor(name).to(out.device)
    if source.entries[name].dtype == "F8_E4M3":
        scale = _scale(shard, source, name, out.device)
        values = dequantize(Quantized(data=values, scale=scale, tile=source.tile), out.dtype)
    out.copy_(values)


def check_finite(tensor: Tensor, parts: Iterable[tuple[Stored, Tensor]], source: Source) -> None:
    """`ValueError`, with file and name of the part, where a loaded `tensor` has a value that is not finite."""
    if source.allow_non_finite or is_finite(tensor):
        return
    stored, values = next((stored, view) for stored, view in parts if not is_finite(view))
    entry, count = source.entries[stored.name], int((~torch.isfinite(values)).sum())
    times, reason = "", "NaN or infinity in the file, or numbers too large for that dtype"
    if entry.dtype == "F8_E4M3":
        times, reason = " times its scales", "FP8 codes for NaN, or scales of another checkpoint"
    raise ValueError(
        f"{entry.file}: tensor {entry.name!r} {list(values.shape)}{times} has {count} values that are not finite in"
        f" {values.dtype}: {reason}; fetch it anew, or accept them with --allow-non-finite"
    )


def is_finite(values: Tensor) -> bool:
    """Whether all of `values` are. Their sum nearly always tells, in one pass: NaN and infinity stay in it."""
    return math.isfinite(values.sum()) or bool(torch.isfinite(values).all())


def check_copy(source: Source, stored: Stored) -> None:
    """The model shares these tensors: dropping a copy that differs would quietly lower MTP acceptance."""
    assert stored.copy_of is not None
    pair = torch.empty(2, *stored.shape)
    for out, name in zip(pair, (stored.name, stored.copy_of), strict=True):
        with opened(source.entries[name].file) as shard:
            load_tensor(shard, source, name, out)
    bits = pair.view(torch.int32)  # for NaN equals nothing
    if not torch.equal(bits[0], bits[1]):
        raise ValueError(
            f"{source.entries[stored.name].file}: tensor {stored.name!r} differs from {stored.copy_of!r}, which the"
            " model uses in its place; remove it from the checkpoint to accept that"
        )


def _scale(shard: Any, source: Source, name: str, device: torch.device) -> Tensor:
    entry = source.entries[name + SCALE_SUFFIX]
    is_here = entry.file == source.entries[name].file
    with nullcontext(shard) if is_here else opened(entry.file) as holder:
        scale: Tensor = holder.get_tensor(entry.name).to(device=device, dtype=torch.float32)
    if not source.allow_non_finite and not bool((torch.isfinite(scale) & (scale >= 0)).all()):
        raise ValueError(
            f"{entry.file}: tensor {entry.name!r} {list(scale.shape)} has scales that are not finite, or"
            f" negative; a multiplier per block of {name!r} is neither: fetch the checkpoint anew"
        )
    return scale
