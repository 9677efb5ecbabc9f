"""What a run is made of, where it is, and what of it a checkpoint holds."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dovetail.model.transformer import Transformer
from dovetail.spec.model import ModelSpec
from dovetail.text.shards import TokenStore
from dovetail.text.tokenizer import Tokenizer
from dovetail.train.layout.ranks import rank_and_world
from dovetail.train.report.peak import Peak
from dovetail.train.run import checkpoint, claim
from dovetail.train.run.budget import Pace
from dovetail.train.run.run_file import RunConfig
from dovetail.train.step.ema import Ema
from dovetail.train.step.optim import AdamW
from dovetail.train.step.schedule import Position, TrainingSchedule, values
from dovetail.train.step.team import Team


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
    team: Team
    optimizer: AdamW
    ema: Ema | None
    pace: Pace
    peak: Peak

    @property
    def num_steps(self) -> int:
        return self.pace.num_steps

    @property
    def model(self) -> Transformer:
        """What this rank has of the model; of several stages the first."""
        return self.team.models[0]

    @property
    def batch_multiple(self) -> int:
        """What batches are a multiple of, in sequences."""
        return self.config.train.microbatch_size * self.config.layout.multiple(rank_and_world()[1])


def state_of(state: Run) -> dict[str, Any]:
    """The tensors of a checkpoint, or this rank's pieces of them, by the names that they have in the whole."""
    buffers = {name: buffer for model in state.team.models for name, buffer in model.named_buffers()}
    tensors = {"optimizer": state.optimizer.state(), "buffers": buffers}
    if state.ema is None:
        return tensors
    ema = state.ema.state()
    return {**tensors, "ema": {**ema, "average": state.optimizer.placed(state.ema.average)}}


def save(state: Run, counters: Counters, checkpointer: checkpoint.Checkpointer) -> None:
    counters.seconds = state.pace.seconds
    extra = {"counters": dataclasses.asdict(counters), "updates": state.optimizer.updates, claim.TEXT: _text(state)}
    checkpointer.save(counters.step, state_of(state), {**extra, "batch_multiple": state.batch_multiple})


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
    state.team.gather()
    counters = Counters(**extra["counters"])
    former = extra.get("ranks", 1) * state.config.train.microbatch_size  # as earlier versions said it
    _check_batches(state, counters, extra.get("batch_multiple", former))
    return counters


def _check_batches(state: Run, counters: Counters, former: int) -> None:
    """Raise ValueError if a step still to come would have another batch size than with the `former` multiple."""
    train, here, tokens = state.config.train, state.batch_multiple, counters.tokens
    for step in range(counters.step + 1, state.num_steps + 1) if here != former else ():
        at = Position(step=step, tokens=tokens, fraction=state.pace.fraction(step))
        before, now = (values(state.schedule, at, each).batch_size for each in (former, here))
        if before != now:
            raise ValueError(
                f"{state.config.out}: step {step} would have a batch of {now}, a multiple of {here}, and on the former "
                f"ranks it would have {before}, a multiple of {former}: batches are multiples of train.microbatch_size "
                f"= {train.microbatch_size} times the ranks with data of their own; go on with the former layout, or "
                "set out to a new directory"
            )
        tokens += now * train.sequence_length


def _text(state: Run) -> claim.Text:
    return claim.text_of(state.tokenizer, state.train_store, state.held_out_store)
