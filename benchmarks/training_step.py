"""One training step (forward, backward, clip, AdamW): tokens per second beside transformers, and beside the floor.

Like for like: no balancing, no MTP; then what these cost on top, which transformers does not do. Both sides start
from the same weights and see the same random tokens, a fresh batch each step (with a repeated one expert row counts
repeat too, which hides the set-up that a CPU GEMM pays for each new one). transformers trains FP32 weights under
BF16 autocast with fused AdamW; dovetail BF16 compute copies of FP32 masters, BF16 moments.

Floor: training FLOP (dovetail.cost) at the measured BF16 rate, plus the optimizer's bytes at the measured copy rate.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from typing import Annotated

import torch
import typer
from _machine import Ceilings, measure_ceilings, use_threads
from _sides import Build, Case, Lap, Series, Turn, append_rows, print_table, ratio, take_turns, timed
from _transformers import Rival, build_ours, build_rival, parse_rival
from torch import Tensor

from dovetail.catalog.presets import load_model
from dovetail.cost.count import parameters, training_flop_per_token
from dovetail.numerics.cpu.allocator import keep_freed_memory
from dovetail.spec.model import ModelSpec
from dovetail.text.corpus import Batch
from dovetail.train.step.loss import token_loss
from dovetail.train.step.optim import AdamW, AdamWConfig
from dovetail.train.step.schedule import Values
from dovetail.train.step.step import Objective, train_step

VALUES = Values(learning_rate=1e-4, batch_size=8, gamma=1e-3, mtp_weight=0.3)
# Per parameter: gradient read twice (norm, update), master and both moments read and written, copy written.
OPTIMIZER_BYTES = 2 * 2 + 2 * (4 + 2 + 2) + 2
BARE, BALANCED, MTP = "dovetail", "dovetail + balancing", "dovetail + balancing + MTP"
RIVALS = ["eager+grouped_mm", "sdpa+grouped_mm", "eager+grouped_mm+malloc"]


def turns(step: Callable[[Tensor], float], vocab_size: int) -> Turn:
    """`step` on new tokens each time; making them is not timed."""
    steps = itertools.count()

    def turn(case: Case) -> Lap:
        tokens = tokens_of(next(steps), case, vocab_size)
        return timed(lambda: step(tokens))

    return turn


def tokens_of(step: int, case: Case, vocab_size: int) -> Tensor:
    """[B, T + 1] int64, the same for every side."""
    batch, length, is_repeated = case
    generator = torch.Generator().manual_seed(0 if is_repeated else step)
    return torch.randint(vocab_size, (batch, length + 1), generator=generator)


def build_bare(spec: ModelSpec) -> Turn:
    keep_freed_memory()
    model = build_ours(spec, torch.bfloat16)
    optimizer = AdamW(model.named_parameters(), AdamWConfig())
    weights = dict(model.named_parameters())

    def step(tokens: Tensor) -> float:
        loss = token_loss(model(tokens[:, :-1].contiguous()).hidden, model.head_weight, tokens[:, 1:])
        loss.backward()  # type: ignore[no-untyped-call]
        gradients = {name: weight.grad for name, weight in weights.items() if weight.grad is not None}
        norm = optimizer.grad_norm(gradients)
        optimizer.step(gradients, VALUES.learning_rate, min(1.0, 1.0 / (norm + 1e-6)))
        for weight in weights.values():
            weight.grad = None
        return float(loss)

    return turns(step, spec.vocab_size)


def build_whole(spec: ModelSpec, with_mtp: bool) -> Turn:
    keep_freed_memory()
    model = build_ours(spec, torch.bfloat16, with_mtp)
    optimizer = AdamW(model.named_parameters(), AdamWConfig())

    def step(tokens: Tensor) -> float:
        batch = Batch(tokens=tokens, document_ids=torch.zeros_like(tokens, dtype=torch.int32))
        return train_step(model, optimizer, [batch], VALUES, Objective()).loss

    return turns(step, spec.vocab_size)


def build_theirs(spec: ModelSpec, rival: Rival) -> Turn:
    model = build_rival(spec, rival, torch.float32).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=VALUES.learning_rate, betas=(0.9, 0.95), fused=True)
    forward = torch.compile(model) if rival.is_compiled else model

    def step(tokens: Tensor) -> float:
        inputs = tokens[:, :-1].contiguous()
        targets = tokens[:, 1:].contiguous()
        with torch.autocast("cpu", torch.bfloat16):
            loss = forward(input_ids=inputs, labels=inputs, shift_labels=targets, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return float(loss)

    return turns(step, spec.vocab_size)


def floor_seconds(spec: ModelSpec, case: Case, ceilings: Ceilings, with_mtp: bool) -> tuple[float, float]:
    """Of the GEMMs and attention; of the optimizer."""
    flop = training_flop_per_token(spec, case[1], mtp=with_mtp) * case[0] * case[1]
    count = parameters(spec)
    weights = count.total_with_mtp if with_mtp else count.total
    return flop / ceilings.bf16_flop_per_s, weights * OPTIMIZER_BYTES / ceilings.copy_bytes_per_s


def main(
    model: Annotated[str, typer.Option(help="A preset: 20m, 104m, ...")] = "20m",
    batch: int = 8,
    length: int = 256,
    rival: Annotated[list[str], typer.Option(help="eager|sdpa + grouped_mm|loop [+ malloc] [+ compiled]")] = RIVALS,
    compile_rival: Annotated[bool, typer.Option("--compile", help="Add the first rival under torch.compile.")] = False,
    ours_only: bool = False,
    repeat_batch: Annotated[bool, typer.Option(help="The same tokens every step.")] = False,
    warmup: int = 2,
    repeats: int = 7,
    threads: int | None = None,
    record: bool = True,
) -> None:
    use_threads(threads)
    spec = load_model(model)
    rivals = [] if ours_only else [parse_rival(text) for text in rival + [rival[0] + "+compiled"] * compile_rival]
    builds: dict[str, Build] = {BARE: partial(build_bare, spec), BALANCED: partial(build_whole, spec, False)}
    if spec.num_nextn_predict_layers:
        builds[MTP] = partial(build_whole, spec, True)
    builds |= {each.name: partial(build_theirs, spec, each) for each in rivals}
    case = (batch, length, int(repeat_batch))
    ceilings = measure_ceilings()
    results = take_turns(builds, [case], warmup, repeats)
    report(spec, model, case, ceilings, {name: results[name, case] for name in builds}, record)


def report(
    spec: ModelSpec, model: str, case: Case, ceilings: Ceilings, results: dict[str, Series], record: bool
) -> None:
    tokens = case[0] * case[1]
    lines, rows = [], []
    for name, series in results.items():
        gemm, update = floor_seconds(spec, case, ceilings, name == MTP)
        times_ours = ratio(series, results[BARE])
        share = (gemm + update) / series.median
        cells = [f"{series.median * 1e3:.0f}", f"{min(series.seconds) * 1e3:.0f}", f"{tokens / series.median:,.0f}"]
        lines.append([name, *cells, str(times_ours), f"{share:.0%}", f"{series.laps[0].check:.4f}"])
        row = {"model": model, "batch": case[0], "length": case[1], "is_batch_repeated": bool(case[2]), "side": name}
        row |= {**series.summary(), "tokens_per_s": round(tokens / series.median, 1)}
        row |= {"times_dovetail": asdict(times_ours), "floor_gemm_s": gemm, "floor_optimizer_s": update}
        rows.append({**row, "share_of_floor": round(share, 4), "ceilings": asdict(ceilings)})
    gemm, update = floor_seconds(spec, case, ceilings, False)
    print(f"training step, {model}, batch {case[0]} x {case[1]}; {ceilings}")
    print(f"floor {(gemm + update) * 1e3:.0f} ms: GEMM {gemm * 1e3:.0f}, optimizer {update * 1e3:.0f}")
    print_table(["side", "ms", "min", "tokens/s", "time / dovetail", "of floor", "first loss"], lines)
    if record:
        append_rows("training_step", rows)


if __name__ == "__main__":
    typer.run(main)
