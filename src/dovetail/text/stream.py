"""Decodes a growing sequence of token ids; what it returns is never changed by a later token.

A character of several bytes may be spread over several tokens, so the bytes of an unfinished character are held back.
Decoding each token alone would print U+FFFD for every part of it.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterable
from typing import AnyStr

from tokenizers.decoders import DecodeStream

from dovetail.text.tokenizer import Tokenizer


class TextStream:
    """A decoder: all results of `push` and the one of `finish`, joined, are `tokenizer.decode` of all ids."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        # What follows is used only with decoders that are not byte-level.
        self.decoder = DecodeStream(skip_special_tokens=True)
        self.ids: list[int] = []
        self.emitted = 0  # characters

    def push(self, ids: Iterable[int]) -> str:
        """Add `ids`, and return the text that no later token can change."""
        if self.tokenizer.piece_bytes is not None:
            return self.utf8.decode(self.tokenizer.decode_bytes(ids))
        ids = list(ids)
        self.ids += ids
        text = "".join([self.decoder.step(self.tokenizer.backend, i) or "" for i in ids])
        self.emitted += len(text)
        return text

    def finish(self) -> str:
        """Return what was held back, with U+FFFD for bytes that never became a character."""
        if self.tokenizer.piece_bytes is not None:
            return self.utf8.decode(b"", final=True)
        return self.tokenizer.decode(self.ids)[self.emitted :]


def pending(text: AnyStr, marker: AnyStr) -> int:
    """Length of the longest end of `text` that is a beginning of `marker`, not all of it."""
    return next((n for n in range(min(len(marker) - 1, len(text)), 0, -1) if text.endswith(marker[:n])), 0)
