"""Prefill: a prompt through the model into the cache, and the last position's logits, beside transformers.

Floor: forward FLOP of the prompt (dovetail.cost), the head's for one position only, at the measured BF16 rate.
"""

from __future__ import annotations

from dataclasses import asdict
from functools import partial
from typing import Annotated

import torch
import typer
from _machine import Ceilings, measure_ceilings, use_threads
from _sides import Build, Case, Series, Turn, append_rows, print_table, ratio, take_turns, timed
from _transformers import Rival, build_ours, build_rival, parse_rival
from torch import Tensor
from transformers import DynamicCache

from dovetail.catalog.presets import load_model
from dovetail.cost.count import attention_flop_per_token, parameters
from dovetail.engine.steps.cache import contiguous_cache
from dovetail.engine.steps.rows import Chunk
from dovetail.engine.steps.runner import Runner
from dovetail.numerics.cpu.allocator import keep_freed_memory
from dovetail.spec.model import ModelSpec

OURS = "dovetail"
RIVALS = ["eager+grouped_mm", "sdpa+grouped_mm", "eager+loop", "eager+grouped_mm+malloc"]
ELSEWHERE = "llama.cpp, measured elsewhere, other machine: 1,110-1,438 tokens/s at 1,024 tokens"


def prompt_of(length: int, vocab_size: int) -> Tensor:
    return torch.randint(vocab_size, (length,), generator=torch.Generator().manual_seed(0))


def build_dovetail(spec: ModelSpec, length: int) -> Turn:
    keep_freed_memory()
    model = build_ours(spec, torch.bfloat16)
    runner = Runner(model, contiguous_cache(model.spec, 1, length, torch.bfloat16))
    prompt_chunks = [Chunk(0, 0, prompt_of(length, spec.vocab_size).tolist())]

    @torch.no_grad()
    def prefill() -> float:
        return float(runner.logits(runner.prompt(prompt_chunks, [length - 1])).max())

    return lambda case: timed(prefill)


def build_theirs(spec: ModelSpec, rival: Rival, length: int) -> Turn:
    model = build_rival(spec, rival, torch.bfloat16).eval()
    forward = torch.compile(model) if rival.is_compiled else model
    prompt = prompt_of(length, spec.vocab_size)[None]

    @torch.no_grad()
    def prefill() -> float:
        cache = DynamicCache(config=model.config)
        return float(forward(prompt, past_key_values=cache, use_cache=True, logits_to_keep=1).logits.max())

    return lambda case: timed(prefill)


def floor_seconds(spec: ModelSpec, length: int, ceilings: Ceilings) -> float:
    count = parameters(spec)
    flop = length * (2.0 * count.active_body + attention_flop_per_token(spec, length)) + 2.0 * count.active_head
    return flop / ceilings.bf16_flop_per_s


def main(
    model: Annotated[str, typer.Option(help="A preset: 20m, 104m, ...")] = "104m",
    length: Annotated[int, typer.Option(help="Tokens of the prompt.")] = 1024,
    rival: Annotated[list[str], typer.Option(help="eager|sdpa + grouped_mm|loop [+ malloc] [+ compiled]")] = RIVALS,
    ours_only: bool = False,
    warmup: int = 2,
    repeats: int = 7,
    threads: int | None = None,
    record: bool = True,
) -> None:
    use_threads(threads)
    spec = load_model(model)
    rivals = [] if ours_only else [parse_rival(text) for text in rival]
    builds: dict[str, Build] = {OURS: partial(build_dovetail, spec, length)}
    builds |= {each.name: partial(build_theirs, spec, each, length) for each in rivals}
    ceilings = measure_ceilings()
    case: Case = (length,)
    results = take_turns(builds, [case], warmup, repeats)
    print(f"prefill, {model}, BF16, {length} tokens, batch 1; {ceilings}")
    report(spec, model, case, ceilings, {name: results[name, case] for name in builds}, record)
    print(ELSEWHERE)


def report(
    spec: ModelSpec, model: str, case: Case, ceilings: Ceilings, results: dict[str, Series], record: bool
) -> None:
    (length,) = case
    floor = floor_seconds(spec, length, ceilings)
    lines, rows = [], []
    for name, series in results.items():
        times_ours = ratio(series, results[OURS])
        rate, share = length / series.median, floor / series.median
        cells = [f"{series.median * 1e3:.0f}", f"{min(series.seconds) * 1e3:.0f}", f"{rate:,.0f}", str(times_ours)]
        lines.append([name, *cells, f"{floor * 1e3:.0f}", f"{share:.0%}", f"{series.laps[0].check:.3f}"])
        row = {"model": model, "length": length, "batch": 1, "side": name, **series.summary()}
        row |= {"tokens_per_s": round(rate, 1), "times_dovetail": asdict(times_ours), "floor_s": floor}
        rows.append({**row, "share_of_floor": round(share, 4), "ceilings": asdict(ceilings)})
    print_table(["side", "ms", "min", "tokens/s", "time / dovetail", "floor ms", "of floor", "check"], lines)
    if record:
        append_rows("prefill", rows)


if __name__ == "__main__":
    typer.run(main)
