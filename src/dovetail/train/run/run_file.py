"""The run file, and the directory of a run.

out/run.toml      the settings, as resolved; a run goes on only under the same ones
out/config.json   the model that they describe, in case a file that they name changes or goes
out/tokenizer/    tokenizer.json (trained here or copied)
out/tokens/       token stores of the training and the held-out text
out/checkpoints/  see `checkpoint`
out/metrics.jsonl see `metrics`
out/tensorboard/  the same for TensorBoard, where `train.tensorboard` asks for it
out/budget.json   the number of steps and its changes, where `train.minutes` asks for a time: see `budget`
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field, field_validator, model_validator

from dovetail.catalog.precision import RecipeTable, is_file, load_recipe, read_recipe
from dovetail.catalog.presets import load_model, model_names, read_model_file
from dovetail.config import Record, UserPath, load_toml, near_matches, validate
from dovetail.model.precision import apply_recipe
from dovetail.model.transformer import Transformer
from dovetail.spec.hf_config import read_hf, write_hf
from dovetail.spec.model import Mla, ModelSpec
from dovetail.spec.published import OWN
from dovetail.text.documents import DataConfig, read_documents
from dovetail.text.prepare import prepare_store
from dovetail.text.shards import TokenStore
from dovetail.text.tokenizer import Tokenizer
from dovetail.train.layout.ranks import local_device
from dovetail.train.layout.table import LayoutConfig
from dovetail.train.run import checkpoint
from dovetail.train.step.optim import AdamW, AdamWConfig
from dovetail.train.step.schedule import TrainingSchedule, as_fractions, load_schedule, with_peak
from dovetail.train.step.team import Team

WARMUP = 0.02  # share of the budget, where a published number of steps would be next to none of a short run
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


class ModelConfig(Record):
    """[model]: a preset or a file of one's own, and keys of either to change."""

    preset: str | None = None
    config: UserPath | None = None  # a .toml or config.json, or a directory that holds one
    change: dict[str, Any] = {}  # flat config.json keys, such as num_hidden_layers

    @model_validator(mode="after")
    def _one_source(self) -> ModelConfig:
        if (self.preset is None) == (self.config is None):
            raise ValueError("give exactly one of model.preset (see dovetail list models) and model.config (a file)")
        return self


class TokenizerConfig(Record):
    """[tokenizer]: a published tokenizer.json, or none: one of the model's vocabulary is trained on the text."""

    path: UserPath | None = None


class TrainConfig(Record):
    """[train]."""

    steps: int | None = Field(default=None, gt=0)
    minutes: float | None = Field(default=None, gt=0)  # instead of steps: as many as fit, planned again as the run goes
    sequence_length: int = Field(default=256, gt=1)  # tokens
    microbatch_size: int = Field(default=8, gt=0)  # sequences per forward pass and rank
    learning_rate: float | None = Field(default=None, gt=0)  # peak, in place of the schedule's own
    batch_size: int | None = Field(default=None, gt=0)  # sequences per step at the peak, likewise
    fit_schedule: bool = False  # stretch a schedule in steps or tokens over this run's budget
    seed: int = Field(default=0, ge=0)
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"  # auto: BF16 where the hardware multiplies it
    precision: str | RecipeTable = "bf16"  # a recipe: deepseek-v3 quantises the layers' products to FP8
    health_every: int | None = Field(default=None, gt=0)  # steps; what the recipe's rounding does, layer by layer
    balance_alpha: float = Field(default=1e-4, ge=0)  # [V3 §4.2]
    separate_documents: bool = False  # pre-training packs without borders [V3 §4.1]
    recompute: bool = False  # RMSNorm outputs and MLA up-projections again in the backward pass [V3 §3.2.3]
    ema_decay: float | None = Field(default=None, ge=0, lt=1)
    max_bad_steps: int = Field(default=5, gt=0)  # non-finite steps in a row before the run stops
    checkpoint_every: int = Field(default=100, gt=0)  # steps
    keep_checkpoints: int = Field(default=3, gt=0)
    evaluate_every: int | None = Field(default=None, gt=0)  # steps; all of the text once at the end
    evaluate_windows: int = Field(default=32, gt=0)  # windows of held-out text, each time the same
    tensorboard: bool = False  # metrics for TensorBoard too

    @field_validator("precision", mode="before")
    @classmethod
    def _is_a_recipe(cls, precision: Any) -> str | RecipeTable:
        """Read a recipe file here and now, so that the run keeps what the file said, whatever becomes of it."""
        if isinstance(precision, Mapping):
            precision = validate(RecipeTable, precision, where="a recipe")
        elif isinstance(precision, str) and is_file(precision):
            precision = read_recipe(precision)
        elif not isinstance(precision, str | RecipeTable):
            raise ValueError("expected the name of a recipe, a recipe file, or a table")
        load_recipe(precision)
        return precision

    @model_validator(mode="after")
    def _one_budget(self) -> TrainConfig:
        if (self.steps is None) == (self.minutes is None):
            raise ValueError("give exactly one of train.steps and train.minutes")
        return self


class RunConfig(Record):
    """A whole run file."""

    out: UserPath
    model: ModelConfig
    tokenizer: TokenizerConfig = TokenizerConfig()
    data: DataConfig = DataConfig()
    train: TrainConfig
    layout: LayoutConfig = LayoutConfig()
    optimizer: AdamWConfig = AdamWConfig()
    schedule: str | TrainingSchedule = "short"  # a name of the catalog, or a whole schedule


def resolve_model(config: ModelConfig) -> ModelSpec:
    """Return the model that [model] describes. Raises ValueError where it cannot be read, and for unknown keys."""
    if config.preset is not None:
        is_file = Path(config.preset).suffix in (".toml", ".json") or Path(config.preset).exists()
        if is_file and config.preset not in model_names():
            raise ValueError(f"model.preset = {config.preset!r} is a file, not a name of the catalog: set model.config")
        spec = load_model(config.preset)
    else:
        assert config.config is not None
        spec = read_model_file(config.config).spec
    if not config.change:
        return spec
    table = write_hf(spec)
    for key in config.change:
        if key not in table:
            raise ValueError(f"model.change.{key}: the model has no such key; {near_matches(key, table)}")
    if isinstance(spec.attention, Mla):
        table["model_type"] = OWN  # the changed model may be none of a published class
    return read_hf({**table, **config.change})


def resolve_schedule(config: RunConfig) -> TrainingSchedule:
    schedule = load_schedule(config.schedule) if isinstance(config.schedule, str) else config.schedule
    if config.train.fit_schedule:
        schedule = as_fractions(schedule, warmup=WARMUP)
    peaks = {"learning_rate": config.train.learning_rate, "batch_size": config.train.batch_size}
    changes = {name: with_peak(getattr(schedule, name), peak) for name, peak in peaks.items() if peak is not None}
    return schedule.model_copy(update=changes)


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    if name != "auto":
        return DTYPES[name]
    if device.type == "cuda":
        return torch.bfloat16
    return torch.bfloat16 if torch.cpu._is_avx512_bf16_supported() else torch.float32  # type: ignore[no-untyped-call]


def build_model(config: RunConfig, device: torch.device) -> Transformer:
    """Return the model of a run in the precision of its recipe. Its weights are not set yet.

    On the "meta" device the model takes no memory, so this also checks that it can be built. Raises ValueError for a
    recipe that training cannot run.
    """
    dtype = resolve_dtype(config.train.dtype, local_device())
    with device:
        model = Transformer(resolve_model(config.model), dtype=dtype, recompute=config.train.recompute)
    apply_recipe(model, load_recipe(config.train.precision))
    return model


def build_optimizer(config: RunConfig, team: Team) -> AdamW:
    """Return the optimizer of what this rank updates. Raises ValueError for moments that would stand still."""
    return AdamW(team.parameters().items(), config.optimizer, load_recipe(config.train.precision).moments)


def prepare_tokenizer(config: RunConfig, spec: ModelSpec, report: Callable[[str], None]) -> Tokenizer:
    """The run's tokenizer: there already, copied, or trained on the training text."""
    directory = config.out / "tokenizer"
    if (directory / "tokenizer_config.json").exists():
        return Tokenizer.load(directory)
    if config.tokenizer.path is not None:
        tokenizer = load_tokenizer(config.tokenizer.path, spec)
    else:
        report(f"training a byte-level BPE of {spec.vocab_size} tokens")
        tokenizer = Tokenizer.train(_texts(config.data), spec.vocab_size, report=report)
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(directory)
    return tokenizer


def load_tokenizer(path: Path, spec: ModelSpec) -> Tokenizer:
    """Load a published tokenizer for this model. Raises ValueError for one that has more tokens than the model."""
    tokenizer = Tokenizer.load(path)
    if tokenizer.vocab_size > spec.vocab_size:
        raise ValueError(
            f"the tokenizer has {tokenizer.vocab_size} tokens and the model {spec.vocab_size}; "
            f"set model.change.vocab_size = {tokenizer.vocab_size}"
        )
    return tokenizer


def _texts(config: DataConfig) -> Iterator[str]:
    for document in read_documents(config, "train"):
        yield document.text


def prepare_stores(
    config: RunConfig, tokenizer: Tokenizer, is_held_out: bool, report: Callable[[str], None]
) -> tuple[TokenStore, TokenStore | None]:
    """Training and held-out tokens; no held-out store where none of the text `is_held_out`."""
    train = _prepare_store(config, tokenizer, "train", report)
    return train, _prepare_store(config, tokenizer, "held_out", report) if is_held_out else None


def _prepare_store(
    config: RunConfig, tokenizer: Tokenizer, split: Literal["train", "held_out"], report: Callable[[str], None]
) -> TokenStore:
    store = prepare_store(config.data, tokenizer, config.out / "tokens", split)
    line = f"{split.replace('_', '-')} text: {store.num_bytes / 1e6:.1f} MB, {store.num_tokens:,} tokens"
    left_out = ", ".join(f"{count} {reason}" for reason, count in sorted(store.index.left_out.items()))
    report(f"{line}; left out: {left_out}" if left_out else line)
    return store


def is_run(directory: Path) -> bool:
    """Whether `directory` is that of a training run."""
    return (directory / "run.toml").is_file()


def run_model(directory: Path, config: RunConfig) -> ModelSpec:
    """Return the model of the run in `directory`, as it was when the run began; `config` are the run's settings."""
    kept = directory / "config.json"
    return read_model_file(kept).spec if kept.exists() else resolve_model(config.model)


def load_weights(directory: Path, ema: bool = False) -> tuple[dict[str, torch.Tensor], ModelSpec, int]:
    """State dict, spec and step of a run's newest whole checkpoint; BF16 unless the run was set to FP32.

    `ema` takes the moving average instead. Raises ValueError where there is no checkpoint or no average.
    """
    config = load_toml(directory / "run.toml", RunConfig)
    if ema and config.train.ema_decay is None:
        raise ValueError(f"{directory}: the run keeps no moving average; set train.ema_decay")
    newest = checkpoint.latest(directory / "checkpoints")
    if newest is None:
        raise ValueError(f"{directory}: no checkpoint yet; run dovetail train for more than checkpoint_every steps")
    spec = run_model(directory, config)
    model = Transformer(spec, dtype=DTYPES.get(config.train.dtype, torch.bfloat16))
    masters = {name: torch.empty(each.shape) for name, each in model.named_parameters()}
    wanted = {"ema": {"average": masters}} if ema else {"optimizer": {"master": masters}}
    checkpoint.load_checkpoint(newest, {**wanted, "buffers": dict(model.named_buffers())}, partial=True)
    model.load_state_dict({**masters, **dict(model.named_buffers())})
    return model.state_dict(), spec, checkpoint.step_of(newest)
