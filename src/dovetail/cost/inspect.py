"""Counts a model from its description alone, for `dovetail inspect`.

The target is whatever `catalog.presets.find_model` takes. Weights are not read.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dovetail.catalog.presets import find_model
from dovetail.cost import cache, count
from dovetail.spec.hf_config import write_hf
from dovetail.spec.kernel_shapes import accepted_by
from dovetail.spec.model import Mla, ModelSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class Inspection:
    """The counts of one model. FLOP and cache are per token, and FLOP are for a context of `context` tokens."""

    target: str
    source: str
    spec: ModelSpec
    parameters: count.Parameters
    context: int
    forward_flop: float  # causal, like all FLOP here whose name does not say otherwise
    training_flop: float
    training_flop_non_causal: float
    mtp_training_flop: float  # added to `training_flop` by the MTP modules
    cache_bytes: int  # in BF16
    checkpoint_tensors: int | None  # in the published BF16 layout; None if attention is not MLA
    stored_bytes: int | None  # of the safetensors files beside the config.json, if there are any
    kernels: dict[str, str | None]
    unread: tuple[str, ...]  # keys of the config.json that nothing here knows


def inspect(target: str, context: int = 4096) -> Inspection:
    """Count the model that `target` names. Raises ValueError for a target that cannot be read."""
    if context < 1:
        raise ValueError(f"context = {context} tokens: it has to be at least 1")
    found = find_model(target)
    spec = found.spec
    training = count.training_flop_per_token(spec, context)
    return Inspection(
        target=target,
        source=found.source,
        spec=spec,
        parameters=count.parameters(spec),
        context=context,
        forward_flop=count.forward_flop_per_token(spec, context),
        training_flop=training,
        training_flop_non_causal=count.training_flop_per_token(spec, context, causal=False),
        mtp_training_flop=count.training_flop_per_token(spec, context, mtp=True) - training,
        cache_bytes=count.cache_bytes_per_token(spec),
        checkpoint_tensors=count.checkpoint_tensors(spec) if isinstance(spec.attention, Mla) else None,
        stored_bytes=None if found.directory is None else _stored_bytes(found.directory),
        kernels=accepted_by(spec),
        unread=found.unread,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheInspection:
    """The caches that one model could have, its own first, for `sequences` of `context` tokens each."""

    target: str
    source: str
    context: int
    sequences: int
    window: int  # of the sliding window, in tokens
    caches: tuple[cache.Cached, ...]
    unread: tuple[str, ...]


def inspect_cache(target: str, context: int | None, sequences: int, window: int) -> CacheInspection:
    """Count caches of the model that `target` names, at the longest context that it has if none is given."""
    found = find_model(target)
    length = found.spec.max_position_embeddings if context is None else context
    return CacheInspection(
        target=target,
        source=found.source,
        context=length,
        sequences=sequences,
        window=window,
        caches=cache.caches(found.spec, length, sequences, window),
        unread=found.unread,
    )


def cache_rows(inspection: CacheInspection) -> Iterable[tuple[str, ...]]:
    """Yield the rows of the printed table: kind, what a layer keeps, bytes per layer and token, of all, times own."""
    own = inspection.caches[0]
    for each in inspection.caches:
        sizes = (f"{each.layer_bytes:,}", f"{each.token_bytes:,}", f"{each.total_bytes / 1e9:,.3f}")
        yield each.kind, each.kept, *sizes, f"{each.total_bytes / own.total_bytes:.2f}"


def _stored_bytes(directory: Path) -> int | None:
    """Return the bytes of the safetensors files in `directory`, or None if it holds none."""
    return sum(file.stat().st_size for file in directory.glob("*.safetensors")) or None


def as_json(inspection: Inspection) -> dict[str, Any]:
    """Return plain data: whole numbers in base units, and the spec as a flat config.json table."""
    parameters = inspection.parameters
    record = {name: getattr(inspection, name) for name in Inspection.__dataclass_fields__}
    record["spec"] = write_hf(inspection.spec)
    record["unread"] = list(inspection.unread)
    record["parameters"] = asdict(parameters) | {
        "total": parameters.total,
        "total_with_mtp": parameters.total_with_mtp,
        "active": parameters.active,
        "active_with_embedding": parameters.active_with_embedding,
    }
    return record


def rows(inspection: Inspection) -> Iterable[tuple[str, str, str]]:
    """Yield the rows of the printed table: (name, value, remark)."""
    parameters, spec = inspection.parameters, inspection.spec
    for part in count.PARTS:
        if number := getattr(parameters, part):
            yield part.replace("_", " "), f"{number:,}", f"{number / parameters.total:.1%}"
    yield "total", f"{parameters.total:,}", ""
    if parameters.mtp:
        depth = spec.num_nextn_predict_layers
        yield "MTP adds", f"{parameters.mtp:,}", f"{depth} module{'s' if depth > 1 else ''}"
    yield (
        "active per token",
        f"{parameters.active:,}",
        f"{parameters.active / parameters.total:.1%}, without embedding",
    )
    yield "", f"{parameters.active_with_embedding:,}", "with the embedding"
    yield "KV cache per token", f"{inspection.cache_bytes:,} B", "BF16, all layers"
    at = f"{inspection.context:,} tokens of context"
    yield "forward per token", f"{inspection.forward_flop / 1e9:,.3f} GFLOP", f"causal, {at}"
    yield "training per token", f"{inspection.training_flop / 1e9:,.3f} GFLOP", f"causal, {at}"
    yield "", f"{inspection.training_flop_non_causal / 1e9:,.3f} GFLOP", f"non-causal, {at}"
    if inspection.mtp_training_flop:
        yield "MTP adds", f"{inspection.mtp_training_flop / 1e9:,.3f} GFLOP", "training, causal"
    if inspection.checkpoint_tensors:
        yield "checkpoint tensors", f"{inspection.checkpoint_tensors:,}", "published names, BF16"
    if inspection.stored_bytes:
        yield "stored weights", f"{inspection.stored_bytes / 1e9:,.3f} GB", "safetensors files"
    for kernel, reason in inspection.kernels.items():
        yield kernel, "no" if reason else "yes", reason or "takes this shape"
