"""Splits some tokens that join punctuation with line breaks, at random, in training text [V3 §4.1].

With such tokens a prompt that ends in ":" or in ":<newline>" is cut where training text hardly ever is (token
boundary bias). So in training a share of the combined tokens is split in two: the punctuation, and the line break
with its indentation. DeepSeek-V3 does this, and does not publish the share.
"""

from __future__ import annotations

import re

import numpy as np

from dovetail.text.tokenizer import Tokenizer

COMBINED = re.compile(r"( ?[^\w\s]+)([\r\n]+[ \t]*)")


def combined_tokens(tokenizer: Tokenizer) -> dict[int, tuple[int, ...]]:
    """Return, for every id that joins punctuation and line breaks, the ids of the two pieces.

    Raises ValueError for a tokenizer that is not byte-level.
    """
    if tokenizer.piece_bytes is None:
        raise ValueError("newline_split_rate needs a byte-level tokenizer; set data.newline_split_rate to 0")
    pieces = {}
    for token_id, data in enumerate(tokenizer.piece_bytes):
        if match := COMBINED.fullmatch(data.decode("utf-8", "replace")):
            pieces[token_id] = tuple(tokenizer.encode(match[1]) + tokenizer.encode(match[2]))
    return pieces


def split_combined(
    ids: list[int], combined: dict[int, tuple[int, ...]], seed: int, index: int, rate: float
) -> list[int]:
    """Return the `ids` of document `index` with a share `rate` of the combined tokens split; the text is the same."""
    candidates = [position for position, token_id in enumerate(ids) if token_id in combined]
    if not candidates or rate == 0:
        return ids
    # Another counter keeps these draws apart from those of fill-in-the-middle.
    words = np.random.Philox(key=[seed, index], counter=[0, 0, 0, 1]).random_raw(len(candidates))
    result, done = [], 0
    for position, word in zip(candidates, words, strict=True):
        if int(word) < rate * 2**64:
            result += [*ids[done:position], *combined[ids[position]]]
            done = position + 1
    return result + ids[done:]
