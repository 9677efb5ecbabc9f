"""Checks from headers alone that a checkpoint directory holds what a model needs.

A safetensors file opens with 8 bytes of header length and a JSON header, so every name, dtype, shape and file
length is checked before the first weight is read, and each complaint names file and tensor. No torch here.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal

from dovetail.config import read_json
from dovetail.spec.hf_config import read_hf
from dovetail.spec.model import ModelSpec
from dovetail.spec.tensors import SCALE_SUFFIX, WEIGHT_TILE, Stored, readable_tensors, scale_shape

MtpChoice = Literal["require", "drop"]

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
CONFIG = "config.json"
# Tables that older writers saved beside the weights; config.json says all that is in them.
_BUFFERS = (".rotary_emb.inv_freq", ".rotary_emb.cos_cached", ".rotary_emb.sin_cached")
_MAX_HEADER = 100_000_000  # bytes; the format's own limit
_FLOATS = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}  # bytes per element
_BYTES = {**_FLOATS, "F8_E4M3": 1, "F8_E8M0": 1}  # the dtypes that can be read here


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One tensor as a shard's header announces it; `dtype` in safetensors spelling."""

    file: Path
    name: str
    dtype: str
    shape: tuple[int, ...]


def read_config(directory: Path) -> dict[str, Any]:
    """The `config.json` of a checkpoint directory. `ValueError` where it is absent or no JSON object."""
    if not directory.is_dir():
        raise ValueError(f"{directory} is not a directory; give the one that holds {CONFIG} and the weights")
    if not (directory / CONFIG).is_file():
        found = sorted(path.name for path in directory.iterdir())
        listing = ", ".join(found[:8]) + (", ..." if len(found) > 8 else "") if found else "nothing"
        raise ValueError(f"{directory} is not a checkpoint directory: no {CONFIG} in it; it holds {listing}")
    return read_json(directory / CONFIG)


def read_spec(directory: Path) -> ModelSpec:
    """The model that the `config.json` of a checkpoint directory describes. `ValueError` where it cannot be read."""
    return read_hf(read_config(directory), where=str(directory / CONFIG))


def read_inventory(directory: Path) -> dict[str, Entry]:
    """Every tensor of a checkpoint by published name, from the headers of its shards.

    `ValueError`, naming file and tensor, where a shard is missing, truncated or not safetensors, and where
    index and shards disagree.
    """
    if (directory / INDEX).is_file():
        return _read_indexed(directory)
    if not (directory / SINGLE).is_file():
        raise ValueError(f"{directory} holds no weights: neither {SINGLE} nor {INDEX} is in it")
    return {entry.name: entry for entry in read_header(directory / SINGLE)}


def read_header(path: Path) -> list[Entry]:
    """The tensors that one safetensors file announces, checked against the file's length."""
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(8)
        length = struct.unpack("<Q", head)[0] if len(head) == 8 else 0
        if not 2 <= length <= _MAX_HEADER:
            raise ValueError(f"{path}: not a safetensors file ({size} bytes, no header length at its start)")
        raw = file.read(length)
    if len(raw) < length:
        raise ValueError(f"{path}: truncated in its header ({size} bytes, of {8 + length} for the header)")
    try:
        header = json.loads(raw)
        header.pop("__metadata__", None)
        entries = [(_entry(path, name, field), field["data_offsets"]) for name, field in header.items()]
    except (UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: not a safetensors file (bad header: {error!r})") from error
    for entry, (start, end) in sorted(entries, key=lambda pair: pair[1]):
        if 8 + length + end > size:
            raise ValueError(
                f"{path}: truncated: tensor {entry.name!r} ends at byte {8 + length + end}, the file at"
                f" {size}; fetch or export this file again"
            )
        size_of = _BYTES.get(entry.dtype)
        if size_of is not None and end - start != math.prod(entry.shape) * size_of:
            raise ValueError(
                f"{path}: tensor {entry.name!r} has {end - start} bytes, not those of {entry.dtype} {list(entry.shape)}"
            )
    return [entry for entry, _ in entries]


def weight_tile(config: Mapping[str, Any], directory: Path) -> tuple[int, int]:
    """Block of one FP8 scale. `ValueError` for a quantisation other than block FP8."""
    quantization = config.get("quantization_config") or {}
    if not isinstance(quantization, dict):
        raise ValueError(f"{directory / CONFIG}: quantization_config = {quantization!r}: expected an object, or null")
    method, tile = quantization.get("quant_method", "fp8"), quantization.get("weight_block_size", WEIGHT_TILE)
    if method != "fp8" or len(sizes := _sizes(tile)) != 2:
        raise ValueError(
            f"{directory / CONFIG}: weights quantised with {method!r} in blocks of {tile} cannot be read;"
            " only 'fp8' in two-dimensional blocks can; convert them to BF16 first"
        )
    return sizes[0], sizes[1]


def _sizes(tile: Any) -> list[int]:
    return [size for size in tile if isinstance(size, int) and size > 0] if isinstance(tile, list | tuple) else []


def check_inventory(
    entries: Mapping[str, Entry], spec: ModelSpec, directory: Path, tile: tuple[int, int], mtp: MtpChoice
) -> None:
    """`ValueError` unless the tensors are those of `spec`; stored copies of shared ones may be absent."""
    expected = {stored.name: stored for stored in readable_tensors(spec)}
    missing = [name for name, stored in expected.items() if name not in entries and not stored.copy_of]
    scales = {name + SCALE_SUFFIX for name, entry in entries.items() if entry.dtype == "F8_E4M3"}
    unexpected = [name for name in entries if name not in expected and name not in scales and not is_buffer(name)]
    if mtp == "drop":
        unexpected = [name for name in unexpected if not _is_mtp(name, spec)]
    if missing:
        _refuse_missing(missing, unexpected, expected, spec, directory)
    if unexpected:
        _refuse_unexpected(unexpected, expected, entries)
    for name, stored in expected.items():
        if name in entries:
            _check_entry(entries, entries[name], stored, tile)


def is_buffer(name: str) -> bool:
    """Whether the tensor is a table that follows from config.json. It is passed over, as every other loader does."""
    return name.endswith(_BUFFERS)


def _read_indexed(directory: Path) -> dict[str, Entry]:
    index = directory / INDEX
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{index}: no 'weight_map' of tensor names to shard files in it")
    inventory: dict[str, Entry] = {}
    for shard in dict.fromkeys(weight_map.values()):
        path = directory / str(shard)
        first = next(name for name, file in weight_map.items() if file == shard)
        if not isinstance(shard, str) or Path(shard).name != shard:
            raise ValueError(f"{index}: tensor {first!r} is put in {shard!r}, which is no plain file name")
        if not path.is_file():
            raise ValueError(f"{index} names {shard}, which is missing; tensor {first!r} should be in it")
        for entry in read_header(path):
            if weight_map.get(entry.name) != shard:
                elsewhere = weight_map.get(entry.name, "no file")
                raise ValueError(f"{path} holds tensor {entry.name!r}; {INDEX} puts it in {elsewhere}")
            inventory[entry.name] = entry
    for name, shard in weight_map.items():
        if name not in inventory:
            raise ValueError(f"{directory / shard}: tensor {name!r} is not in it, though {INDEX} says so")
    return inventory


def _entry(path: Path, name: str, field: dict[str, Any]) -> Entry:
    shape = tuple(int(size) for size in field["shape"])
    return Entry(file=path, name=name, dtype=str(field["dtype"]), shape=shape)


def _is_mtp(name: str, spec: ModelSpec) -> bool:
    layer = name.removeprefix("model.layers.").split(".")[0]
    return name.startswith("model.layers.") and layer.isdigit() and int(layer) >= spec.num_hidden_layers


def _refuse_missing(
    missing: list[str],
    unexpected: list[str],
    expected: Mapping[str, Stored],
    spec: ModelSpec,
    directory: Path,
) -> None:
    name = missing[0]
    line = f"{directory}: tensor {name!r} of shape {list(expected[name].shape)} is missing"
    line += f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
    if all(_is_mtp(name, spec) for name in missing):
        line += (
            f": {CONFIG} says num_nextn_predict_layers = {spec.num_nextn_predict_layers}, but the MTP weights"
            ' are not all there; load with mtp="drop" to go without them'
        )
    else:
        line += _near(name, unexpected)
    raise ValueError(line)


def _refuse_unexpected(unexpected: list[str], expected: Mapping[str, Stored], entries: Mapping[str, Entry]) -> None:
    name = unexpected[0]
    line = f"{entries[name].file}: unexpected tensor {name!r}, which {CONFIG} does not call for"
    line += f" (and {len(unexpected) - 1} more)" if len(unexpected) > 1 else ""
    layer = name.split(".mlp.experts.")[0].rsplit(".", 2)[0]  # thousands of names are slow to compare
    raise ValueError(line + _near(name, [other for other in expected if other.startswith(layer)][:2000]))


def _near(name: str, candidates: list[str]) -> str:
    matches = get_close_matches(name, candidates, n=3, cutoff=0.8)
    return f"; near names: {', '.join(matches)}" if matches else ""


def _check_entry(entries: Mapping[str, Entry], entry: Entry, stored: Stored, tile: tuple[int, int]) -> None:
    if entry.shape != stored.shape:
        raise ValueError(
            f"{entry.file}: tensor {entry.name!r} has shape {list(entry.shape)};"
            f" {CONFIG} calls for {list(stored.shape)}"
        )
    if entry.dtype in _FLOATS:
        return
    if entry.dtype != "F8_E4M3" or len(entry.shape) != 2:
        wanted = ", ".join(_FLOATS) + (" or F8_E4M3" if len(entry.shape) == 2 else "")
        raise ValueError(f"{entry.file}: tensor {entry.name!r} is {entry.dtype}; it has to be {wanted}")
    scale = entries.get(entry.name + SCALE_SUFFIX)
    if scale is None:
        name = entry.name + SCALE_SUFFIX
        raise ValueError(
            f"{entry.file}: tensor {entry.name!r} is FP8 of shape {list(entry.shape)}, but its scale {name!r}, F32 of"
            f" shape {list(scale_shape(entry.shape, tile))}, is missing; without it the weight is lost: fetch the"
            " checkpoint anew, or one in BF16"
        )
    if scale.shape != scale_shape(entry.shape, tile) or scale.dtype not in (*_FLOATS, "F8_E8M0"):
        raise ValueError(
            f"{scale.file}: tensor {scale.name!r} is {scale.dtype} of shape {list(scale.shape)}; blocks of"
            f" {list(tile)} of its weight, {list(entry.shape)}, call for F32 of shape"
            f" {list(scale_shape(entry.shape, tile))}; if blocks have another size, {CONFIG} has to say so"
            " (weight_block_size), else weight and scale are not of one checkpoint: fetch it anew"
        )
