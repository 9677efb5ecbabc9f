"""Takes the weights of a run or a checkpoint to another checkpoint, or to an engine that generates."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from dovetail.atomic import check_folder
from dovetail.catalog.presets import model_names, repository_remedy
from dovetail.config import load_toml, near_matches
from dovetail.cost.count import parameters
from dovetail.engine.llm import LLM
from dovetail.engine.loaded import fastest_dtype
from dovetail.engine.speculative import check_depth
from dovetail.model.checkpoint.directory import check_target
from dovetail.model.checkpoint.inventory import CONFIG, is_buffer, read_config, read_inventory, read_spec
from dovetail.model.checkpoint.shards import is_finite
from dovetail.model.checkpoint.weights import Fp8Choice, export_hf, import_hf
from dovetail.model.transformer import Transformer
from dovetail.spec.hf import generation
from dovetail.spec.hf_config import unread_keys
from dovetail.spec.kernel_shapes import accepted_by
from dovetail.spec.model import ModelSpec
from dovetail.spec.published import OWN, why_own
from dovetail.spec.tensors import unquantized_modules
from dovetail.text.tokenizer import Tokenizer
from dovetail.train.run.run_file import DTYPES, RunConfig, is_run, load_weights, run_model


@dataclass(frozen=True, slots=True)
class ExportOptions:
    fp8: Fp8Choice = False
    ema: bool = False
    max_shard_bytes: float = 5e9
    overwrite: bool = False
    allow_non_finite: bool = False


def load_llm(
    source: Path, ema: bool = False, speculate: int = 0, dtype: str = "auto", allow_non_finite: bool = False
) -> tuple[LLM, str]:
    """Build the engine on a Hugging Face checkpoint, or on a run's newest checkpoint or its moving average.

    Returns it with lines that say which weights of a run they are, or what of a checkpoint was not read. `dtype` auto
    is what this machine multiplies fast (`engine.llm.fastest_dtype`). Raises ValueError, before weights are read where
    that is possible, for more drafts (`speculate`) than the model has MTP modules, and for weights that are not finite.
    """
    check_source(source, ema)
    if dtype not in ("auto", *DTYPES):
        raise ValueError(f"dtype = {dtype}: {near_matches(dtype, ['auto', *DTYPES])}")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    chosen = DTYPES.get(dtype) or fastest_dtype(device)
    check_depth(speculate, source_spec(source).num_nextn_predict_layers)
    if not is_run(source):
        llm = LLM.load(source, dtype=chosen, device=device, allow_non_finite=allow_non_finite)
        return llm, "\n".join(notes(source))
    state, spec, step = _run_weights(source, ema, allow_non_finite)
    model = Transformer(spec, dtype=chosen)
    model.load_state_dict(state)
    return LLM(model.to(device), spec, Tokenizer.load(tokenizer_directory(source))), weights_line(source, step, ema)


def tokenizer_directory(source: Path) -> Path:
    """Return where the tokenizer of a run or of a checkpoint is, and its chat template."""
    return source / "tokenizer" if is_run(source) else source


def source_spec(source: Path) -> ModelSpec:
    """Return the model of a run or of a checkpoint, before its weights are read. Raises ValueError."""
    check_source(source)
    if not is_run(source):
        return read_spec(source)
    return run_model(source, load_toml(source / "run.toml", RunConfig))


def notes(checkpoint: Path) -> Iterator[str]:
    """Yield a line for each thing in a Hugging Face checkpoint that is passed over."""
    if unread := unread_keys(read_config(checkpoint)):
        yield f"{checkpoint / CONFIG}: keys that were not read: {', '.join(unread)}"
    if unread := generation.read_generation(checkpoint, read_spec(checkpoint).vocab_size).unread:
        yield f"{checkpoint / generation.FILE}: keys that were not read: {', '.join(unread)}"
    if skipped := [name for name in read_inventory(checkpoint) if is_buffer(name)]:
        yield f"{checkpoint}: {len(skipped)} tables that {CONFIG} replaces were not read, such as {skipped[0]}"


def sampling_defaults(source: Path) -> dict[str, float]:
    """Return the settings that a checkpoint's makers advise, by the names of `SamplingParams`. A run advises none."""
    check_source(source)
    return {} if is_run(source) else generation.read_generation(source, read_spec(source).vocab_size).sampling


def _run_weights(run: Path, ema: bool, allow_non_finite: bool) -> tuple[dict[str, Tensor], ModelSpec, int]:
    """As `load_weights`. Raises ValueError for weights that are not finite, unless they are allowed."""
    state, spec, step = load_weights(run, ema)
    for name, tensor in state.items():
        if not (allow_non_finite or is_finite(tensor)):
            raise ValueError(
                f"{run}: after step {step} tensor {name!r} has values that are not finite; go back to an earlier "
                "checkpoint, or accept them with --allow-non-finite"
            )
    return state, spec, step


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

    Raises ValueError where `source` is not a run and the moving average is asked for, and where FP8 for transformers
    would leave every weight as it is.
    """
    check_source(source, options.ema)
    _check_out(out, options.overwrite)
    if options.fp8 == "transformers":
        unquantized_modules(source_spec(source))
    allow = options.allow_non_finite
    model: Transformer | dict[str, Tensor]
    if is_run(source):
        model, spec, step = _run_weights(source, options.ema, allow)
        yield weights_line(source, step, options.ema)
        files = sorted((source / "tokenizer").glob("*.json"))
    else:
        yield from notes(source)
        model, spec = import_hf(source, allow_non_finite=allow)
        files = companion_files(source)
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


def import_(hf_dir: Path, out: Path, drop_mtp: bool, overwrite: bool, allow_non_finite: bool = False) -> Iterator[str]:
    """Read a Hugging Face checkpoint, check every tensor, and write it in BF16 to `out`; yield lines to print."""
    check_source(hf_dir)
    _check_out(out, overwrite)
    yield from notes(hf_dir)
    model, spec = import_hf(hf_dir, mtp="drop" if drop_mtp else "require", allow_non_finite=allow_non_finite)
    export_hf(model, spec, out, tokenizer_files=companion_files(hf_dir), overwrite=overwrite)
    yield from describe(out, spec)


def _check_out(out: Path, overwrite: bool) -> None:
    """Raise ValueError, before weights are read, for a place that they could not be written to."""
    check_target(out, overwrite)
    check_folder(out.absolute().parent)


def companion_files(directory: Path) -> list[Path]:
    """Return what of a checkpoint is copied whole: files of the tokenizer, and generation_config.json. There may be
    none, since weights can be converted without them."""
    names = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")
    return [path for name in (*names, generation.FILE) if (path := directory / name).is_file()]


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
