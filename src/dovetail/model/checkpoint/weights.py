"""Reads and writes weights in the Hugging Face layout.

That means published names, sharded safetensors, and FP8 blocks.

`dovetail.spec.tensors` lists what is published and where our state holds it, so exporting is writing views of
the state and importing is copying into the same views. Both stream: a shard, or a tensor, beside the model.
FP8 weights come with `weight_scale_inv`, the multiplier: W = data * scale_inv per 128x128 block [V3repo].
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from dovetail.model.checkpoint.directory import new_directory
from dovetail.model.checkpoint.inventory import (
    CONFIG,
    INDEX,
    SINGLE,
    MtpChoice,
    check_inventory,
    read_config,
    read_inventory,
    read_spec,
    weight_tile,
)
from dovetail.model.checkpoint.shards import Source, check_copy, check_finite, load_tensor, opened
from dovetail.model.transformer import Transformer
from dovetail.numerics.formats.quantize import quantize_weight
from dovetail.numerics.formats.quantized import refuse_non_finite
from dovetail.spec.hf import generation
from dovetail.spec.hf_config import write_hf
from dovetail.spec.model import ModelSpec
from dovetail.spec.tensors import (
    SCALE_SUFFIX,
    WEIGHT_TILE,
    Stored,
    readable_tensors,
    scale_shape,
    stored_tensors,
    unquantized_modules,
)

Fp8Choice = bool | Literal["ue8m0", "transformers"]


def stored_view(state: Mapping[str, Tensor], stored: Stored) -> Tensor:
    """The part of our state that a published tensor is, as a view. `ValueError` where it does not fit."""
    if stored.key not in state:
        raise ValueError(f"the model has no {stored.key!r}, published as {stored.name!r}; wrong spec?")
    tensor = state[stored.key].detach()
    if stored.expert is not None:
        tensor = tensor[stored.expert]
    if stored.half is not None:
        tensor = tensor.chunk(2)[stored.half]
    if tuple(tensor.shape) != stored.shape:
        raise ValueError(
            f"the model's {stored.key!r} gives {stored.name!r} the shape {list(tensor.shape)};"
            f" the spec calls for {list(stored.shape)}"
        )
    return tensor


def to_published(state: Mapping[str, Tensor], spec: ModelSpec, fp8: Fp8Choice = False) -> Iterator[tuple[str, Tensor]]:
    """(published name, tensor) of all of `state`, in file order: views of it, or FP8 data and scales."""
    for stored in stored_tensors(spec):
        yield from _published(stored, stored_view(state, stored), fp8)


def export_hf(
    model: nn.Module | Mapping[str, Tensor],
    spec: ModelSpec,
    out_dir: str | Path,
    *,
    fp8: Fp8Choice = False,
    max_shard_bytes: float = 5e9,
    tokenizer_files: Iterable[str | Path] = (),
    overwrite: bool = False,
) -> None:
    """Write `model`, or a state dict, as a Hugging Face checkpoint: config.json, generation_config.json, shards, and
    the `tokenizer_files`, among which a generation_config.json of its own is kept whole.

    Tensors keep the dtype they have in the model (norms and router FP32), so that a round trip is bitwise;
    with `fp8` the published set is quantised, `"ue8m0"` rounding the scales up to powers of two and `"transformers"`
    leaving out what transformers cannot read. `out_dir` appears whole or not at all. Raises `ValueError` for a
    target that exists, a model that does not fit `spec`, or non-finite weights under `fp8`; `OSError` when the disk
    is full.
    """
    state = model.state_dict() if isinstance(model, nn.Module) else model
    shards = _plan(state, spec, fp8, max_shard_bytes)
    tokenizer_paths = [Path(path) for path in tokenizer_files]
    _check_tokenizer_files(tokenizer_paths)
    config = {**write_hf(spec), "torch_dtype": str(state["embed_tokens.weight"].dtype).removeprefix("torch.")}
    if fp8:
        config["quantization_config"] = _quantization_config(spec, fp8)
    total = sum(size for _, size in shards)
    with new_directory(Path(out_dir), total, overwrite) as directory:
        _write_json(directory / CONFIG, config)
        _write_json(directory / generation.FILE, generation.write_generation(spec))
        for path in tokenizer_paths:
            shutil.copyfile(path, directory / path.name)
        _write_shards(state, [group for group, _ in shards], directory, fp8)


def import_hf(
    hf_dir: str | Path,
    *,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str = "cpu",
    mtp: MtpChoice = "require",
    allow_non_finite: bool = False,
) -> tuple[Transformer, ModelSpec]:
    """Build the model that a checkpoint directory describes and load its weights, FP8 ones dequantised.

    `mtp="drop"` builds it without MTP modules, whatever the checkpoint holds: transformers writes
    `num_nextn_predict_layers` but never their weights, which under "require" is an error. Raises
    `ValueError`, naming file and tensor, for anything missing, unexpected, truncated or of the wrong shape or
    dtype, before any memory is spent on weights; and for NaN and infinities, unless `allow_non_finite`.
    """
    directory = Path(hf_dir)
    spec = read_spec(directory)
    if mtp == "drop":
        spec = spec.model_copy(update={"num_nextn_predict_layers": 0})
    _checked_source(directory, spec, mtp)
    with torch.device("meta"):
        model = Transformer(spec, dtype=dtype)
    model.to_empty(device=device)  # everything in it is about to be loaded
    load_into(model, directory, mtp=mtp, allow_non_finite=allow_non_finite)
    return model, spec


def load_into(
    model: Transformer, hf_dir: str | Path, *, mtp: MtpChoice = "require", allow_non_finite: bool = False
) -> None:
    """Copy a checkpoint's weights into `model`, in its own dtypes and on its own devices.

    Errors as in `import_hf`; names, shapes and dtypes are all checked first, so such an error leaves `model`
    alone, and values as they are read. Of the checkpoint's config.json only the quantisation is read.
    """
    directory, spec = Path(hf_dir), model.spec
    if mtp == "drop" and spec.num_nextn_predict_layers:
        raise ValueError(f'mtp="drop" would leave the model\'s {spec.num_nextn_predict_layers} MTP modules unloaded')
    source = replace(_checked_source(directory, spec, mtp), allow_non_finite=allow_non_finite)
    state = model.state_dict()
    by_file: dict[Path, list[tuple[Stored, Tensor]]] = {}
    by_key: dict[str, list[tuple[Stored, Tensor]]] = {}
    for stored in readable_tensors(spec):
        view = stored_view(state, stored)
        if stored.copy_of is None:
            by_file.setdefault(source.entries[stored.name].file, []).append((stored, view))
            by_key.setdefault(stored.key, []).append((stored, view))
        elif stored.name in source.entries:
            check_copy(source, stored)
    for file, group in by_file.items():
        with opened(file) as shard:
            for stored, view in group:
                load_tensor(shard, source, stored.name, view)
    for key, parts in by_key.items():  # not part by part: a call takes as long as reading an expert
        check_finite(state[key], parts, source)


def _checked_source(directory: Path, spec: ModelSpec, mtp: MtpChoice) -> Source:
    tile = weight_tile(read_config(directory), directory)
    entries = read_inventory(directory)
    check_inventory(entries, spec, directory, tile, mtp)
    return Source(entries=entries, tile=tile)


def _is_fp8(stored: Stored, fp8: Fp8Choice) -> bool:
    return bool(fp8) and stored.is_quantized and (stored.has_whole_tiles or fp8 != "transformers")


def _published(stored: Stored, view: Tensor, fp8: Fp8Choice) -> Iterator[tuple[str, Tensor]]:
    if not _is_fp8(stored, fp8):
        yield stored.name, view
        return
    quantized = quantize_weight(view, power_of_two=fp8 == "ue8m0")
    if not bool(torch.isfinite(quantized.scale).all()):
        refuse_non_finite(view, f"the model's {stored.key!r} ({stored.name!r})")
    yield stored.name, quantized.data
    yield stored.name + SCALE_SUFFIX, quantized.scale


def _plan(
    state: Mapping[str, Tensor], spec: ModelSpec, fp8: Fp8Choice, max_shard_bytes: float
) -> list[tuple[list[Stored], int]]:
    """Tensors of each shard and their bytes: file order, a new shard where the next tensor would not fit."""
    shards: list[tuple[list[Stored], int]] = []
    keys = set()
    for stored in stored_tensors(spec):
        view = stored_view(state, stored)
        keys.add(stored.key)
        size = view.numel() * view.element_size()
        if _is_fp8(stored, fp8):
            size = view.numel() + 4 * math.prod(scale_shape(stored.shape))
        if not shards or shards[-1][1] + size > max_shard_bytes:
            shards.append(([], 0))
        group, used = shards[-1]
        group.append(stored)
        shards[-1] = group, used + size
    if left := sorted(state.keys() - keys):
        raise ValueError(f"the spec has no place for the model's {left[0]!r} and {len(left) - 1} more; wrong spec?")
    return shards


def _write_shards(state: Mapping[str, Tensor], shards: Sequence[list[Stored]], directory: Path, fp8: Fp8Choice) -> None:
    weight_map: dict[str, str] = {}
    total = 0
    for number, group in enumerate(shards, start=1):
        file = SINGLE if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
        tensors = _shard_tensors(state, group, fp8)
        save_file(tensors, directory / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file)
        total += sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        del tensors  # before the next shard is built
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        _write_json(directory / INDEX, index)


def _write_json(path: Path, table: dict[str, Any]) -> None:
    path.write_text(json.dumps(table, indent=2) + "\n", encoding="utf-8")


def _shard_tensors(state: Mapping[str, Tensor], group: Sequence[Stored], fp8: Fp8Choice) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for stored in group:
        if _is_fp8(stored, fp8):
            tensors[stored.name] = torch.empty(stored.shape, dtype=torch.float8_e4m3fn)
            tensors[stored.name + SCALE_SUFFIX] = torch.empty(scale_shape(stored.shape))
        else:
            # the writer refuses two tensors in the same memory, as a stored copy and its original are
            view = stored_view(state, stored)
            tensors[stored.name] = view.clone() if stored.copy_of else view.contiguous()
    # A second pass, for nothing may be allocated to stay between the FP32 temporaries of quantising: the heap
    # would be left in holes several times the size of the shard.
    for stored in group:
        if _is_fp8(stored, fp8):
            for name, tensor in _published(stored, stored_view(state, stored), fp8):
                tensors[name].copy_(tensor)
    return tensors


def _quantization_config(spec: ModelSpec, fp8: Fp8Choice) -> dict[str, Any]:
    config: dict[str, Any] = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic"}
    config["weight_block_size"] = list(WEIGHT_TILE)
    if fp8 == "transformers":
        config["modules_to_not_convert"] = unquantized_modules(spec)
    return {**config, "scale_fmt": "ue8m0"} if fp8 == "ue8m0" else config


def _check_tokenizer_files(paths: Sequence[Path]) -> None:
    for path in paths:
        if not path.is_file():
            raise ValueError(f"tokenizer file {path} does not exist")
        if path.name == CONFIG or path.name.startswith("model"):
            raise ValueError(f"tokenizer file {path} has the name of a file of the checkpoint; rename it")
