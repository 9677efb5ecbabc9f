"""Greedy decoding with one MTP draft per step, beside plain decoding, of Python files the model has not seen.

One sequence at a time, on a trained checkpoint (random weights accept next to nothing): `dovetail quickstart`
writes one. Plain and speculative completions of one prompt follow each other directly. Both must be the same text:
what a row computes does not depend on the rows beside it.

A speculative step runs the main model on two rows and the MTP module on one or two, and yields 1 + acceptance
tokens; so its gain is (1 + acceptance) over what the step costs more.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer
from _machine import use_threads
from _sides import append_rows, print_table, progress

from dovetail.engine.llm import LLM
from dovetail.engine.sampler import SamplingParams
from dovetail.engine.sequence import Completion
from dovetail.numerics.cpu.allocator import keep_freed_memory
from dovetail.text.documents import DataConfig, read_documents


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """One prompt completed both ways."""

    name: str
    plain: Completion
    speculative: Completion

    @property
    def is_same(self) -> bool:
        return self.plain.token_ids == self.speculative.token_ids

    @property
    def gain(self) -> float:
        return seconds_per_token(self.plain) / seconds_per_token(self.speculative)

    @property
    def step_cost(self) -> float:
        """Time of a speculative step over that of a plain one."""
        return seconds_per_step(self.speculative) / seconds_per_step(self.plain)


def seconds_per_token(completion: Completion) -> float:
    """The first token is the prefill's."""
    return completion.statistics.decode_seconds / (len(completion.token_ids) - 1)


def seconds_per_step(completion: Completion) -> float:
    return completion.statistics.decode_seconds / completion.statistics.steps


def prompts(llm: LLM, files: int, prompt_tokens: int, new_tokens: int) -> Iterator[tuple[str, list[int]]]:
    """(name, tokens) of the beginnings of the first held-out files that are long enough."""
    assert llm.tokenizer is not None
    bos = [] if llm.tokenizer.bos_id is None else [llm.tokenizer.bos_id]
    found = 0
    for document in read_documents(DataConfig(), "held_out"):
        tokens = bos + llm.tokenizer.encode(document.text)
        if len(tokens) >= prompt_tokens + new_tokens and found < files:
            found += 1
            yield document.name, tokens[:prompt_tokens]


def run_pairs(llm: LLM, chosen: Sequence[tuple[str, list[int]]], new_tokens: int, repeats: int) -> list[Pair]:
    params = SamplingParams(temperature=0.0, max_tokens=new_tokens, ignore_eos=True)
    pairs = []
    for round_index, (name, tokens) in itertools.product(range(repeats), chosen):
        plain, speculative = (llm.generate([tokens], params, speculate=depth)[0] for depth in (0, 1))
        pairs.append(Pair(name=name, plain=plain, speculative=speculative))
        progress(f"round {round_index + 1}, {name}: {pairs[-1].gain:.2f}x")
    return pairs


def main(
    checkpoint: Annotated[Path, typer.Argument(help="A directory in the Hugging Face layout, MTP weights included.")],
    files: Annotated[int, typer.Option(help="Held-out files to complete.")] = 6,
    prompt_tokens: int = 160,
    new_tokens: int = 96,
    repeats: int = 3,
    threads: int | None = None,
    record: bool = True,
) -> None:
    use_threads(threads)
    keep_freed_memory()
    llm = LLM.load(checkpoint)
    chosen = list(prompts(llm, files, prompt_tokens, new_tokens))
    if not chosen:
        raise ValueError(f"no held-out file has {prompt_tokens + new_tokens} tokens; ask for fewer")
    pairs = run_pairs(llm, chosen, new_tokens, repeats)
    lines, rows = [], []
    for name, _ in [*chosen, ("all", [])]:
        of_file = [pair for pair in pairs if name in (pair.name, "all")]
        row = summary(of_file)
        lines.append([name, *(f"{row[key]:.2f}" for key in ("plain_ms", "speculative_ms", "gain", "step_cost"))])
        lines[-1] += [f"{row['acceptance']:.0%}", "yes" if row["is_same"] else "NO"]
        rows.append({"file": name, "prompt_tokens": prompt_tokens, "new_tokens": new_tokens, **row})
    print(f"speculative decoding, {llm.spec.hidden_size} wide, {llm.spec.num_hidden_layers} layers, BF16, greedy")
    print_table(["held-out file", "plain ms/token", "speculative", "gain", "step cost", "accepted", "same"], lines)
    if record:
        append_rows("speculation", rows)


def summary(pairs: Sequence[Pair]) -> dict[str, float | int | bool]:
    drafted = sum(pair.speculative.statistics.drafted for pair in pairs)
    return {
        "plain_ms": statistics.median(seconds_per_token(pair.plain) for pair in pairs) * 1e3,
        "speculative_ms": statistics.median(seconds_per_token(pair.speculative) for pair in pairs) * 1e3,
        "gain": statistics.median(pair.gain for pair in pairs),
        "step_cost": statistics.median(pair.step_cost for pair in pairs),
        "acceptance": sum(pair.speculative.statistics.accepted for pair in pairs) / drafted,
        "is_same": all(pair.is_same for pair in pairs),
        "repeats": len(pairs),
    }


if __name__ == "__main__":
    typer.run(main)
