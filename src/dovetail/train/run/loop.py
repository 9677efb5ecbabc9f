"""A training run from its run file: `train(config)` starts it or continues it.

Everything that decides a step is in the checkpoint or is a function of the step's number, so a run that was
stopped, or killed, and started again has bit for bit the weights of one that was not (on the same machine with
the same number of threads).
"""

from __future__ import annotations

import dataclasses
import time
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from torch import Tensor

from dovetail.catalog.precision import load_recipe
from dovetail.cost.count import training_flop_per_token
from dovetail.model.transformer import Transformer, initialize
from dovetail.numerics.cpu.process import settle_process
from dovetail.spec.model import ModelSpec
from dovetail.text.corpus import read_batch
from dovetail.text.shards import TokenStore
from dovetail.text.tokenizer import Tokenizer
from dovetail.train.report.display import Display
from dovetail.train.report.health import Watched, watch
from dovetail.train.report.health_table import summary_line
from dovetail.train.report.metrics import (
    HealthMetrics,
    HeldOutMetrics,
    MetricsLog,
    StepMetrics,
    WholeHeldOutMetrics,
    read_metrics,
)
from dovetail.train.run import checkpoint, claim, run_file
from dovetail.train.run.budget import budget_line, steps_in_time
from dovetail.train.run.checks import check_run
from dovetail.train.run.evaluate import held_out
from dovetail.train.run.peak import measure_peak
from dovetail.train.run.ranks import any_rank, first_rank_first, local_device, process_group, rank_and_world
from dovetail.train.run.run_file import RunConfig
from dovetail.train.run.stop import Diverged, Interrupted, stop_signals
from dovetail.train.step.ema import Ema
from dovetail.train.step.optim import AdamW
from dovetail.train.step.schedule import Position, TrainingSchedule, Values, values
from dovetail.train.step.step import Objective, StepResult, microbatches, train_step


@dataclass(slots=True)
class Counters:
    """Where the run is; the JSON half of a checkpoint."""

    step: int = 0
    tokens: int = 0
    samples: int = 0
    skipped: int = 0
    bad_in_a_row: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """All that stays the same from step to step."""

    config: RunConfig
    spec: ModelSpec
    schedule: TrainingSchedule
    tokenizer: Tokenizer
    train_store: TokenStore
    held_out_store: TokenStore | None
    model: Transformer
    optimizer: AdamW
    ema: Ema | None
    num_steps: int
    peak: float  # FLOP/s, measured


def train(config: RunConfig, display: Display | None = None, accept_changed_text: bool = False) -> Run:
    """Train to the end of the budget, resuming from the newest whole checkpoint in `config.out`.

    Raises ValueError for settings that cannot work, for a run that another process trains, and, unless
    `accept_changed_text` is set, for one whose text changed; Interrupted on Ctrl-C (the run is saved), Diverged, and
    CheckpointError if the disk gives out.
    """
    settle_process()
    with process_group(), claim.only_run(config.out):
        if display is None or rank_and_world()[0] > 0:
            display = Display("dovetail train", 1, Console(stderr=True, highlight=False, quiet=rank_and_world()[0] > 0))
        try:
            state = prepare(config, display, accept_changed_text)
            display.num_steps = state.num_steps
            _loop(state, display, accept_changed_text)
        finally:
            display.close()
    return state


def prepare(config: RunConfig, display: Display, accept_changed_text: bool) -> Run:
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
    model = run_file.build_model(config, device)
    num_steps = config.train.steps or steps_in_time(config, schedule, model, train_store, display)
    display.message(budget_line(config.train, schedule, train_store, num_steps))
    initialize(model, config.train.seed)
    moments = load_recipe(config.train.precision).moments
    optimizer = AdamW(model.named_parameters(), config.optimizer, moments)
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
        model=model,
        optimizer=optimizer,
        ema=ema,
        num_steps=num_steps,
        peak=measure_peak(model.embed_tokens.weight.dtype, device),
    )


def state_of(state: Run) -> dict[str, dict[str, Tensor] | dict[str, dict[str, Tensor]]]:
    """The tensors of a checkpoint."""
    tensors = {"optimizer": state.optimizer.state(), "buffers": dict(state.model.named_buffers())}
    return tensors if state.ema is None else {**tensors, "ema": state.ema.state()}


def _text(state: Run) -> claim.Text:
    return claim.text_of(state.tokenizer, state.train_store, state.held_out_store)


def resume(state: Run, root: Path, accept_changed_text: bool) -> Counters:
    """Fill the state from the newest whole checkpoint, if there is one."""
    newest = checkpoint.latest(root)
    if newest is None:
        return Counters()
    extra = checkpoint.load_checkpoint(newest, state_of(state))
    if not accept_changed_text:
        claim.check_text(state.config.out, checkpoint.step_of(newest), extra.get(claim.TEXT), _text(state))
    state.optimizer.updates = extra["updates"]
    state.optimizer.refresh_parameters()
    return Counters(**extra["counters"])


def _loop(state: Run, display: Display, accept_changed_text: bool) -> None:
    config, root = state.config, state.config.out / "checkpoints"
    is_first = rank_and_world()[0] == 0
    checkpointer = checkpoint.Checkpointer(root, config.train.keep_checkpoints)
    counters = resume(state, root, accept_changed_text)
    if counters.step:
        display.message(f"going on after step {counters.step} of {state.num_steps}")
    log = MetricsLog(config.out / "metrics.jsonl", counters.step) if is_first else None
    try:
        with stop_signals() as received:
            while counters.step < state.num_steps:
                metrics, health = _one_step(state, counters)
                if log is not None:
                    log.write(metrics)
                    display.update(metrics)
                    for each in health:
                        log.write(each)
                    if health:
                        display.message(summary_line(health))
                if counters.bad_in_a_row >= config.train.max_bad_steps:
                    checkpointer.wait()
                    raise Diverged(_diverged(counters, root))
                is_last = counters.step == state.num_steps
                every = config.train.evaluate_every
                if log is not None and (_is_due(every, counters.step) or (is_last and every is not None)):
                    _evaluate(state, counters, log, display)  # before the save, so that a saved step has its figure
                is_good = counters.bad_in_a_row == 0  # amid bad steps, the checkpoint before them is kept
                is_stopped = any_rank(bool(received))
                if is_last or is_stopped or (is_good and _is_due(config.train.checkpoint_every, counters.step)):
                    _save(state, counters, checkpointer, log)
                if is_stopped and not is_last:
                    checkpointer.wait()
                    raise Interrupted(f"stopped after step {counters.step} of {state.num_steps}; the run is saved")
        checkpointer.wait()
        if log is not None and not _has_final_figure(log):
            _evaluate(state, counters, log, display, is_whole=True)
    finally:
        checkpointer.close()
        if log is not None:
            log.close()


def advance(state: Run, counters: Counters) -> tuple[StepResult, Values]:
    """Take the next step of a run on this rank's share of the batch, and count it."""
    train = state.config.train
    rank, world = rank_and_world()
    at = Position(step=counters.step + 1, tokens=counters.tokens, fraction=(counters.step + 1) / state.num_steps)
    now = values(state.schedule, at, batch_multiple=train.microbatch_size * world)
    batch = read_batch(
        state.train_store, train.sequence_length, train.seed, counters.samples, now.batch_size, rank, world
    )
    objective = Objective(balance_alpha=train.balance_alpha, separate_documents=train.separate_documents)
    result = train_step(
        state.model, state.optimizer, microbatches(batch, train.microbatch_size), now, objective, state.ema
    )
    counters.step += 1
    counters.tokens += now.batch_size * train.sequence_length
    counters.samples += now.batch_size
    counters.skipped += not result.is_finite
    counters.bad_in_a_row = 0 if result.is_finite else counters.bad_in_a_row + 1
    return result, now


def _one_step(state: Run, counters: Counters) -> tuple[StepMetrics, list[HealthMetrics]]:
    start = time.perf_counter()
    train = state.config.train
    is_watched = _is_due(train.health_every, counters.step + 1)
    with watch(state.model) if is_watched else nullcontext(dict[str, Watched]()) as layers:
        result, now = advance(state, counters)
    seconds = time.perf_counter() - start
    num_tokens = now.batch_size * train.sequence_length
    flop = training_flop_per_token(state.spec, train.sequence_length, mtp=True)
    mfu = flop * num_tokens / seconds / (state.peak * rank_and_world()[1])
    health = [
        HealthMetrics(step=counters.step, layer=layer, operand=operand, **dataclasses.asdict(each))
        for layer, watched in layers.items()
        for operand, each in watched.health.items()
    ]
    return _metrics(counters, result, now, num_tokens / seconds, mfu, seconds), health


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
    )


def _save(state: Run, counters: Counters, checkpointer: checkpoint.Checkpointer, log: MetricsLog | None) -> None:
    if log is not None:
        log.sync()
    extra = {"counters": dataclasses.asdict(counters), "updates": state.optimizer.updates, claim.TEXT: _text(state)}
    checkpointer.save(counters.step, state_of(state), extra)


def _evaluate(state: Run, counters: Counters, log: MetricsLog, display: Display, is_whole: bool = False) -> None:
    """Measure a point of the curve, on the same windows each time, or the final figure, on all held-out text."""
    if state.held_out_store is None:
        return
    train = state.config.train
    windows = None if is_whole else train.evaluate_windows
    loss, bits = held_out(state.model, state.held_out_store, train.sequence_length, train.microbatch_size, windows)
    kind = WholeHeldOutMetrics if is_whole else HeldOutMetrics
    metrics = kind(step=counters.step, tokens=counters.tokens, loss=loss, bits_per_byte=bits)
    log.write(metrics)
    display.update(metrics)


def _has_final_figure(log: MetricsLog) -> bool:
    """It is measured after the last checkpoint, so that a run may have been stopped before it."""
    return any(isinstance(each, WholeHeldOutMetrics) for each in read_metrics(log.path))


def _diverged(counters: Counters, root: Path) -> str:
    return (
        f"{counters.bad_in_a_row} steps in a row, up to step {counters.step}, had a loss or gradient that is not "
        f"finite; the last good checkpoint is {checkpoint.latest(root) or 'none'}. Lower train.learning_rate, or look "
        f"at the data before sample {counters.samples}"
    )


def _is_due(every: int | None, step: int) -> bool:
    return every is not None and step % every == 0
