"""What a run is made of, where it is, and what of it a checkpoint holds."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from dovetail.model.transformer import Transformer
from dovetail.spec.model import ModelSpec
from dovetail.text.shards import TokenStore
from dovetail.text.tokenizer import Tokenizer
from dovetail.train.report.peak import Peak
from dovetail.train.run import checkpoint, claim
from dovetail.train.run.budget import Pace
from dovetail.train.run.ranks import rank_and_world
from dovetail.train.run.run_file import RunConfig
from dovetail.train.step.ema import Ema
from dovetail.train.step.optim import AdamW
from dovetail.train.step.schedule import Position, TrainingSchedule, values


@dataclass(slots=True)
class Counters:
    """Where the run is; the JSON half of a checkpoint."""

    step: int = 0
    tokens: int = 0
    samples: int = 0
    skipped: int = 0
    bad_in_a_row: int = 0
    seconds: float = 0.0  # of training, evaluation and saving, over all sittings


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """All that stays the same from step to step, and the pace, which may be planned again."""

    config: RunConfig
    spec: ModelSpec
    schedule: TrainingSchedule
    tokenizer: Tokenizer
    train_store: TokenStore
    held_out_store: TokenStore | None
    model: Transformer
    optimizer: AdamW
    ema: Ema | None
    pace: Pace
    peak: Peak

    @property
    def num_steps(self) -> int:
        return self.pace.num_steps


def state_of(state: Run) -> dict[str, dict[str, Tensor] | dict[str, dict[str, Tensor]]]:
    """The tensors of a checkpoint."""
    tensors = {"optimizer": state.optimizer.state(), "buffers": dict(state.model.named_buffers())}
    return tensors if state.ema is None else {**tensors, "ema": state.ema.state()}


def save(state: Run, counters: Counters, checkpointer: checkpoint.Checkpointer) -> None:
    counters.seconds = state.pace.seconds
    extra = {"counters": dataclasses.asdict(counters), "updates": state.optimizer.updates, claim.TEXT: _text(state)}
    checkpointer.save(counters.step, state_of(state), {**extra, "ranks": rank_and_world()[1]})


def resume(state: Run, root: Path, accept_changed_text: bool) -> Counters:
    """Fill the state from the newest whole checkpoint, if there is one.

    Raises ValueError for another text, unless it is accepted, and for ranks on which batches would have another size.
    """
    newest = checkpoint.latest(root)
    if newest is None:
        return Counters()
    extra = checkpoint.load_checkpoint(newest, state_of(state))
    if not accept_changed_text:
        claim.check_text(state.config.out, checkpoint.step_of(newest), extra.get(claim.TEXT), _text(state))
    state.optimizer.updates = extra["updates"]
    state.optimizer.refresh_parameters()
    counters = Counters(**extra["counters"])
    _check_batches(state, counters, extra.get("ranks", rank_and_world()[1]))  # earlier versions did not say
    return counters


def _check_batches(state: Run, counters: Counters, ranks: int) -> None:
    """Raise ValueError if a step still to come would have another batch size than on the former number of `ranks`."""
    train, here, tokens = state.config.train, rank_and_world()[1], counters.tokens
    for step in range(counters.step + 1, state.num_steps + 1) if here != ranks else ():
        at = Position(step=step, tokens=tokens, fraction=state.pace.fraction(step))
        before, now = (values(state.schedule, at, train.microbatch_size * each).batch_size for each in (ranks, here))
        if before != now:
            raise ValueError(
                f"{state.config.out}: with ranks = {here} step {step} would have a batch of {now}, and with the former "
                f"ranks = {ranks} one of {before}: batches are multiples of ranks times train.microbatch_size = "
                f"{train.microbatch_size}; go on with ranks = {ranks}, or set out to a new directory"
            )
        tokens += now * train.sequence_length


def _text(state: Run) -> claim.Text:
    return claim.text_of(state.tokenizer, state.train_store, state.held_out_store)
