"""Cuts documents into prefix, middle and suffix for fill-in-the-middle training.

One document in ten is cut and put into prefix-suffix-middle order [V3 §4.1]:

    <fim_begin> prefix <fim_hole> suffix <fim_end> middle <eos>

The two cuts fall between characters, before the text is tokenised. Cuts between tokens would be simpler, but a model
trained on them never sees a word cut in two, which is what an editor sends: a cursor may stand inside a token. In
return the parts are tokenised once, when the store is written, so every epoch has the same cuts.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class Parts(NamedTuple):
    """The three parts of a document: `prefix + middle + suffix` is the document; any of them may be empty."""

    prefix: str
    suffix: str
    middle: str


def fill_in_middle(text: str, seed: int, index: int, rate: float) -> Parts | None:
    """Return the parts of document `index`, or None if it stays whole; the arguments alone decide.

    A share `rate` of all documents is cut, at two independent uniform positions in 0 .. len(text).
    """
    if rate == 0:
        return None
    chosen, first, second = document_uniforms(seed, index, 3)
    if chosen >= rate:
        return None
    start, stop = sorted((int(first * (len(text) + 1)), int(second * (len(text) + 1))))
    return Parts(prefix=text[:start], suffix=text[stop:], middle=text[start:stop])


def document_uniforms(seed: int, index: int, count: int) -> list[float]:
    """Return `count` numbers in [0, 1) that belong to this seed and document.

    They are the raw 64-bit words of the counter-based generator Philox under the key (seed, index), which no numpy
    release may change.
    """
    words = np.random.Philox(key=[seed, index]).random_raw(count)
    return [float(word >> np.uint64(11)) * 2.0**-53 for word in words]
