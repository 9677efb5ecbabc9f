"""A training step, a prefill and decoding, alone and beside a busy process, dovetail and transformers in turn.

The busy process multiplies matrices on as many threads as there are cores, in a session of its own, so that the kernel
gives it an equal share of them: on a fair machine everything takes twice as long beside it. It is stopped (SIGSTOP)
while a side is measured alone. Each side runs with what it sets for itself: dovetail calls
`dovetail.threads.prepare`, as its command line does, transformers runs under OpenMP's defaults, and "dovetail as a
library" under the same, after its `settle_process`.
"""

from __future__ import annotations

import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Annotated

import prefill
import torch
import training_step
import typer
from _sides import Build, Case, Lap, Series, Turn, append_rows, print_table, ratio, take_turns, timed
from _transformers import Rival, build_ours, build_rival
from torch import Tensor
from transformers import DynamicCache

from dovetail import threads
from dovetail.catalog.presets import load_model
from dovetail.engine.steps.cache import contiguous_cache
from dovetail.engine.steps.rows import Chunk
from dovetail.engine.steps.runner import Runner
from dovetail.numerics.cpu.process import settle_process
from dovetail.spec.model import ModelSpec

HOG = """
import torch
left = torch.randn(1024, 1024)
while True:
    left @ left
"""
WORKS = ["training step", "prefill", "decoding"]
OURS, LIBRARY, THEIRS = "dovetail", "dovetail as a library", "transformers"
STEP: Case = (4, 256, 0)  # sequences, tokens of each, and fresh ones every time
PROMPT, NEW_TOKENS = 512, 64
SETTLE, MEASURE = 0.5, 1.0  # seconds of each turn


def build(spec: ModelSpec, is_ours: bool, hog: int | None) -> Turn:
    """The three works of one side; beside process `hog` if there is one."""
    if is_ours:
        settle_process()
    works = ours(spec) if is_ours else theirs(spec)

    def turn(case: Case) -> Lap:
        work = works[case[0]]
        if hog is not None:
            os.kill(hog, signal.SIGCONT)
        try:
            repeat(work, SETTLE)  # the kernel needs a while to find every thread its place
            return repeat(work, MEASURE)
        finally:
            if hog is not None:
                os.kill(hog, signal.SIGSTOP)

    return turn


def repeat(work: Callable[[], Lap], least: float) -> Lap:
    """Laps of `work` for `least` seconds, as one."""
    laps, end = [work()], time.perf_counter() + least
    while time.perf_counter() < end:
        laps.append(work())
    return Lap(seconds=[second for lap in laps for second in lap.seconds], check=laps[0].check)


def ours(spec: ModelSpec) -> list[Callable[[], Lap]]:
    step = training_step.build_whole(spec, with_mtp=False)
    prompt = prefill.build_dovetail(spec, PROMPT)
    model = build_ours(spec, torch.bfloat16)
    runner = Runner(model, contiguous_cache(model.spec, 1, PROMPT + NEW_TOKENS, torch.bfloat16))
    first, following = tokens_of(spec)
    runner.prompt([Chunk(0, 0, first.tolist())])

    @torch.no_grad()
    def decode() -> float:
        for i, token in enumerate(following):
            hidden = runner.step(token[None], torch.tensor([0]), torch.tensor([PROMPT + i]))
            logits = runner.logits(hidden)
            logits.argmax().item()
        return float(logits.max())

    return [lambda: step(STEP), lambda: prompt((PROMPT,)), lambda: timed(decode)]


def theirs(spec: ModelSpec) -> list[Callable[[], Lap]]:
    step = training_step.build_theirs(spec, Rival())
    prompt = prefill.build_theirs(spec, Rival(), PROMPT)
    model = build_rival(spec, Rival(), torch.bfloat16).eval()
    first, following = tokens_of(spec)

    @torch.no_grad()
    def decode(cache: DynamicCache) -> float:
        for token in following:
            logits = model(token[None, None], past_key_values=cache, use_cache=True).logits
            logits.argmax().item()
        return float(logits.max())

    @torch.no_grad()
    def decoding() -> Lap:
        cache = DynamicCache(config=model.config)
        model(first[None], past_key_values=cache, use_cache=True, logits_to_keep=1)
        return timed(lambda: decode(cache))

    return [lambda: step(STEP), lambda: prompt((PROMPT,)), decoding]


def tokens_of(spec: ModelSpec) -> tuple[Tensor, Tensor]:
    tokens = torch.randint(spec.vocab_size, (PROMPT + NEW_TOKENS,), generator=torch.Generator().manual_seed(0))
    return tokens[:PROMPT], tokens[PROMPT:]


def start_hog() -> subprocess.Popen[bytes]:
    """Start the busy process, stopped: OpenMP's defaults, whatever this process has."""
    plain = {name: value for name, value in os.environ.items() if name not in threads.SETTINGS}
    hog = subprocess.Popen([sys.executable, "-c", HOG], env=plain, start_new_session=True)
    time.sleep(5.0)  # it imports torch
    hog.send_signal(signal.SIGSTOP)
    return hog


def main(
    model: Annotated[str, typer.Option(help="A preset: quickstart, 20m, 104m, ...")] = "quickstart",
    ours_only: bool = False,
    warmup: int = 1,
    repeats: int = 6,
    record: bool = True,
) -> None:
    spec = load_model(model)
    environment = dict(os.environ)
    threads.prepare()
    prepared = {name: os.environ[name] for name in threads.SETTINGS if name in os.environ}
    plain = {name: environment[name] for name in threads.SETTINGS if name in environment}
    sides = {OURS: (True, prepared), LIBRARY: (True, plain)} | ({} if ours_only else {THEIRS: (False, plain)})
    builds: dict[str, Build] = {}
    environments = {}
    hog = start_hog()
    for name, (is_ours, settings) in sides.items():
        for where, process in ((name, None), (beside(name), hog.pid)):
            builds[where] = partial(build, spec, is_ours, process)
            environments[where] = settings
    try:
        results = take_turns(builds, [(i,) for i in range(len(WORKS))], warmup, repeats, environments)
    finally:
        hog.kill()
    report(model, results, list(sides), record)


def beside(name: str) -> str:
    return f"{name}, beside"


def report(model: str, results: dict[tuple[str, Case], Series], sides: list[str], record: bool) -> None:
    lines, rows = [], []
    for index, work in enumerate(WORKS):
        for name in sides:
            alone, busy = results[name, (index,)], results[beside(name), (index,)]
            times = busy.median / alone.median
            mean = statistics.mean(busy.seconds) / alone.median
            of_ours = ratio(busy, results[beside(OURS), (index,)])
            cells = [f"{each.median * 1e3:.1f}" for each in (alone, busy)]
            cells += [f"{times:.2f}", f"{mean:.2f}", f"{max(busy.seconds) * 1e3:.0f}", str(of_ours)]
            lines.append([f"{work}, {name}", *cells])
            row = {"model": model, "work": work, "side": name, "alone": alone.summary(), "beside": busy.summary()}
            rows.append({**row, "times_alone": round(times, 3), "mean_times_alone": round(mean, 3)})
    print_table(["", "alone ms", "beside ms", "times", "mean", "worst ms", "beside / dovetail beside"], lines)
    if record:
        append_rows("beside", rows)


if __name__ == "__main__":
    typer.run(main)
