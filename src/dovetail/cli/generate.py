"""The verb `generate`."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from dovetail.printing import announce_compilation, print_json

app = typer.Typer()
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


@app.command()
def generate(
    checkpoint: Annotated[Path, typer.Argument(help="The directory of a training run, or a Hugging Face checkpoint.")],
    prompt: Annotated[list[str], typer.Option(help="A text to complete; may be given several times.")],
    max_tokens: Annotated[int, typer.Option(min=1, help="New tokens per prompt.")] = 128,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 takes the most likely token.")] = 1.0,
    top_k: Annotated[int, typer.Option(min=0, help="Draw from the k most likely tokens; 0 means all.")] = 0,
    top_p: Annotated[float, typer.Option(help="Draw from the most likely tokens that add up to p.")] = 1.0,
    min_p: Annotated[
        float, typer.Option(help="Drop tokens below this share of the most likely one's probability.")
    ] = 0.0,
    stop: Annotated[list[str] | None, typer.Option(help="Stop at this string; may be given several times.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the random draws.")] = 0,
    speculate: Annotated[int, typer.Option(min=0, help="MTP drafts per step; this changes only the speed.")] = 0,
    ema: Annotated[bool, typer.Option("--ema", help="Take the moving average of a run's weights.")] = False,
    as_json: Json = False,
) -> None:
    """Complete prompts with a trained model."""
    from dovetail.convert import load_llm
    from dovetail.engine.sampler import SamplingParams

    announce_compilation()
    settings = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p, "max_tokens": max_tokens}
    params = [SamplingParams(**settings, stop=stop or (), seed=seed + i) for i in range(len(prompt))]
    llm, weights = load_llm(checkpoint, ema, speculate)
    if weights:
        print(weights, file=sys.stderr)
    completions = llm.generate(prompt, params, speculate)
    if as_json:
        print_json([asdict(completion) for completion in completions])
        return
    for text, completion in zip(prompt, completions, strict=True):
        print(text + completion.text)
    print(*(completion.statistics.summary() for completion in completions), sep="\n", file=sys.stderr)
