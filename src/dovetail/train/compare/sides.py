"""The two sides of a comparison: where their settings differ, and whether they see the same batches.

Side B is compared with side A. Where data, tokenizer, sequence length, batch sizes, seed and steps agree, both sides
take every step on the same batch, and the losses of each step are compared. Otherwise the batches are unpaired. Then
bits per byte of held-out text are compared at the end of each seed. If both sides learn from the same tokens in another
order, the means of their training losses are compared as well.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dovetail.config import Record, as_table, differences
from dovetail.text.documents import DataConfig
from dovetail.text.tokenizer import Tokenizer
from dovetail.train.run import run_file
from dovetail.train.run.run_file import RunConfig
from dovetail.train.step.schedule import Position, values

AFTER_SPLIT = ("fim_rate", "newline_split_rate", "seed")  # keys of [data] that change training text alone
WITHOUT_EFFECT = {
    "out",
    *(f"train.{key}" for key in ("ema_decay", "max_bad_steps", "checkpoint_every", "keep_checkpoints")),
    *(f"train.{key}" for key in ("evaluate_every", "evaluate_windows", "health_every")),
}


class Settings(Record):
    """What a comparison runs, as compare.toml has it. A side's tokenizer and tokens are in its `out`."""

    a: RunConfig
    b: RunConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    settings: Settings
    out: Path
    names: tuple[str, str]  # what A and B are called in tables and pictures
    changes: dict[str, tuple[Any, Any]]  # settings that differ, with A's value and B's
    unpaired: tuple[str, ...]  # what keeps the sides from seeing the same batches
    is_same_text: bool  # both learn from the same tokens

    @property
    def sides(self) -> tuple[RunConfig, RunConfig]:
        return self.settings.a, self.settings.b

    @property
    def steps(self) -> tuple[int, int]:
        """How many steps each seed takes, on either side."""
        return _steps(self.settings.a), _steps(self.settings.b)

    @property
    def held_out(self) -> dict[str, DataConfig]:
        """The held-out texts, by name, on which both sides are measured: none where they see the same batches."""
        return _held_out(*self.sides) if self.unpaired else {}


def comparison(
    a: RunConfig,
    b: RunConfig,
    names: tuple[str, str] | None = None,
    steps: int | None = None,
    out: Path | None = None,
) -> Comparison:
    """Set up the comparison of two runs.

    Neither run's own directory is used; `out` is by default a directory beside A's. `names` are by default the two
    values of the one setting that differs, or else A and B. `steps` replaces the budgets of both. Raises ValueError for
    a budget in minutes, for two runs that would train the same, and for runs that cannot be compared.
    """
    a, b = (_counted(config, steps) for config in (a, b))
    changes = {key: pair for key, pair in differences(_shown(a, b), _shown(b, a)).items() if key not in WITHOUT_EFFECT}
    if not changes:
        raise ValueError(
            "nothing that changes a loss differs between A and B: give a second run file, or a setting of one side,"
            " such as --set-b train.precision=deepseek-v3"
        )
    labels = names or _labels(changes)
    out = out or a.out.with_name("-".join([*([] if names else [a.out.name]), *map(_file_name, labels)]))
    has_one_tokenizer = _has_one_tokenizer(a, b)
    is_same_text = has_one_tokenizer and a.data == b.data
    unpaired = tuple(_unpaired(a, b, has_one_tokenizer))
    if unpaired:
        _check_held_out(a, b, unpaired)
    outs = (out, out) if has_one_tokenizer else (out / "a", out / "b")
    sides = (config.model_copy(update={"out": each}) for config, each in zip((a, b), outs, strict=True))
    return Comparison(
        settings=Settings(**dict(zip("ab", sides, strict=True))),
        out=out,
        names=labels,
        changes=changes,
        unpaired=unpaired,
        is_same_text=is_same_text,
    )


def _counted(config: RunConfig, steps: int | None) -> RunConfig:
    if steps is None and config.train.steps is None:
        raise ValueError(
            f"the run file asks for train.minutes = {config.train.minutes:g}; a comparison is counted in steps: give"
            " --steps"
        )
    train = config.train.model_copy(update={"steps": steps or config.train.steps, "minutes": None})
    return config.model_copy(update={"train": train})


def _steps(config: RunConfig) -> int:
    assert config.train.steps is not None
    return config.train.steps


def _shown(config: RunConfig, other: RunConfig) -> dict[str, Any]:
    """Return the settings as a table, in which a recipe stands by its name if the other side's has another name."""
    table = as_table(config)
    recipes = [each if isinstance(each, str) else each.name for each in (config.train.precision, other.train.precision)]
    if recipes[0] != recipes[1]:
        table["train"]["precision"] = recipes[0]
    return table


def _labels(changes: dict[str, tuple[Any, Any]]) -> tuple[str, str]:
    """Return the two values of the only setting that differs. Its name is added where a value is no text."""
    if len(changes) > 1:
        return "A", "B"
    ((key, pair),) = changes.items()
    name = key.rpartition(".")[2]
    first, second = (value if isinstance(value, str) else f"{name} {shown(value)}" for value in pair)
    return first, second


def shown(value: Any) -> str:
    """Return a setting's value for a line of text."""
    text = "by default" if value is None else str(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


def _file_name(label: str) -> str:
    return re.sub(r"[^\w.+=-]+", "_", label.rpartition("/")[2].removesuffix(".toml"))


def _has_one_tokenizer(a: RunConfig, b: RunConfig) -> bool:
    """Return whether both sides have the same tokenizer: trained here on the same text, or read from equal files."""
    paths = [config.tokenizer.path for config in (a, b)]
    if paths == [None, None]:
        sizes = {run_file.resolve_model(config.model).vocab_size for config in (a, b)}
        return len(sizes) == 1 and _source(a.data) == _source(b.data)
    if None in paths:
        return False
    return paths[0] == paths[1] or len({Tokenizer.load(path).fingerprint for path in paths if path}) == 1


def _source(data: DataConfig) -> DataConfig:
    """Return the part of [data] that says where text is from and how much of it is held out."""
    return data.model_copy(update={key: DataConfig.model_fields[key].default for key in AFTER_SPLIT})


def _unpaired(a: RunConfig, b: RunConfig, has_one_tokenizer: bool) -> Iterator[str]:
    if not has_one_tokenizer:
        yield "tokenizers"
    if a.data != b.data:
        yield "text"
    if a.train.sequence_length != b.train.sequence_length:
        yield "sequence lengths"
    if a.train.seed != b.train.seed:
        yield "seeds"
    if _steps(a) != _steps(b):
        yield "numbers of steps"
    elif any(x != y for x, y in zip(_batch_sizes(a), _batch_sizes(b), strict=True)):
        yield "batch sizes"


def _batch_sizes(config: RunConfig) -> Iterator[int]:
    """Yield the batch size of every step, in sequences."""
    schedule, train, steps, tokens = run_file.resolve_schedule(config), config.train, _steps(config), 0
    for step in range(1, steps + 1):
        at = Position(step=step, tokens=tokens, fraction=step / steps)
        size = values(schedule, at, batch_multiple=train.microbatch_size).batch_size
        tokens += size * train.sequence_length
        yield size


def _check_held_out(a: RunConfig, b: RunConfig, unpaired: tuple[str, ...]) -> None:
    """Raise ValueError if there is no held-out text that neither side trains on."""
    shares = a.data.held_out_share, b.data.held_out_share
    if (a.data.kind, a.data.path) == (b.data.kind, b.data.path) and shares[0] != shares[1]:
        raise ValueError(
            f"A and B read the same text and hold out different shares of it ({shares[0]:g} and {shares[1]:g}), so one"
            " would train on what the other is measured on: give both the same data.held_out_share"
        )
    if shares == (0, 0):
        raise ValueError(
            f"A and B see different batches (other {', '.join(unpaired)}) and hold no text out on which they could be"
            " compared: set data.held_out_share, such as --set data.held_out_share=0.05"
        )


def _held_out(a: RunConfig, b: RunConfig) -> dict[str, DataConfig]:
    texts = {"A's held-out text": _source(a.data), "B's held-out text": _source(b.data)}
    if len(set(map(repr, texts.values()))) == 1:
        return {"held-out text": _source(a.data)}
    return {name: text for name, text in texts.items() if text.held_out_share > 0}
