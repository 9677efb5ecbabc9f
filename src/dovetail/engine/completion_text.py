"""The text of a growing completion, cut at the first stop string.

It is given out only where nothing can change it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from dovetail.text.stream import TextStream, pending
from dovetail.text.tokenizer import Tokenizer


class CompletionText:
    """Held back from `take`: unfinished characters, and an end of the text that may begin a stop string."""

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str], include_stop: bool = False) -> None:
        """`include_stop`: the text ends behind the stop string, and not before it."""
        self.stream = TextStream(tokenizer)
        self.num_ids = tokenizer.vocab_size  # an end token that a model has beyond them is no text
        self.stop = tuple(stop)
        self.text = ""
        self.include_stop = include_stop
        self.stopped_by: str | None = None
        self.is_finished = False
        self.taken = 0  # characters

    @property
    def is_stopped(self) -> bool:
        return self.stopped_by is not None

    def push(self, ids: Iterable[int], may_stop: bool = True) -> None:
        """`may_stop`: look for stop strings in what these tokens bring."""
        self._extend(self.stream.push([token for token in ids if token < self.num_ids]), may_stop)

    def finish(self) -> None:
        """No more tokens will come."""
        self._extend(self.stream.finish(), True)
        self.is_finished = True

    def take(self) -> str:
        """What has become sure since the last call."""
        end = len(self.text)
        if not (self.is_stopped or self.is_finished):
            end -= max((pending(self.text, stop) for stop in self.stop), default=0)
        delta = self.text[self.taken : end]
        self.taken = max(self.taken, end)
        return delta

    def _extend(self, text: str, may_stop: bool) -> None:
        if self.is_stopped or not text:
            return
        old = len(self.text)
        self.text += text
        if not may_stop:
            return
        found = [(*match, stop) for stop in self.stop if (match := find_new(self.text, stop, old)) is not None]
        if found:
            end, start, self.stopped_by = min(found)
            self.text = self.text[: end if self.include_stop else start]


def find_new(text: str, stop: str, old: int) -> tuple[int, int] | None:
    """(end, start) of the first `stop` in `text` that ends after its first `old` characters.

    Compared by end: the string that is complete first wins, however many characters a token brings.
    """
    start = text.find(stop, max(old - len(stop) + 1, 0))
    return None if start < 0 else (start + len(stop), start)
