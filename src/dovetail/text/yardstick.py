"""Bits per byte: of a model, and of compressors on the same bytes, a yardstick that nobody here tuned."""

from __future__ import annotations

import gzip
import lzma
import math
from collections.abc import Iterable


def bits_per_byte(nats: float, num_bytes: int) -> float:
    """A summed negative log-likelihood in nats, over the bytes of the raw text."""
    return nats / math.log(2) / num_bytes


def compressed_sizes(texts: Iterable[bytes]) -> dict[str, float]:
    """Bits per byte of `xz -9` and `gzip -9` on the texts joined in order, headers included.

    Joined, because a model packs its documents as well and so sees the ones before. Raises ValueError if
    there is no text.
    """
    data = b"".join(texts)
    if not data:
        raise ValueError("no bytes to compress; the held-out text is empty: raise data.held_out_share")
    packed = {
        "xz -9": lzma.compress(data, preset=9),
        "gzip -9": gzip.compress(data, compresslevel=9, mtime=0),
    }
    return {name: 8 * len(result) / len(data) for name, result in packed.items()}
