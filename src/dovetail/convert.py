"""Converts weights between a run's checkpoints and the Hugging Face layout, in BF16 and FP8."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from dovetail.cost.count import parameters
from dovetail.model.checkpoint.weights import export_hf, import_hf
from dovetail.model.transformer import Transformer
from dovetail.spec.kernel_shapes import accepted_by
from dovetail.spec.model import ModelSpec
from dovetail.train.run.run_file import is_run, load_weights


@dataclass(frozen=True, slots=True)
class ExportOptions:
    fp8: bool = False
    ema: bool = False
    max_shard_bytes: float = 5e9
    overwrite: bool = False


def export(source: Path, out: Path, options: ExportOptions) -> Iterator[str]:
    """Write the newest weights of a run, or a Hugging Face checkpoint, to `out`; yield lines to print.

    Raises ValueError where `source` is not a run and the moving average is asked for.
    """
    model: Transformer | dict[str, Tensor]
    if is_run(source):
        model, spec, step = load_weights(source, options.ema)
        yield f"{source}: weights after step {step}" + (", moving average" if options.ema else "")
        files = sorted((source / "tokenizer").glob("*.json"))
    elif options.ema:
        raise ValueError(f"{source} is not the directory of a training run; only a run has a moving average")
    else:
        model, spec = import_hf(source)
        files = tokenizer_files(source)
    export_hf(
        model,
        spec,
        out,
        fp8=options.fp8,
        max_shard_bytes=options.max_shard_bytes,
        tokenizer_files=files,
        overwrite=options.overwrite,
    )
    yield from describe(out, spec)


def import_(hf_dir: Path, out: Path, drop_mtp: bool, overwrite: bool) -> Iterator[str]:
    """Read a Hugging Face checkpoint, check every tensor, and write it in BF16 to `out`; yield lines to print."""
    model, spec = import_hf(hf_dir, mtp="drop" if drop_mtp else "require")
    export_hf(model, spec, out, tokenizer_files=tokenizer_files(hf_dir), overwrite=overwrite)
    yield from describe(out, spec)


def tokenizer_files(directory: Path) -> list[Path]:
    """Return a checkpoint's tokenizer files. There may be none, since weights can be converted without them."""
    names = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")
    return [directory / name for name in names if (directory / name).is_file()]


def describe(out: Path, spec: ModelSpec) -> Iterator[str]:
    index = out / "model.safetensors.index.json"
    shards = len(set(json.loads(index.read_text())["weight_map"].values())) if index.exists() else 1
    total = parameters(spec).total_with_mtp
    yield f"{out}: {total:,} parameters in {shards} shard{'s' if shards > 1 else ''}"
    for kernels, reason in accepted_by(spec).items():
        yield f"  {kernels}: " + (f"no, {reason}" if reason else "yes")
