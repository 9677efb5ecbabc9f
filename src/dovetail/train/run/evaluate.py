"""Measures held-out bits per byte.

Every token is scored once, each from at least half a window of context.
"""

from __future__ import annotations

import itertools

import torch

from dovetail.model.transformer import Transformer
from dovetail.text.corpus import evaluation_windows
from dovetail.text.shards import TokenStore
from dovetail.text.yardstick import bits_per_byte
from dovetail.train.step.loss import token_losses


@torch.no_grad()
def held_out(
    model: Transformer, store: TokenStore, length: int, batch_size: int, max_windows: int | None = None
) -> tuple[float, float]:
    """(nats per token, bits per byte) over the store, or over about `max_windows` windows spread across it.

    A part of the store is charged the store's mean bytes per token.
    """
    device = model.norm.weight.device
    nats, scored = 0.0, 0
    stride = max(length // 2, 1)
    windows = evaluation_windows(store, length, stride, batch_size)
    every = 1 if max_windows is None else max(1, store.num_tokens // stride // max(max_windows, batch_size))
    for window in itertools.islice(windows, 0, None, every):
        tokens = window.batch.tokens.to(device)
        hidden = model(tokens[:, :-1].contiguous()).hidden.flatten(0, 1)
        losses = token_losses(hidden, model.head_weight, tokens[:, 1:].flatten())
        mask = window.scored.flatten().to(device)
        nats += float(losses.double()[mask].sum())
        scored += int(mask.sum())
    return nats / scored, bits_per_byte(nats, store.num_bytes * scored / (store.num_tokens - 1))
