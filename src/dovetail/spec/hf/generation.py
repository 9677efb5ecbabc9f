"""Reads and writes `generation_config.json`: what ends a text, and which sampling is advised.

The end tokens are added to those of config.json: any of them ends a completion. Sampling is advised where `do_sample`
stands in the file: true gives the temperature, top_k, top_p and min_p beside it, false the most likely token.
transformers, too, looks at these four under `do_sample` only.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field

from dovetail.config import Record, read_json, validate
from dovetail.spec.model import ModelSpec, check_tokens, token_ids

FILE = "generation_config.json"
# Keys that change nothing here: limits of other programs, their caches, and what config.json says too.
_IGNORED = frozenset(
    [
        "_from_model_config",
        "bos_token_id",
        "pad_token_id",
        "transformers_version",
        "max_length",
        "max_new_tokens",
        "use_cache",
        "cache_implementation",
        "output_attentions",
        "output_hidden_states",
        "output_scores",
        "output_logits",
        "return_dict_in_generate",
    ]
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    """What one file says."""

    end_tokens: tuple[int, ...] = ()
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    unread: tuple[str, ...] = ()  # keys that would change what is generated, and do not here

    @property
    def sampling(self) -> dict[str, float]:
        """What is advised, by the names of `engine.sampler.SamplingParams`."""
        advised = {key: getattr(self, key) for key in ("temperature", "top_k", "top_p", "min_p")}
        return {key: value for key, value in advised.items() if value is not None}


class _Table(Record):
    eos_token_id: int | tuple[int, ...] | None = None
    do_sample: bool | None = None
    temperature: float | None = Field(default=None, ge=0)
    top_k: int | None = Field(default=None, ge=0)
    top_p: float | None = Field(default=None, gt=0, le=1)
    min_p: float | None = Field(default=None, ge=0, le=1)


def read_generation(directory: Path, vocab_size: int) -> Generation:
    """Read the file in `directory`, if there is one, for a model of `vocab_size` tokens. Raises ValueError."""
    file = directory / FILE
    if not file.is_file():
        return Generation()
    config = {key: value for key, value in read_json(file).items() if value is not None}
    table = validate(_Table, {key: config[key] for key in _Table.model_fields if key in config}, where=str(file))
    end_tokens = token_ids(table.eos_token_id)
    check_tokens(f"{file}: eos_token_id", end_tokens, vocab_size)
    advised: dict[str, Any] = {} if table.do_sample is None else {"temperature": 0.0}
    if table.do_sample:
        advised = table.model_dump(include={"temperature", "top_k", "top_p", "min_p"})
    unread = sorted(config.keys() - _Table.model_fields.keys() - _IGNORED)
    return Generation(end_tokens=end_tokens, unread=tuple(unread), **advised)


def write_generation(spec: ModelSpec) -> dict[str, Any]:
    """Return the file of a model whose makers advise nothing."""
    return spec.model_dump(include={"bos_token_id", "eos_token_id"}, exclude_none=True)
