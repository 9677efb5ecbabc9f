"""Reads tool calls that a grammar forced, as they are written.

The grammar (`asked.tools.call_grammar`) fixes every character but the arguments, so that a scan for the end of a JSON
value is all that is needed. Of a named function only the arguments are written.
"""

from __future__ import annotations

import re
import uuid
from collections.abc import Iterable, Iterator

from dovetail.server.served import Delta, Parser

_HEAD = re.compile(r'(?:\[|\}, )\{"name": "([^"]*)", "arguments": ')
_MARKS = re.compile(r'\\.?|["{}\[\]]', re.DOTALL)  # what matters to where a JSON object ends


def new_id() -> str:
    """Return a fresh id of a call."""
    return f"chatcmpl-tool-{uuid.uuid4().hex}"


class ForcedCalls:
    """Passes thoughts on as `inner` finds them, and reads the content as calls.

    `name` is the function that the grammar is about; None: the content is a list of calls that name theirs.
    """

    def __init__(self, inner: Parser, name: str | None) -> None:
        self.inner, self.name = inner, name
        self.count = 0
        self.text = ""  # not read yet
        self.depth: int | None = None  # of brackets in the arguments; None: between two calls
        self.is_string = False

    def push(self, token_id: int, text: str) -> list[Delta]:
        """Take the next token."""
        return list(self._read(self.inner.push(token_id, text)))

    def finish(self, text: str) -> list[Delta]:
        """Take the rest."""
        return list(self._read(self.inner.finish(text)))

    def _read(self, deltas: Iterable[Delta]) -> Iterator[Delta]:
        for delta in deltas:
            if not delta.content:
                yield delta
            elif self.name is not None:
                yield from self._named(delta.content)
            else:
                self.text += delta.content
                yield from self._listed()

    def _named(self, text: str) -> Iterator[Delta]:
        assert self.name is not None
        if self.count == 0:
            yield self._start(self.name)
        yield Delta(call=0, arguments=text)

    def _start(self, name: str) -> Delta:
        self.count += 1
        return Delta(call=self.count - 1, id=new_id(), name=name)

    def _listed(self) -> Iterator[Delta]:
        while True:
            if self.depth is None:
                head = _HEAD.match(self.text)
                if head is None:  # not all of it yet, or the end of the list
                    return
                yield self._start(head[1])
                self.text, self.depth = self.text[head.end() :], 0
            end = self._end_of_arguments()
            written, self.text = self.text[:end], self.text[end:]
            if written:
                yield Delta(call=self.count - 1, arguments=written)
            if self.depth is not None:
                return

    def _end_of_arguments(self) -> int:
        """Return where the arguments end in the text, or all of it that can be told; the depth is None at the end."""
        assert self.depth is not None
        for mark in _MARKS.finditer(self.text):
            kind = mark[0]
            if kind == "\\":  # what it escapes is not there yet
                return mark.start()
            if kind == '"':
                self.is_string = not self.is_string
            elif not self.is_string and kind in "{[":
                self.depth += 1
            elif not self.is_string and kind in "}]":
                if self.depth == 0:  # the end of a call around arguments that are no object
                    self.depth = None
                    return mark.start()
                self.depth -= 1
                if self.depth == 0:
                    self.depth = None
                    return mark.end()
        return len(self.text)
