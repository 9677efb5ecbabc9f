"""The verb `generate`."""

from __future__ import annotations

import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import typer

from dovetail.cli.options import flat
from dovetail.printing import announce_compilation, print_json

app = typer.Typer()
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
_ADVISED = "what the checkpoint's generation_config.json advises, else"


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How to choose tokens and when to stop."""

    max_tokens: Annotated[int, typer.Option(min=1, help="New tokens per prompt.")] = 128
    temperature: Annotated[
        float | None, typer.Option(min=0.0, show_default=f"{_ADVISED} 1", help="0 takes the most likely token.")
    ] = None
    top_k: Annotated[
        int | None,
        typer.Option(min=0, show_default=f"{_ADVISED} 0", help="Draw from the k most likely tokens; 0 means all."),
    ] = None
    top_p: Annotated[
        float | None,
        typer.Option(show_default=f"{_ADVISED} 1", help="Draw from the most likely tokens that add up to p."),
    ] = None
    min_p: Annotated[
        float | None,
        typer.Option(
            show_default=f"{_ADVISED} 0", help="Drop tokens below this share of the most likely one's probability."
        ),
    ] = None
    stop: Annotated[list[str] | None, typer.Option(help="Stop at this string; may be given several times.")] = None
    seed: Annotated[int, typer.Option(min=0, help="Seed of the random draws.")] = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Loading:
    """Which weights, and how they are kept."""

    speculate: Annotated[
        int, typer.Option(min=0, help="MTP drafts per step. Greedy text stays (on a GPU up to rounding).")
    ] = 0
    ema: Annotated[bool, typer.Option("--ema", help="Take the moving average of a run's weights.")] = False
    dtype: Annotated[
        str,
        typer.Option(help="bfloat16, float32, or auto: float32 on a CPU without instructions for BF16, else bfloat16."),
    ] = "auto"
    allow_non_finite: Annotated[
        bool, typer.Option("--allow-non-finite", help="Take weights that are NaN or infinite.")
    ] = False


@app.command()
@flat
def generate(
    checkpoint: Annotated[Path, typer.Argument(help="The directory of a training run, or a Hugging Face checkpoint.")],
    prompt: Annotated[list[str], typer.Option(help="A text to complete; may be given several times.")],
    sampling: Sampling,
    loading: Loading,
    as_json: Json = False,
) -> None:
    """Complete prompts with a trained model."""
    from dovetail.config import validate
    from dovetail.convert import load_llm, sampling_defaults
    from dovetail.engine.sampler import SamplingParams

    announce_compilation()
    chosen = {name: value for name, value in asdict(sampling).items() if value is not None}
    first = validate(SamplingParams, {**sampling_defaults(checkpoint), **chosen}, where=f"{checkpoint}, options")
    llm, remarks = load_llm(checkpoint, **asdict(loading))
    if remarks:
        print(remarks, file=sys.stderr)
    params = [first.model_copy(update={"seed": sampling.seed + i}) for i in range(len(prompt))]
    completions = llm.generate(prompt, params, loading.speculate)
    if as_json:
        print_json([asdict(completion) for completion in completions])
        return
    for text, completion in zip(prompt, completions, strict=True):
        print(text + completion.text)
    print(*(completion.statistics.summary() for completion in completions), sep="\n", file=sys.stderr)
