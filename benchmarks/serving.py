"""Serving over HTTP: the same seeded requests to every server in turn, at 1, 8 and 32 at once.

    python benchmarks/serving.py --rival-python VENV/bin/python --preload libtcmalloc_minimal.so.4
    python benchmarks/serving.py --transformers --batch 8
    python benchmarks/serving.py --llama-server llama-server --gguf model.gguf --checkpoint model

The servers run all the time, and while one is asked the others wait. A round asks each for the same prompts, which no
round before had; a third of them share a prefix. VENV has vLLM, as for generate_vllm.py. `transformers serve` wants
`pip install 'transformers[serving]' accelerate`. llama.cpp's model is the exported checkpoint (`--checkpoint`, a
directory with a tokenizer), converted by its convert_hf_to_gguf.py. Without `--checkpoint`, weights are random and the
tokenizer is trained on Python's standard library.

"generate" is `LLM.generate` in a process of its own: the same prompts in batches, without HTTP and without arrivals.
`--long-tokens` adds a case: eight requests generate while such long prompts arrive one after the other, and the
latencies are those of the eight.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Annotated, Any

import torch
import typer
from _machine import use_threads
from _servers import (
    Command,
    Room,
    dovetail_server,
    free_port,
    llama_python_server,
    llama_server,
    running,
    transformers_server,
    vllm_server,
)
from _sides import Build, Case, Lap, Series, Turn, append_rows, print_table, progress, ratio, take_turns
from _transformers import build_ours

from dovetail.bench.measures import measure
from dovetail.bench.outcome import Outcome
from dovetail.bench.serve import Question, bench_serve
from dovetail.bench.workload import Request, Workload, draw_requests, prompt_ids
from dovetail.catalog.presets import load_model
from dovetail.convert import load_llm
from dovetail.engine.sampler import SamplingParams
from dovetail.model.checkpoint.weights import export_hf
from dovetail.numerics.cpu.process import settle_process
from dovetail.text.documents import DataConfig, read_documents
from dovetail.text.tokenizer import Tokenizer

OURS, WITHOUT_HTTP = "dovetail", "generate"
BATCHES = [1, 8, 32]
NO_LIBRARIES: list[str] = []
SHARED_SHARE = 1 / 3
LONG_USERS, LONG_PROMPTS, LONG_EVERY = 8, 4, 2.0  # who generates; prompts that arrive, and the seconds between them
MARGIN = 128  # tokens a prompt of words may be longer than asked for


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What every side is given."""

    checkpoint: Path
    directory: Path  # for logs, traces and what each side measured
    prompt_tokens: int
    shared_tokens: int
    new_tokens: int
    vocab_size: int  # prompts are of ids below it

    def requests(self, case: Case) -> int:
        return max(8, 2 * case[0])

    def workload(self, case: Case, round_index: int) -> Workload:
        """Of a round: no two have a prompt in common, their shared prefixes included."""
        return Workload(
            requests=self.requests(case),
            input_tokens=(self.prompt_tokens,) * 2,
            output_tokens=(self.new_tokens,) * 2,
            shared_prefix=self.shared_tokens,
            shared_share=SHARED_SHARE,
            seed=1000 * round_index + case[0],
        )

    def trace(self, long_tokens: int) -> Path:
        """Users who generate, and long prompts that arrive meanwhile, each for one token."""
        path = self.directory / f"trace-{long_tokens}.jsonl"
        user = {"arrival": 0.0, "input_tokens": self.prompt_tokens, "output_tokens": 4 * self.new_tokens}
        lines = [user] * LONG_USERS
        for place in range(LONG_PROMPTS):
            lines.append({"arrival": LONG_EVERY * (place + 1), "input_tokens": long_tokens, "output_tokens": 1})
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        return path


def build_client(work: Work, side: str, url: str, model: str) -> Turn:
    """case (at once, tokens of long prompts or 0): a Lap of the seconds until all was answered."""
    rounds: dict[Case, int] = {}

    def turn(case: Case) -> Lap:
        rounds[case] = rounds.get(case, 0) + 1
        concurrency, long_tokens = case
        question = Question(
            url=url,
            model=model,
            workload=work.workload(case, rounds[case]),
            trace=work.trace(long_tokens) if long_tokens else None,
            concurrency=None if long_tokens else concurrency,
            warmup=0,
            vocab_size=work.vocab_size,
        )
        remarks: list[str] = []
        target, outcomes = bench_serve(question, lambda outcome: None, remarks.append)
        for remark in remarks if rounds[case] == 1 else ():
            progress(f"{side}: {remark}")
        fine = [outcome for outcome in outcomes if outcome.input_tokens == work.prompt_tokens]
        note = {"side": side, "case": case, "round": rounds[case], "ids": target.ruler is None, **figures(fine)}
        with (work.directory / "measures.jsonl").open("a") as file:
            file.write(json.dumps(note) + "\n")
        return Lap(seconds=[measure(fine).seconds], check=note["generated_tokens"])

    return turn


def figures(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """What is kept of a turn, in seconds. Raises RuntimeError where a request failed: its row would say too much."""
    measures = measure(outcomes)
    if measures.errors:
        first = next(outcome.message for outcome in outcomes if outcome.error)
        raise RuntimeError(f"requests failed: {measures.errors}: {first}")
    return {
        "output_tokens_per_s": measures.output_tokens_per_s,
        "input_tokens_per_s": measures.input_tokens_per_s,
        "ttft_median": measures.ttft.median,
        "ttft_p95": measures.ttft.p95,
        "itl_median": measures.inter_token.median,
        "itl_p99": measures.inter_token.p99,
        "gap_median": measures.gap.median,
        "gap_p99": measures.gap.p99,
        "generated_tokens": measures.generated_tokens,
        "shorter": measures.shorter,
        "counting": measures.counting,
    }


def build_generate(work: Work) -> Turn:
    settle_process()
    llm, _ = load_llm(work.checkpoint, dtype="bfloat16")
    params = SamplingParams(temperature=0, max_tokens=work.new_tokens, ignore_eos=True)
    rounds: dict[Case, int] = {}

    def turn(case: Case) -> Lap:
        rounds[case] = rounds.get(case, 0) + 1
        workload = work.workload(case, rounds[case])
        requests: list[Request] = draw_requests(workload)
        prompts = [prompt_ids(request, workload.seed, work.vocab_size) for request in requests]
        start, tokens = perf_counter(), 0
        for place in range(0, len(prompts), case[0]):
            completions = llm.generate(prompts[place : place + case[0]], params)
            tokens += sum(len(completion.token_ids) for completion in completions)
        return Lap(seconds=[perf_counter() - start], check=tokens)

    return turn


def make_checkpoint(model: str, directory: Path) -> Path:
    """Random weights without MTP modules, and a tokenizer with a text for every id."""
    spec = load_model(model).model_copy(update={"num_nextn_predict_layers": 0})
    progress("training a tokenizer, which every server wants")
    texts = (document.text for document in read_documents(DataConfig()))
    tokenizer = Tokenizer.train(texts, spec.vocab_size)
    (directory / "tokenizer").mkdir()
    tokenizer.save(directory / "tokenizer")
    files = (directory / "tokenizer").glob("*.json")
    export_hf(build_ours(spec, torch.bfloat16), spec, directory / model, tokenizer_files=files)
    return directory / model


def report(
    results: dict[tuple[str, Case], Series], work: Work, notes: Sequence[dict[str, Any]], model: str
) -> list[dict[str, Any]]:
    """Print a line for each side and case; return the rows to keep."""
    lines, rows = [], []
    for (name, case), series in results.items():
        times_ours = ratio(series, results[OURS, case])
        row = {
            "model": model,
            "concurrency": case[0],
            "long_tokens": case[1],
            "requests": LONG_USERS if case[1] else work.requests(case),
            "prompt_tokens": work.prompt_tokens,
            "shared_tokens": work.shared_tokens,
            "new_tokens": work.new_tokens,
            "side": name,
            **series.summary(),
            "times_dovetail": asdict(times_ours),
        }
        mine = [note for note in notes if note["side"] == name and tuple(note["case"]) == case][-len(series.laps) :]
        row["output_tokens_per_s"] = round(series.laps[0].check / series.median, 1)
        cells = [f"{case[0]}" + (f" + {case[1]}" if case[1] else ""), f"{series.median:.2f}"]
        cells.append(f"{row['output_tokens_per_s']:,.1f}")
        for key in ("ttft_median", "ttft_p95", "itl_median", "itl_p99", "gap_median", "gap_p99"):
            row[key] = median(note[key] for note in mine) if mine else None
            if not key.startswith("gap"):
                cells.append(f"{row[key] * 1e3:,.1f}" if mine else "-")
        row |= {key: mine[-1][key] for key in ("ids", "shorter", "counting")} if mine else {}
        lines.append([name, *cells, str(times_ours)])
        rows.append(row)
    header = ["side", "at once", "s", "tokens/s", "TTFT ms", "p95", "inter-token ms", "p99", "time / dovetail"]
    print_table(header, lines)
    return rows


def main(
    model: Annotated[str, typer.Option(help="A preset that every side has kernels for.")] = "300m",
    checkpoint: Annotated[Path | None, typer.Option(help="Serve this export in place of random weights.")] = None,
    speculate: Annotated[str, typer.Option(help="Of dovetail: auto, 0 or a number of drafts.")] = "auto",
    rival_python: Annotated[Path | None, typer.Option(help="The interpreter of an environment with vLLM.")] = None,
    preload: Annotated[list[str], typer.Option(help="Libraries for vLLM, as its guide advises.")] = NO_LIBRARIES,
    eager: Annotated[bool, typer.Option(help="vLLM without torch.compile.")] = False,
    llama_program: Annotated[Path | None, typer.Option("--llama-server", help="llama.cpp's server.")] = None,
    llama_python: Annotated[Path | None, typer.Option(help="An interpreter with llama-cpp-python[server].")] = None,
    gguf: Annotated[Path | None, typer.Option(help="The checkpoint as llama.cpp reads it.")] = None,
    transformers: Annotated[bool, typer.Option("--transformers", help="`transformers serve` as well.")] = False,
    batching: Annotated[bool, typer.Option("--batching", help="It with --continuous-batching.")] = False,
    batch: Annotated[list[int], typer.Option(help="Requests at once; may be repeated.")] = BATCHES,
    prompt_tokens: int = 512,
    shared_tokens: int = 256,
    new_tokens: int = 128,
    long_tokens: Annotated[int, typer.Option(help="Also a case with such prompts arriving, e.g. 2000.")] = 0,
    warmup: int = 1,
    repeats: int = 3,
    threads: int | None = None,
    record: bool = True,
) -> None:
    if (llama_program or llama_python) and (gguf is None or checkpoint is None):
        raise typer.BadParameter("llama.cpp wants --gguf FILE, and --checkpoint DIRECTORY that it was converted from")
    use_threads(threads)
    with tempfile.TemporaryDirectory() as folder, ExitStack() as servers:
        directory = Path(folder)
        chosen = (checkpoint or make_checkpoint(model, directory)).resolve()
        work = Work(
            checkpoint=chosen,
            directory=directory,
            prompt_tokens=prompt_tokens,
            shared_tokens=shared_tokens,
            new_tokens=new_tokens,
            vocab_size=Tokenizer.load(chosen).vocab_size,
        )
        longest = max(prompt_tokens + new_tokens * (4 if long_tokens else 1), long_tokens + 1) + MARGIN
        room = Room(checkpoint=chosen, max_model_len=longest, max_sequences=max(batch) + LONG_PROMPTS)
        sides: dict[str, Any] = {OURS: partial(dovetail_server, speculate=speculate)}
        if rival_python:
            sides["vLLM"] = partial(vllm_server, python=rival_python, preload=preload, eager=eager)
        if llama_program and gguf:
            sides["llama.cpp"] = partial(llama_server, program=llama_program, gguf=gguf)
        if llama_python and gguf:
            sides["llama-cpp-python"] = partial(llama_python_server, python=llama_python, gguf=gguf)
        if transformers:
            sides["transformers"] = partial(transformers_server, is_batching=batching)
        builds: dict[str, Build] = {}
        for name, side in sides.items():
            port = free_port()
            command: Command = side(room, port)
            url = servers.enter_context(running(command, port, directory / f"{name}.log"))
            progress(f"{name}: serves at {url}")
            builds[name] = partial(build_client, work, name, url, command.model)
        plain = take_turns({**builds, WITHOUT_HTTP: partial(build_generate, work)}, cases(batch), warmup, repeats)
        results = plain
        if long_tokens:
            results = plain | take_turns(builds, [(LONG_USERS, long_tokens)], warmup, repeats)
        notes = [json.loads(line) for line in (directory / "measures.jsonl").read_text().splitlines()]
    name = checkpoint.name if checkpoint else model
    print(f"serving, {name}, BF16, {prompt_tokens} + {new_tokens} tokens each, a third share {shared_tokens}")
    rows = report(results, work, notes, name)
    if record:
        append_rows("serving", rows)


def cases(batch: Sequence[int]) -> list[Case]:
    return [(concurrency, 0) for concurrency in batch]


if __name__ == "__main__":
    typer.run(main)
