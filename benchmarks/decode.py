"""Decoding: time of one step (model, head, arg max) after a context, beside transformers and beside the floor.

The context is prefilled once and copied to every sequence; then each step adds one token to each. The tokens are
drawn beforehand, the same for both sides: with untrained weights, greedy chains of two programs would part at the
first tie and meet other experts. The arg max is computed and read all the same.

Floor: the weights a step meets and the cache it reads, over the measured read rate. A step of several sequences
meets the experts that any of them chose, counted as if chosen evenly. A small model's weights stay in part in the
last-level cache from one step to the next, so the floor is not a bound to the last percent.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from typing import Annotated, Any

import torch
import typer
from _machine import Ceilings, measure_ceilings, use_threads
from _sides import Build, Case, Lap, Series, Turn, append_rows, print_table, ratio, take_turns
from _transformers import Rival, build_ours, build_rival, parse_rival
from torch import Tensor
from transformers import DynamicCache, StaticCache

from dovetail.catalog.presets import load_model
from dovetail.cost.count import cache_bytes_per_token, layer_parameters, parameters
from dovetail.engine.steps.cache import contiguous_cache
from dovetail.engine.steps.rows import Chunk
from dovetail.engine.steps.runner import Runner
from dovetail.numerics.cpu.allocator import keep_freed_memory
from dovetail.spec.model import ModelSpec

OURS = "dovetail"
CONTEXTS, BATCHES = [1024, 4096], [1, 8]
RIVALS = ["eager+grouped_mm", "eager+grouped_mm+static", "eager+batched_mm+static", "eager+grouped_mm+malloc"]
STEPS = 12  # per turn,
TURN_SECONDS = 2.0  # or as many as fit, at least two
# The same shape in BF16 at batch 1 / 8 after 1,024 tokens, two cores like these; not measured in this run.
ELSEWHERE = "llama.cpp, measured elsewhere, other machine: 165-189 / 247-291 tokens/s at batch 1 / 8, context 1024"


def drawn_tokens(case: Case, vocab_size: int) -> tuple[Tensor, Tensor]:
    """Prompt [context] and the tokens of every step [STEPS, batch]."""
    generator = torch.Generator().manual_seed(0)
    context, batch = case
    prompt = torch.randint(vocab_size, (context,), generator=generator)
    return prompt, torch.randint(vocab_size, (STEPS, batch), generator=generator)


def timed_steps(step: Callable[[int], Tensor]) -> Lap:
    """step(i) -> logits [batch, vocab]; the check is the largest of step 0."""
    seconds: list[float] = []
    check = 0.0
    for i in range(STEPS):
        start = time.perf_counter()
        logits = step(i)
        logits.argmax(dim=-1).tolist()
        seconds.append(time.perf_counter() - start)
        if i == 0:
            check = float(logits.max())
        elif sum(seconds) > TURN_SECONDS:
            break
    return Lap(seconds=seconds, check=check)


@torch.no_grad()
def build_dovetail(spec: ModelSpec, cases: list[Case]) -> Turn:
    keep_freed_memory()
    model = build_ours(spec, torch.bfloat16)
    capacity = max(context for context, _ in cases) + STEPS
    cache = contiguous_cache(model.spec, max(batch for _, batch in cases), capacity, torch.bfloat16)
    runner = Runner(model, cache)
    filled: list[int] = []

    @torch.no_grad()
    def turn(case: Case) -> Lap:
        context, batch = case
        prompt, tokens = drawn_tokens(case, spec.vocab_size)
        if filled != [context]:
            runner.prompt([Chunk(0, 0, prompt.tolist())])
            cache.data[:, 1:] = cache.data[:, :1]
            filled[:] = [context]
        slots = torch.arange(batch)

        def step(i: int) -> Tensor:
            return runner.logits(runner.step(tokens[i], slots, torch.full((batch,), context + i)))

        return timed_steps(step)

    return turn


def build_theirs(spec: ModelSpec, rival: Rival) -> Turn:
    model = build_rival(spec, rival, torch.bfloat16).eval()
    forward = torch.compile(model) if rival.is_compiled else model
    prefilled: dict[int, DynamicCache] = {}

    @torch.no_grad()
    def turn(case: Case) -> Lap:
        context, batch = case
        prompt, tokens = drawn_tokens(case, spec.vocab_size)
        if context not in prefilled:
            prefilled.clear()
            prefilled[context] = DynamicCache(config=model.config)
            model(prompt[None], past_key_values=prefilled[context], use_cache=True, logits_to_keep=1)
        cache = copied(prefilled[context], batch)
        if rival.has_static_cache:
            static: Any = StaticCache(config=model.config, max_cache_len=context + STEPS)
            for index, layer in enumerate(cache.layers):
                static.update(layer.keys, layer.values, index)
            cache = static

        def step(i: int) -> Tensor:
            logits: Tensor = forward(tokens[i][:, None], past_key_values=cache, use_cache=True).logits[:, -1]
            return logits

        return timed_steps(step)

    return turn


def copied(cache: DynamicCache, batch: int) -> Any:
    """Of one sequence, for `batch` of them."""
    cache = copy.deepcopy(cache)
    cache.batch_repeat_interleave(batch)
    return cache


def floor_bytes(spec: ModelSpec, case: Case) -> tuple[float, float]:
    """Of weights, of cache; BF16 throughout (the gate's FP32 and the norms are below a percent)."""
    context, batch = case
    count, moe = parameters(spec), spec.moe
    weights = float(count.active)
    if moe is not None:
        routed = sum(layer_parameters(spec, layer).routed_experts for layer in range(spec.num_hidden_layers))
        chosen = moe.num_experts_per_tok / moe.n_routed_experts
        weights += routed * (1 - (1 - chosen) ** batch - chosen)
    return 2 * weights, float(batch * context * cache_bytes_per_token(spec))


def main(
    model: Annotated[str, typer.Option(help="A preset: 20m, 104m, ...")] = "104m",
    context: Annotated[list[int], typer.Option(help="Tokens in the cache; may be repeated.")] = CONTEXTS,
    batch: Annotated[list[int], typer.Option(help="Sequences; may be repeated.")] = BATCHES,
    rival: Annotated[
        list[str], typer.Option(help="eager|sdpa + grouped_mm|loop|batched_mm [+ static] [+ malloc] [+ compiled]")
    ] = RIVALS,
    ours_only: bool = False,
    warmup: int = 1,
    repeats: int = 3,
    threads: int | None = None,
    record: bool = True,
) -> None:
    use_threads(threads)
    spec = load_model(model)
    cases: list[Case] = [(tokens, sequences) for tokens in context for sequences in batch]
    builds: dict[str, Build] = {OURS: partial(build_dovetail, spec, cases)}
    builds |= {each.name: partial(build_theirs, spec, each) for each in map(parse_rival, [] if ours_only else rival)}
    ceilings = measure_ceilings()
    results = take_turns(builds, cases, warmup, repeats)
    print(f"decode step, {model}, BF16; {ceilings}")
    report(spec, model, cases, ceilings, results, record)
    print(ELSEWHERE)


def report(
    spec: ModelSpec,
    model: str,
    cases: list[Case],
    ceilings: Ceilings,
    results: dict[tuple[str, Case], Series],
    record: bool,
) -> None:
    lines, rows = [], []
    for (name, case), series in results.items():
        context, batch = case
        weights, cached = floor_bytes(spec, case)
        floor = (weights + cached) / ceilings.read_bytes_per_s
        times_ours = ratio(series, results[OURS, case])
        rate, share = batch / series.median, floor / series.median
        cells = [f"{series.median * 1e3:.2f}", f"{min(series.seconds) * 1e3:.2f}", f"{rate:,.0f}", str(times_ours)]
        cells += [f"{floor * 1e3:.2f}", f"{share:.0%}", f"{series.laps[0].check:.3f}"]
        lines.append([name, str(context), str(batch), *cells])
        row = {"model": model, "context": context, "batch": batch, "side": name, **series.summary()}
        row |= {"tokens_per_s": round(rate, 1), "times_dovetail": asdict(times_ours), "floor_s": floor}
        row |= {"floor_weight_bytes": weights, "floor_cache_bytes": cached}
        rows.append({**row, "share_of_floor": round(share, 4), "ceilings": asdict(ceilings)})
    columns = ["side", "context", "batch", "ms/step", "min", "tokens/s", "time / dovetail"]
    print_table([*columns, "floor ms", "of floor", "check"], lines)
    if record:
        append_rows("decode", rows)


if __name__ == "__main__":
    typer.run(main)
