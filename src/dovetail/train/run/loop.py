"""A training run from its run file: `train(config)` starts it or continues it.

Everything that decides a step is in the checkpoint or is a function of the step's number, so a run that was
stopped, or killed, and started again has bit for bit the weights of one that was not (on the same machine with
the same number of threads).
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path

from rich.console import Console
from torch import Tensor

from dovetail.cost.count import training_flop_per_token
from dovetail.numerics.cpu.process import settle_process
from dovetail.spec.model import ModelSpec
from dovetail.text.corpus import read_batch
from dovetail.train.layout.ranks import Guard, any_rank, first_rank_first, local_device, process_group, rank_and_world
from dovetail.train.report.display import Display
from dovetail.train.report.health import Watched, watch
from dovetail.train.report.metrics import HealthMetrics, StepMetrics
from dovetail.train.report.peak import Peak, measure_peak
from dovetail.train.report.ranks import of_ranks, write_traffic
from dovetail.train.report.reporter import Reporter
from dovetail.train.run import checkpoint, claim, run_file
from dovetail.train.run.budget import budget_line, pace_of, step_seconds
from dovetail.train.run.checks import check_run
from dovetail.train.run.evaluate import evaluate, evaluate_if_missing
from dovetail.train.run.run_file import RunConfig
from dovetail.train.run.state import Counters, Run, resume, save
from dovetail.train.run.stop import Diverged, Interrupted, stop_signals
from dovetail.train.run.team import form_team
from dovetail.train.step.ema import Ema
from dovetail.train.step.schedule import Position, Values, values
from dovetail.train.step.step import Objective, StepResult, microbatches, team_step


def train(
    config: RunConfig,
    display: Display | None = None,
    accept_changed_text: bool = False,
    ends_at: float = math.inf,
) -> Run:
    """Train to the end of the budget, resuming from the newest whole checkpoint in `config.out`.

    A budget of minutes is cut short where it would go past `ends_at`, a time of `time.monotonic`.
    Raises ValueError for settings that cannot work, for a run that another process trains, and, unless
    `accept_changed_text` is set, for one whose text changed; Interrupted on Ctrl-C (the run is saved), Diverged, and
    CheckpointError if the disk gives out.
    """
    settle_process()
    with process_group(config.layout.deadline) as guard, guard(_leave), claim.only_run(config.out):
        if display is None or rank_and_world()[0] > 0:
            display = Display("dovetail train", 1, Console(stderr=True, highlight=False, quiet=rank_and_world()[0] > 0))
        try:
            with guard(partial(_leave, display)):
                state = prepare(config, display, accept_changed_text, ends_at)
                checkpointer = checkpoint.Checkpointer(config.out / "checkpoints", config.train.keep_checkpoints)
                counters = resume(state, checkpointer.root, accept_changed_text)
            display.num_steps = state.num_steps
            _loop(state, counters, checkpointer, display, guard)
        finally:
            display.close()
    return state


def prepare(config: RunConfig, display: Display, accept_changed_text: bool, ends_at: float) -> Run:
    """Text, tokens, model and budget: everything up to the first step. Rank 0 writes files, the others read them."""
    device = local_device()
    spec = run_file.resolve_model(config.model)
    schedule = run_file.resolve_schedule(config)
    with first_rank_first():
        is_held_out = check_run(config, spec, display.message)
        if not accept_changed_text:
            claim.check_sources(config)
        claim.claim(config, spec)
        tokenizer = run_file.prepare_tokenizer(config, spec, display.message)
        train_store, held_out_store = run_file.prepare_stores(config, tokenizer, is_held_out, display.message)

    def measure() -> float:
        return step_seconds(config, schedule, run_file.build_model(config, device), train_store)

    pace = pace_of(config, measure, display.message, ends_at)
    microbatches = config.layout.multiple(rank_and_world()[1])
    display.message(budget_line(config.train, schedule, train_store, pace.num_steps, microbatches))
    team = form_team(config, spec, schedule, pace.num_steps, device)
    optimizer = run_file.build_optimizer(config, team)
    masters = {name: slot.master for name, slot in optimizer.slots.items()}
    decay = config.train.ema_decay
    # Beside the step on a GPU; a CPU has no cores to spare, so there it is a part of the step.
    ema = None if decay is None else Ema(masters, decay, in_background=device.type == "cuda")
    return Run(
        config=config,
        spec=spec,
        schedule=schedule,
        tokenizer=tokenizer,
        train_store=train_store,
        held_out_store=held_out_store,
        team=team,
        optimizer=optimizer,
        ema=ema,
        pace=pace,
        peak=_peak(config, spec, next(team.models[0].parameters())),
    )


def _peak(config: RunConfig, spec: ModelSpec, weight: Tensor) -> Peak:
    """What MFU is a share of: square products and, on a CPU, the model's own, which may be the faster ones there."""
    rows = config.train.microbatch_size * config.train.sequence_length
    own = [(rows, spec.hidden_size, width) for width in (spec.intermediate_size, spec.vocab_size)]
    return Peak(partial(measure_peak, weight.dtype, weight.device, () if weight.is_cuda else own))


def _loop(
    state: Run, counters: Counters, checkpointer: checkpoint.Checkpointer, display: Display, guard: Guard
) -> None:
    config = state.config
    state.pace.start(counters.step, counters.seconds)
    if counters.step:
        display.message(f"going on after step {counters.step} of {state.num_steps}")
    is_first = rank_and_world()[0] == 0
    tensorboard, pp = config.train.tensorboard, config.layout.pp
    reporter = Reporter(config.out, counters.step, display, tensorboard, pp) if is_first else None
    try:
        with stop_signals() as received, guard(partial(_leave, display, counters)):
            _steps(state, counters, checkpointer, reporter, received)
            checkpointer.wait()
            try:
                evaluate_if_missing(state, counters, reporter, received, is_whole=True)
            except Interrupted:
                again = "the run is saved, and the same command measures it on held-out text"
                raise Interrupted(f"stopped after step {counters.step} of {state.num_steps}; {again}") from None
            if (told := state.team.told()) and is_first:
                write_traffic(config.out / "traffic.json", told)
    finally:
        checkpointer.close()
        if reporter is not None:
            reporter.close()


def _leave(display: Display | None = None, counters: Counters | None = None) -> str:
    """The last state stays on the screen; returns where the run is, as the opening of a message."""
    if display is not None:
        display.close()
    return f"step {counters.step + 1}, " if counters else "before the first step, "


def _steps(
    state: Run,
    counters: Counters,
    checkpointer: checkpoint.Checkpointer,
    reporter: Reporter | None,
    received: Sequence[int],
) -> None:
    """Take the steps that are still to come, and report, measure and save what is due after each."""
    train = state.config.train
    if 0 < counters.step < state.num_steps and _is_due(train.evaluate_every, counters.step):
        evaluate_if_missing(state, counters, reporter, received)
    while counters.step < state.num_steps:
        metrics, health, seconds = _one_step(state, counters)
        if reporter is not None:
            reporter.write(metrics)
            reporter.write_health(health)
            reporter.write_stragglers(metrics.step, seconds)
        if counters.bad_in_a_row >= train.max_bad_steps:
            checkpointer.wait()
            raise Diverged(_diverged(counters, checkpointer.root))
        is_last, is_stopped = counters.step == state.num_steps, any_rank(bool(received))
        if _is_due(train.evaluate_every, counters.step) and not is_last and not is_stopped:
            try:  # before the save, so that a saved step has its figure
                evaluate(state, counters, reporter, received)
            except Interrupted:
                is_stopped = True
        is_good = counters.bad_in_a_row == 0  # amid bad steps, the checkpoint before them is kept
        if is_last or is_stopped or (is_good and _is_due(train.checkpoint_every, counters.step)):
            if reporter is not None:
                reporter.sync()
            save(state, counters, checkpointer)
        if is_stopped and not is_last:
            checkpointer.wait()
            raise Interrupted(f"stopped after step {counters.step} of {state.num_steps}; the run is saved")
        if reporter is not None and (change := state.pace.look(counters.step)):
            reporter.display.num_steps = state.num_steps
            reporter.display.message(change)


def advance(state: Run, counters: Counters) -> tuple[StepResult, Values]:
    """Take the next step of a run on this rank's share of the batch, and count it."""
    train = state.config.train
    team = state.team
    team.begin(counters.step + 1)
    at = Position(step=counters.step + 1, tokens=counters.tokens, fraction=state.pace.fraction(counters.step + 1))
    now = values(state.schedule, at, state.batch_multiple)
    batch = read_batch(
        state.train_store,
        train.sequence_length,
        train.seed,
        counters.samples,
        now.batch_size,
        team.index,
        team.num_shares,
    )
    objective = Objective(balance_alpha=train.balance_alpha, separate_documents=train.separate_documents)
    result = team_step(team, state.optimizer, microbatches(batch, train.microbatch_size), now, objective, state.ema)
    counters.step += 1
    counters.tokens += now.batch_size * train.sequence_length
    counters.samples += now.batch_size
    counters.skipped += not result.is_finite
    counters.bad_in_a_row = 0 if result.is_finite else counters.bad_in_a_row + 1
    return result, now


def _one_step(state: Run, counters: Counters) -> tuple[StepMetrics, list[HealthMetrics], list[float]]:
    """What is reported of the next step, and how long each rank worked in it."""
    start = time.perf_counter()
    train = state.config.train
    is_watched = _is_due(train.health_every, counters.step + 1)
    with watch(state.team.models) if is_watched else nullcontext(dict[str, Watched]()) as layers:
        result, now = advance(state, counters)
    seconds = time.perf_counter() - start
    num_tokens = now.batch_size * train.sequence_length
    flop = training_flop_per_token(state.spec, train.sequence_length, mtp=True)
    mfu = state.peak.share(flop * num_tokens / seconds / rank_and_world()[1])
    health = [
        HealthMetrics(step=counters.step, layer=layer, operand=operand, **dataclasses.asdict(each))
        for layer, watched in layers.items()
        for operand, each in watched.health.items()
    ]
    return (
        _metrics(counters, result, now, num_tokens / seconds, mfu, seconds),
        health,
        [each.worked for each in result.told],
    )


def _metrics(
    counters: Counters, result: StepResult, now: Values, rate: float, mfu: float, seconds: float
) -> StepMetrics:
    return StepMetrics(
        step=counters.step,
        tokens=counters.tokens,
        loss=result.loss,
        mtp_loss=result.mtp_loss,
        mtp_losses=result.mtp_losses,
        balance_loss=result.balance_loss,
        grad_norm=result.grad_norm,
        learning_rate=now.learning_rate,
        batch_size=now.batch_size,
        gamma=now.gamma,
        mtp_weight=now.mtp_weight,
        tokens_per_second=rate,
        mfu=mfu,
        max_vio=result.max_vio,
        skipped=counters.skipped,
        seconds=seconds,
        rank_max_vio=result.rank_max_vio if result.told else [],
        **of_ranks(result.told),
    )


def _diverged(counters: Counters, root: Path) -> str:
    return (
        f"{counters.bad_in_a_row} steps in a row, up to step {counters.step}, had a loss or gradient that is not "
        f"finite; the last good checkpoint is {checkpoint.latest(root) or 'none'}. Lower train.learning_rate, or look "
        f"at the data before sample {counters.samples}"
    )


def _is_due(every: int | None, step: int) -> bool:
    return every is not None and step % every == 0
