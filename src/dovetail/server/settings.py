"""How a checkpoint is served: address, key, limits, and how the engine runs."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from dovetail.config import Record

_BYTES_PER_TOKEN = (
    64  # of JSON: a token of text is some 4 characters, each up to 6 bytes where it is escaped; rest: room
)
_BODY_BASE = 1_000_000  # bytes for what is no prompt: tools, schemas


class ServeConfig(Record):
    """The whole of `--config serve.toml`; each key is an option of `dovetail serve` as well."""

    host: str = "127.0.0.1"
    port: int = Field(default=8000, ge=0, le=65535)  # 0: any free one
    api_key: str | None = Field(default=None, min_length=1)
    served_model_name: str | None = Field(default=None, min_length=1)  # None: the name of the checkpoint's directory
    chat_template: str | None = Field(default=None, min_length=1)  # a file or a built-in one; None: the checkpoint's
    max_model_len: int | None = Field(default=None, ge=2)  # tokens; None: the model's max_position_embeddings
    cache_bytes: int | None = Field(default=None, ge=1)  # None: the engine's choice
    cache_format: Literal["bf16", "fp8"] = "bf16"
    max_batch_tokens: int | None = Field(default=None, ge=1)  # tokens per step
    max_sequences: int | None = Field(default=None, ge=1)  # generated together
    max_waiting: int | None = Field(default=None, ge=0)  # further ones that wait
    speculate: Literal["auto"] | int = "auto"
    drain_seconds: float = Field(default=30.0, ge=0, allow_inf_nan=False)
    max_body_bytes: int | None = Field(default=None, ge=1)  # None: by max_model_len
    slow_client_seconds: float = Field(
        default=60.0, gt=0, allow_inf_nan=False
    )  # for a body to come, a chunk to be read
    max_requests: int = Field(default=512, ge=1)  # being read, generated or sent; a bound on memory

    @model_validator(mode="after")
    def _check(self) -> Self:
        if isinstance(self.speculate, int) and self.speculate < 0:
            raise ValueError(f"speculate = {self.speculate}: give auto, 0 or a number of drafts")
        return self


def body_limit(config: ServeConfig, max_model_len: int) -> int:
    """Return how many bytes a request's body may have."""
    return config.max_body_bytes or _BODY_BASE + _BYTES_PER_TOKEN * max_model_len
