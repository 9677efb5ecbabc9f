"""Bits per byte of a model, and of standard compressors on the same text for comparison."""

from __future__ import annotations

import gzip
import lzma
import math
from collections.abc import Iterable


def bits_per_byte(nats: float, num_bytes: int) -> float:
    """Return a summed negative log-likelihood in nats as bits per byte of the raw text."""
    return nats / math.log(2) / num_bytes


def compressed_sizes(texts: Iterable[bytes]) -> dict[str, float]:
    """Return the bits per byte of `xz -9` and `gzip -9` on the texts joined in order, headers included.

    The texts are joined because a model sees the documents before, too. Raises ValueError if there is no text.
    """
    data = b"".join(texts)
    if not data:
        raise ValueError("no bytes to compress; the held-out text is empty: raise data.held_out_share")
    packed = {
        "xz -9": lzma.compress(data, preset=9),
        "gzip -9": gzip.compress(data, compresslevel=9, mtime=0),
    }
    return {name: 8 * len(result) / len(data) for name, result in packed.items()}
