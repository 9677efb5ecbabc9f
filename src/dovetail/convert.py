"""Takes the weights of a run or a checkpoint to another checkpoint, or to an engine that generates."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from dovetail.catalog.presets import model_names, repository_remedy
from dovetail.config import load_toml
from dovetail.cost.count import parameters
from dovetail.engine.llm import LLM
from dovetail.engine.speculative import check_depth
from dovetail.model.checkpoint.directory import check_target
from dovetail.model.checkpoint.inventory import read_config
from dovetail.model.checkpoint.weights import export_hf, import_hf
from dovetail.model.transformer import Transformer
from dovetail.spec.hf_config import read_hf
from dovetail.spec.kernel_shapes import accepted_by
from dovetail.spec.model import ModelSpec
from dovetail.spec.published import OWN, why_own
from dovetail.text.atomic import check_folder
from dovetail.text.tokenizer import Tokenizer
from dovetail.train.run.run_file import RunConfig, is_run, load_weights, run_model


@dataclass(frozen=True, slots=True)
class ExportOptions:
    fp8: bool = False
    ema: bool = False
    max_shard_bytes: float = 5e9
    overwrite: bool = False


def load_llm(source: Path, ema: bool = False, speculate: int = 0) -> tuple[LLM, str]:
    """Build the engine on a Hugging Face checkpoint, or on a run's newest checkpoint or its moving average.

    Returns it with a line that says which weights of a run they are. Raises ValueError, before weights are read where
    that is possible, and for more drafts (`speculate`) than the model has MTP modules.
    """
    check_source(source, ema)
    if not is_run(source):
        check_depth(speculate, read_hf(read_config(source)).num_nextn_predict_layers)
        return LLM.load(source), ""
    config = load_toml(source / "run.toml", RunConfig)
    check_depth(speculate, run_model(source, config).num_nextn_predict_layers)
    state, spec, step = load_weights(source, ema)
    model = Transformer(spec)
    model.load_state_dict(state)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return LLM(model.to(device), spec, Tokenizer.load(source / "tokenizer")), weights_line(source, step, ema)


def check_source(source: Path, ema: bool = False) -> None:
    """Raise ValueError where there is nothing at `source`, and where it cannot have a moving average."""
    if not source.exists():
        remedy = repository_remedy(str(source)) or "give the directory of a run or of a checkpoint"
        if str(source) in model_names():
            remedy = "a preset has a shape and no weights: train it, and give the directory of the run"
        raise ValueError(f"{source}: no such directory; {remedy}")
    if ema and not is_run(source):
        raise ValueError(f"{source} is not the directory of a training run; only a run has a moving average")


def weights_line(run: Path, step: int, ema: bool) -> str:
    return f"{run}: weights after step {step}" + (", moving average" if ema else "")


def export(source: Path, out: Path, options: ExportOptions) -> Iterator[str]:
    """Write the newest weights of a run, or a Hugging Face checkpoint, to `out`; yield lines to print.

    Raises ValueError where `source` is not a run and the moving average is asked for.
    """
    check_source(source, options.ema)
    _check_out(out, options.overwrite)
    model: Transformer | dict[str, Tensor]
    if is_run(source):
        model, spec, step = load_weights(source, options.ema)
        yield weights_line(source, step, options.ema)
        files = sorted((source / "tokenizer").glob("*.json"))
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
    check_source(hf_dir)
    _check_out(out, overwrite)
    model, spec = import_hf(hf_dir, mtp="drop" if drop_mtp else "require")
    export_hf(model, spec, out, tokenizer_files=tokenizer_files(hf_dir), overwrite=overwrite)
    yield from describe(out, spec)


def _check_out(out: Path, overwrite: bool) -> None:
    """Raise ValueError, before weights are read, for a place that they could not be written to."""
    check_target(out, overwrite)
    check_folder(out.absolute().parent)


def tokenizer_files(directory: Path) -> list[Path]:
    """Return a checkpoint's tokenizer files. There may be none, since weights can be converted without them."""
    names = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")
    return [directory / name for name in names if (directory / name).is_file()]


def describe(out: Path, spec: ModelSpec) -> Iterator[str]:
    index = out / "model.safetensors.index.json"
    shards = len(set(json.loads(index.read_text())["weight_map"].values())) if index.exists() else 1
    total = parameters(spec).total_with_mtp
    yield f"{out}: {total:,} parameters in {shards} shard{'s' if shards > 1 else ''}"
    if reason := why_own(spec):
        yield f'  model_type "{OWN}", which other engines will not load: {reason}'
        return
    for kernels, reason in accepted_by(spec).items():
        yield f"  {kernels}: " + (f"no, {reason}" if reason else "yes")
