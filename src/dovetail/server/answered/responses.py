"""The answer of POST /v1/responses, streamed or whole: one message of text, and the thought before it."""

from __future__ import annotations

import time
import uuid
from typing import Any

from dovetail.server.answered.chat import chat_job
from dovetail.server.answered.choice import Piece
from dovetail.server.answered.events import event
from dovetail.server.asked.responses import ResponsesRequest
from dovetail.server.errors import ApiError
from dovetail.server.served import Served
from dovetail.server.work import Work

_PARTS = {"message": "output_text", "reasoning": "reasoning_text"}  # of each kind of item


class ResponsesAnswer:
    """Writes events, or the whole."""

    def __init__(self, served: Served, asked: ResponsesRequest, seed: int) -> None:
        self.served, self.asked, self.is_stream = served, asked, asked.stream
        self.jobs = [chat_job(served, asked.to_chat(), seed)]
        self.id = uuid.uuid4().hex
        self.created = int(time.time())
        self.number = 0  # of the next event
        self.items: list[dict[str, Any]] = []  # of the stream so far; the last one may be open

    def opening(self, work: Work) -> bytes:
        """Return the events before the first token."""
        response = self._response("in_progress", [], None)
        return self._event("response.created", response=response) + self._event(
            "response.in_progress", response=response
        )

    def piece(self, work: Work, index: int, piece: Piece) -> bytes:
        """Return the events of one step."""
        events = b""
        for delta in piece.deltas:
            kind, text = ("reasoning", delta.reasoning) if delta.reasoning else ("message", delta.content)
            if not self.items or self.items[-1]["type"] != kind:
                events += self._close() + self._open(kind)
            part = self.items[-1]["content"][0]
            part["text"] += text
            events += self._event(f"response.{_PARTS[kind]}.delta", **self._place(), delta=text, **self._logprobs(kind))
        return events

    def closing(self, work: Work) -> bytes:
        """Return the events of the end."""
        has_message = bool(self.items) and self.items[-1]["type"] == "message"
        events = b"" if has_message else self._close() + self._open("message")
        events += self._close()
        is_cut = work.choices[0].finish_reason == "length"
        status = "incomplete" if is_cut else "completed"
        return events + self._event(f"response.{status}", response=self._response(status, self.items, work.usage()))

    def failure(self, error: ApiError) -> bytes:
        """Return an error inside a stream."""
        return self._event("error", message=error.message, code=error.code, param=error.param)

    def whole(self, work: Work) -> dict[str, Any]:
        """Return the answer as one object."""
        choice = work.choices[0]
        status = "incomplete" if choice.finish_reason == "length" else "completed"
        items = [self._item("reasoning", "".join(choice.reasoning))] if choice.reasoning else []
        items.append(self._item("message", "".join(choice.content)))
        return self._response(status, items, work.usage())

    def _open(self, kind: str) -> bytes:
        item = self._item(kind, "", "in_progress")
        self.items.append(item)
        place = {"output_index": len(self.items) - 1}
        added = self._event("response.output_item.added", **place, item={**item, "content": []})
        return added + self._event("response.content_part.added", **self._place(), part=dict(item["content"][0]))

    def _close(self) -> bytes:
        if not self.items:
            return b""
        item = self.items[-1]
        kind, part = item["type"], item["content"][0]
        item["status"] = "completed"
        place = {"output_index": len(self.items) - 1}
        return (
            self._event(f"response.{_PARTS[kind]}.done", **self._place(), text=part["text"], **self._logprobs(kind))
            + self._event("response.content_part.done", **self._place(), part=part)
            + self._event("response.output_item.done", **place, item=item)
        )

    def _place(self) -> dict[str, Any]:
        return {"item_id": self.items[-1]["id"], "output_index": len(self.items) - 1, "content_index": 0}

    def _logprobs(self, kind: str) -> dict[str, Any]:
        return {"logprobs": []} if kind == "message" else {}

    def _item(self, kind: str, text: str, status: str = "completed") -> dict[str, Any]:
        part: dict[str, Any] = {"type": _PARTS[kind], "text": text}
        if kind == "message":
            prefix = "msg"
            more: dict[str, Any] = {"role": "assistant"}
            part |= {"annotations": [], "logprobs": []}
        else:
            prefix = "rs"
            more = {"summary": []}
        return {"id": f"{prefix}_{uuid.uuid4().hex}", "type": kind, "status": status, **more, "content": [part]}

    def _event(self, kind: str, **fields: Any) -> bytes:
        self.number += 1
        return event({"type": kind, "sequence_number": self.number - 1, **fields}, kind)

    def _response(self, status: str, items: list[dict[str, Any]], usage: dict[str, Any] | None) -> dict[str, Any]:
        asked, params = self.asked, self.jobs[0].params[0]
        return {
            "id": f"resp_{self.id}",
            "object": "response",
            "created_at": self.created,
            "model": self.served.name,
            "status": status,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "instructions": asked.instructions,
            "max_output_tokens": asked.max_output_tokens,
            "temperature": params.temperature,
            "top_p": params.top_p,
            "text": {"format": asked.text.format.model_dump(by_alias=True, exclude_unset=True) or {"type": "text"}},
            "metadata": {},
            "parallel_tool_calls": asked.parallel_tool_calls,
            "tool_choice": asked.tool_choice,
            "tools": [],
            "store": False,
            "previous_response_id": None,
            "output": items,
            "usage": None if usage is None else _usage(usage),
        }


def _usage(usage: dict[str, Any]) -> dict[str, Any]:
    """Return the counts under this endpoint's names."""
    return {
        "input_tokens": usage["prompt_tokens"],
        "input_tokens_details": usage["prompt_tokens_details"],
        "output_tokens": usage["completion_tokens"],
        "output_tokens_details": usage["completion_tokens_details"],
        "total_tokens": usage["total_tokens"],
    }
