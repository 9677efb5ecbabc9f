"""Errors in OpenAI's shape: {"error": {"message", "type", "param", "code"}}.

A client's mistake is one line that names the field and its value. What went wrong inside never shows a traceback.
"""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ValidationError

from dovetail.config import near_matches

_TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
_LONGEST_SHOWN = 80  # characters of a value


class ApiError(Exception):
    """An answer other than 200."""

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None, retry_after: int = 0
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.retry_after = retry_after  # seconds; 0: say nothing

    def body(self) -> dict[str, Any]:
        """Return the JSON that the client gets."""
        kind = _TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def headers(self) -> dict[str, str]:
        """Return the headers that go with it."""
        return {"retry-after": str(self.retry_after)} if self.retry_after else {}


def unsupported(param: str, what: str, remedy: str) -> ApiError:
    """Return the refusal of `what`, in the field `param`, that this server does not act upon."""
    return ApiError(400, f"{what} is not supported: {remedy}", param=param, code="unsupported_parameter")


def from_validation(error: ValidationError, schema: type[BaseModel]) -> ApiError:
    """Return the first problem that pydantic found, as one line."""
    problems = error.errors(include_url=False)
    first = next((each for each in problems if each["type"] == "extra_forbidden"), problems[0])
    if isinstance(cause := first.get("ctx", {}).get("error"), Refusal):
        return cause.error
    param = ".".join(str(part) for part in first["loc"]) or None
    if first["type"] == "extra_forbidden":
        remedy = near_matches(str(first["loc"][-1]), schema.model_fields if len(first["loc"]) == 1 else ())
        message = f"unknown field {_shown(param)}" + (f"; {remedy}" if remedy else "")
        return ApiError(400, message, param=param and param[:_LONGEST_SHOWN], code="unknown_parameter")
    if first["type"] == "missing":
        return ApiError(400, f"{param} is missing", param=param, code="missing_required_parameter")
    if first["type"] == "json_invalid":
        return ApiError(400, f"the body is not valid JSON: {first['ctx']['error']}", code="invalid_json")
    text = first["msg"].removeprefix("Value error, ")
    if param is None:
        message = text
    else:
        message = f"{param} = {_shown(first['input'])}: {text[:1].lower()}{text[1:]}"
    return ApiError(400, message, param=param)


class Refusal(ValueError):
    """An ApiError on its way through pydantic, which hands on a ValueError only."""

    def __init__(self, error: ApiError) -> None:
        super().__init__(error.message)
        self.error = error


def _shown(value: Any) -> str:
    """Return `value` on one line, cut where it is long, and without writing out all of a large one first."""
    if isinstance(value, str | bytes | list | tuple):
        value = value[:_LONGEST_SHOWN]
    elif isinstance(value, dict):
        value = dict(list(value.items())[:8])
    elif isinstance(value, int) and abs(value) >= 10**_LONGEST_SHOWN:
        return "an integer of many digits"
    text = repr(value)
    return text if len(text) <= _LONGEST_SHOWN else text[: _LONGEST_SHOWN - 3] + "..."
