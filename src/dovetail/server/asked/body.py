"""The base of every request: null means absent, and an unknown field is an error.

A field that would change the answer is never ignored. What clients add for their own books (`user`, `metadata`) is
taken and left alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from dovetail.server.errors import ApiError, Refusal, from_validation, unsupported

METADATA = frozenset({"user", "metadata", "safety_identifier", "prompt_cache_key", "prompt_cache_retention"})
HARMLESS: Mapping[str, tuple[Any, ...]] = {  # values that ask for what is done anyway
    "service_tier": ("auto", "default"),
    "store": (False,),
    "modalities": (["text"],),
    "function_call": ("none",),
    "functions": ([],),
    "background": (False,),
    "truncation": ("disabled",),
    "include": ([],),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,),
    "use_beam_search": (False,),
    "annotations": ([],),
}


_MOST_FIELDS = 256  # of an object; none of ours has a third of that


class Body(BaseModel):
    """One JSON object that a client sent."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)
    REFUSED: ClassVar[Mapping[str, str]] = {}  # field -> what to do instead

    @model_validator(mode="before")
    @classmethod
    def _tidy(cls, table: Any) -> Any:
        if isinstance(table, cls):
            return table
        if not isinstance(table, dict):
            raise ValueError(f"expected a JSON object, not {type(table).__name__}")
        if len(table) > _MOST_FIELDS:  # each unknown one is an error to be made
            raise ValueError(f"{len(table):,} fields; at most {_MOST_FIELDS} are read")
        kept = {}
        for name, value in table.items():
            if value is None or name in METADATA or value in HARMLESS.get(name, ()):
                continue
            if name in cls.REFUSED:
                raise Refusal(unsupported(name, name, cls.REFUSED[name]))
            kept[name] = value
        return kept


BodyT = TypeVar("BodyT", bound=Body)


def parse(schema: type[BodyT], data: bytes) -> BodyT:
    """Read the JSON of one request. Raises ApiError (400) with one line."""
    try:
        return schema.model_validate_json(data)
    except ValidationError as error:
        raise from_validation(error, schema) from None
    except RecursionError:
        raise ApiError(400, "the body is nested too deep", code="invalid_json") from None
