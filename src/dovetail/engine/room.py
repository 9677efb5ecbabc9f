"""How much an engine takes on: what a user may set, and the pages that come of it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from pydantic import Field

from dovetail.config import Record
from dovetail.cost.count import cache_bytes_per_token
from dovetail.engine import speculative
from dovetail.engine.steps.cache import fp8_entry_bytes
from dovetail.engine.steps.tiled import KEPT_SHARE
from dovetail.spec.model import Mla, ModelSpec

PAGE = 64  # positions
DEFAULT_CACHE_BYTES = 2 * 2**30


@dataclass(frozen=True, slots=True, kw_only=True)
class Room:
    """How much may be worked on at a time."""

    sequences: int  # together
    positions: int  # of one sequence, prompt and completion
    num_pages: int
    page_size: int = PAGE
    prompt_tokens: int = 512  # of a step, at most
    shares_prefixes: bool = True  # prompts begin behind pages that others filled
    is_fp8: bool = False  # the cache


class EngineConfig(Record):
    """How much the engine takes on."""

    max_model_len: int | None = Field(default=None, ge=2)  # tokens of prompt and completion; the model's own limit
    cache_bytes: int = Field(default=DEFAULT_CACHE_BYTES, ge=1)  # a promise: pages, and what prompts keep for a while
    max_batch_tokens: int = Field(default=512, ge=1)  # of prompts, in a step
    max_sequences: int = Field(default=32, ge=1)  # worked on together
    max_waiting: int = Field(default=1024, ge=0)  # requests
    speculate: int | Literal["auto"] = "auto"  # drafts per step; auto: as many as there are MTP modules, where they pay
    cache_format: Literal["bf16", "fp8"] = "bf16"  # bf16: the weights' own format
    page_size: int = Field(default=PAGE, ge=1)  # positions
    shares_prefixes: bool = True

    def drafts(self, spec: ModelSpec) -> int:
        """Per step, at most."""
        return spec.num_nextn_predict_layers if self.speculate == "auto" else self.speculate


def plan_room(spec: ModelSpec, config: EngineConfig, element_size: int) -> Room:
    """The pages that `cache_bytes` have room for, with entries of `element_size` bytes; no weights are needed.

    Raises `ValueError` where that is not one sequence, for a `max_model_len` beyond the model's limit, and for more
    drafts than the model has MTP modules.
    """
    depth = config.drafts(spec)
    speculative.check_depth(depth, spec.num_nextn_predict_layers)
    limit = spec.max_position_embeddings
    max_model_len = config.max_model_len or limit
    if max_model_len > limit:
        raise ValueError(
            f"max_model_len = {max_model_len:,} is more than the model's max_position_embeddings = {limit:,}: set it "
            "lower"
        )
    if config.cache_format == "fp8":
        assert isinstance(spec.attention, Mla)
        per_position = fp8_entry_bytes(spec.attention) * (spec.num_hidden_layers + spec.num_nextn_predict_layers)
    else:
        per_position = cache_bytes_per_token(spec, element_size, mtp=True)
    per_page = per_position * config.page_size
    num_pages = int(config.cache_bytes / (1 + KEPT_SHARE) / per_page)
    longest = -(-positions_of(max_model_len, depth) // config.page_size)
    if num_pages < longest:
        least = math.ceil(longest * per_page * (1 + KEPT_SHARE))
        raise ValueError(
            f"cache_bytes = {config.cache_bytes:,} has room for {num_pages * config.page_size:,} positions, and one "
            f"sequence of max_model_len = {max_model_len:,} needs {least:,} bytes: give it more, or set "
            "max_model_len lower"
        )
    return Room(
        sequences=config.max_sequences,
        positions=max_model_len,
        num_pages=min(num_pages, longest * config.max_sequences),
        page_size=config.page_size,
        prompt_tokens=config.max_batch_tokens,
        shares_prefixes=config.shares_prefixes,
        is_fp8=config.cache_format == "fp8",
    )


def positions_of(length: int, depth: int) -> int:
    """Positions that a sequence of `length` tokens takes: the last one is never run, but drafts after it may be, to be
    thrown away."""
    return length + depth + 1
