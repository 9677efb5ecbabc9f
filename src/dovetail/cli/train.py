"""The verbs `quickstart`, `train` and `compare`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dovetail.printing import announce_compilation, print_json, print_table

app = typer.Typer()
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


@app.command()
def quickstart(
    minutes: Annotated[float, typer.Option(min=1.2, help="Wall-clock minutes for all stages together.")] = 5.0,
    out: Annotated[Path | None, typer.Option(help="Directory of the run [default: quickstart-<minutes>min].")] = None,
) -> None:
    """Train on Python's own library, evaluate, export, generate; the same command continues a stopped run."""
    from dovetail.quickstart import quickstart as stages

    announce_compilation()
    for title, rows in stages(out or Path(f"quickstart-{minutes:g}min"), minutes):
        print_table(f"\n{title}", ("",) * max(map(len, rows)), rows)


@app.command()
def train(
    run: Annotated[Path, typer.Argument(help="A run file (TOML).")],
    change: Annotated[list[str] | None, typer.Option("--set", help="Override a key, such as train.steps=200.")] = None,
) -> None:
    """Train from a run file, or continue where the run was stopped."""
    from dovetail.config import load_toml
    from dovetail.train.run.loop import train as run_training
    from dovetail.train.run.run_file import RunConfig

    announce_compilation()
    state = run_training(load_toml(run, RunConfig, change or ()))
    out = state.config.out
    print(f"trained {state.num_steps} steps; complete text with: dovetail generate {out} --prompt TEXT")
    print(f"export the weights with: dovetail export {out} OUT")


@app.command()
def compare(
    run: Annotated[Path, typer.Argument(help="A run file (TOML).")],
    recipe: Annotated[str, typer.Option(help="A precision recipe, such as deepseek-v3.")],
    base: Annotated[str, typer.Option(help="The recipe to compare it with.")] = "bf16",
    seeds: Annotated[int, typer.Option(min=1, help="Number of seeds, counted from train.seed.")] = 3,
    steps: Annotated[int | None, typer.Option(min=1, help="Steps for each seed [default: train.steps].")] = None,
    out: Annotated[
        Path | None, typer.Option(help="Directory to write [default: OUT-BASE-RECIPE, with OUT of the run file].")
    ] = None,
    change: Annotated[
        list[str] | None, typer.Option("--set", help="Override a key, such as train.dtype=bfloat16.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Train with two precision recipes on the same batches, and measure the gap in loss over several seeds."""
    from dovetail.config import load_toml
    from dovetail.train.compare import compare as comparing
    from dovetail.train.compare import gap
    from dovetail.train.run.run_file import RunConfig

    settings = comparing.comparison(load_toml(run, RunConfig, change or ()), recipe, base, steps, out)
    result = comparing.measure(settings, seeds, settings.run.out / "compare.png")
    if as_json:
        print_json(gap.as_json(result))
        return
    print_table(f"{recipe} against {base}, {result.steps} steps", gap.HEADER, gap.printed_rows(result))
    print(*gap.printed_notes(result), f"pairs of steps and picture: {settings.run.out}", sep="\n")
