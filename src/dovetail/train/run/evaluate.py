"""Measures held-out bits per byte.

Every token is scored once, each from at least half a window of context. Each rank takes its share of the windows, so
that none waits for another one; the sums are added in the order of the text, so the figure does not depend on how many
ranks there are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist

from dovetail.text.corpus import Windows, evaluation_windows
from dovetail.text.shards import TokenStore
from dovetail.text.yardstick import bits_per_byte
from dovetail.train.layout.ranks import any_rank
from dovetail.train.report.metrics import HeldOutMetrics, WholeHeldOutMetrics
from dovetail.train.report.reporter import Reporter
from dovetail.train.run.state import Counters, Run
from dovetail.train.run.stop import Interrupted
from dovetail.train.step.loss import token_losses
from dovetail.train.step.team import Team

Told = Callable[[int, int], bool]  # of batches done, and how many there are; returns whether to stop


def held_out(
    team: Team,
    store: TokenStore,
    length: int,
    batch_size: int,
    max_windows: int | None = None,
    told: Told = lambda done, total: False,
) -> tuple[float, float]:
    """(nats per token, bits per byte) over the store, or over about `max_windows` windows spread across it.

    A part of the store is charged the store's mean bytes per token. Every rank of a process group calls it. Raises
    Interrupted on all ranks if `told`, which hears of every batch, returns True on one of them.
    """
    stride = max(length // 2, 1)
    every = 1 if max_windows is None else max(1, store.num_tokens // stride // max(max_windows, batch_size))
    windows = evaluation_windows(store, length, stride, batch_size)
    chosen = range(0, len(windows), every)
    found: dict[int, tuple[float, int]] = {}  # by batch: nats, and targets scored
    for first in range(0, len(chosen), team.num_shares):
        done = first + team.index
        # A rank that has no batch left takes the last again, uncounted: others may need its experts.
        nats = _nats(team, windows[chosen[min(done, len(chosen) - 1)]])
        if nats is not None and done < len(chosen):
            found[chosen[done]] = nats
        if any_rank(told(min(done + 1, len(chosen)), len(chosen))):
            raise Interrupted("stopped while held-out text was measured")
    nats, scored = 0.0, 0
    for _, (more, targets) in sorted(_of_all_ranks(found).items()):
        nats, scored = nats + more, scored + targets
    return nats / scored, bits_per_byte(nats, store.num_bytes * scored / (store.num_tokens - 1))


@torch.no_grad()
def _nats(team: Team, window: Windows) -> tuple[float, int] | None:
    """The nats of the targets that the window scores, and how many these are, on the rank that has the head."""
    device = next(team.models[0].parameters()).device
    tokens = window.batch.tokens.to(device)
    hidden = team.hidden(tokens[:, :-1].contiguous())
    if hidden is None:
        return None
    [head] = [model.head_weight for model in team.models if model.stage.has_head][:1]
    losses = token_losses(hidden.flatten(0, 1), head, tokens[:, 1:].flatten())
    mask = window.scored.flatten().to(device)
    return float(losses.double()[mask].sum()), int(mask.sum())


def _of_all_ranks(found: dict[int, tuple[float, int]]) -> dict[int, tuple[float, int]]:
    if not dist.is_initialized():
        return found
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, found)
    return {index: each for part in parts for index, each in part.items()}


def evaluate(
    state: Run, counters: Counters, reporter: Reporter | None, received: Sequence[int], is_whole: bool = False
) -> None:
    """Measure a point of the curve, on the same windows each time, or the final figure, on all held-out text.

    Rank 0 alone has a `reporter`. Raises Interrupted once a stop signal was `received`; nothing is reported then.
    """
    if state.held_out_store is None:
        return
    train = state.config.train

    def told(done: int, total: int) -> bool:
        if reporter is not None:
            reporter.display.progress("measuring held-out text", done, total)
        return bool(received)

    windows = None if is_whole else train.evaluate_windows
    store, length = state.held_out_store, train.sequence_length
    loss, bits = held_out(state.team, store, length, train.microbatch_size, windows, told)
    if reporter is not None:
        kind = WholeHeldOutMetrics if is_whole else HeldOutMetrics
        reporter.write(kind(step=counters.step, tokens=counters.tokens, loss=loss, bits_per_byte=bits))


def evaluate_if_missing(
    state: Run, counters: Counters, reporter: Reporter | None, received: Sequence[int], is_whole: bool = False
) -> None:
    """Measure what a run that was stopped in between still lacks after its last step."""
    kind = WholeHeldOutMetrics if is_whole else HeldOutMetrics
    if any_rank(reporter is not None and not reporter.has(kind, counters.step)):
        evaluate(state, counters, reporter, received, is_whole)
