"""The command line: one verb, one library function, its result printed.

Data goes to stdout, everything else to stderr. Each verb imports what it needs, so that `--help` stays quick.
Exit codes: 0 done, 1 the input or the machine is at fault (one line says how), 2 the command line is wrong.
"""

from __future__ import annotations

import sys
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from dovetail.network_cli import app as network
from dovetail.planning_cli import app as planning
from dovetail.printing import print_json, print_table

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="The DeepSeek-V3 system in one package: plan, train, generate, convert and count.",
)
app.add_typer(planning)
app.add_typer(network, name="network")
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


@app.command()
def inspect(
    model: Annotated[str, typer.Argument(help="A preset, a config.json, or a checkpoint directory.")],
    context: Annotated[int, typer.Option(help="Tokens of context for the FLOP per token.")] = 4096,
    as_json: Json = False,
) -> None:
    """Count a model: parameters by part, active, FLOP and KV bytes per token, kernels that take its shape."""
    from dovetail.cost import inspect as inspection

    result = inspection.inspect(model, context)
    if as_json:
        print_json(inspection.as_json(result))
        return
    print_table(f"{model}: {result.source}", ("", ">", ""), inspection.rows(result))
    if result.unread:
        print(f"keys of config.json that were not read: {', '.join(result.unread)}", file=sys.stderr)


@app.command()
def reproduce(
    names: Annotated[
        list[str] | None,
        typer.Argument(
            help="Of table1 to table5, speed_limit, cost, deployment, production, search, dualpipe, fig5 to fig8,"
            " low_latency, node_limited [default: all]; or one experiment: fp8_accumulation, fp8_loss_gap.",
        ),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Picture of an experiment [default: NAME.png].")] = None,
    as_json: Json = False,
) -> None:
    """Count or predict what is published anew and print both; exit code 1 if any of it, exact or predicted, fails."""
    from dovetail.reproduce import tables

    chosen = names or []
    if len(chosen) == 1 and chosen[0] in tables.EXPERIMENTS:
        module = import_module(f"dovetail.reproduce.{chosen[0]}")
        result = module.reproduce(out or Path(f"{chosen[0]}.png"))
    else:
        module, result = tables, tables.reproduce(chosen, out)
    if as_json:
        print_json(module.as_json(result))
    else:
        print_table(f"{result.title} {result.source}", module.HEADER, module.printed_rows(result))
        print(*module.printed_notes(result), sep="\n")
    if not result.is_reproduced:
        what = ", ".join(chosen) or "all tables"
        raise ValueError(f"{what}: what is published did not come out in full; see the table")


@app.command()
def quickstart(
    minutes: Annotated[float, typer.Option(min=1.2, help="Wall-clock minutes for everything.")] = 5.0,
    out: Annotated[Path | None, typer.Option(help="Directory of the run [default: quickstart-<minutes>min].")] = None,
) -> None:
    """Train on Python's own library, evaluate, export, generate; the same command goes on after a stop."""
    from dovetail.quickstart import quickstart as stages

    for title, rows in stages(out or Path(f"quickstart-{minutes:g}min"), minutes):
        print_table(f"\n{title}", ("",) * max(map(len, rows)), rows)


@app.command()
def train(
    run: Annotated[Path, typer.Argument(help="A run file (TOML).")],
    change: Annotated[list[str] | None, typer.Option("--set", help="Override a key, such as train.steps=200.")] = None,
) -> None:
    """Train from a run file, or go on where the run was stopped."""
    from dovetail.config import load
    from dovetail.train.run.loop import train as run_training
    from dovetail.train.run.run_file import RunConfig

    state = run_training(load(run, RunConfig, change or ()))
    print(f"trained {state.num_steps} steps; export the weights with: dovetail export {state.config.out} OUT")


@app.command()
def compare(
    run: Annotated[Path, typer.Argument(help="A run file (TOML).")],
    recipe: Annotated[str, typer.Option(help="A precision recipe, such as deepseek-v3.")],
    base: Annotated[str, typer.Option(help="The recipe it is held against.")] = "bf16",
    seeds: Annotated[int, typer.Option(min=1, help="Of initial weights and data, from train.seed on.")] = 3,
    steps: Annotated[int | None, typer.Option(min=1, help="Of each seed [default: train.steps].")] = None,
    out: Annotated[Path | None, typer.Option(help="Directory [default: OUT-BASE-RECIPE, of the run's out].")] = None,
    change: Annotated[
        list[str] | None, typer.Option("--set", help="Override a key, such as train.dtype=bfloat16.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Train with two precision recipes on the same batches, and measure the gap in loss over several seeds."""
    from dovetail.config import load
    from dovetail.train.compare import compare as comparing
    from dovetail.train.compare import gap
    from dovetail.train.run.run_file import RunConfig

    settings = comparing.comparison(load(run, RunConfig, change or ()), recipe, base, steps, out)
    result = comparing.measure(settings, seeds, settings.run.out / "compare.png")
    if as_json:
        print_json(gap.as_json(result))
        return
    print_table(f"{recipe} against {base}, {result.steps} steps", gap.HEADER, gap.printed_rows(result))
    print(*gap.printed_notes(result), f"pairs of steps and picture: {settings.run.out}", sep="\n")


@app.command()
def generate(
    checkpoint: Annotated[Path, typer.Argument(help="A checkpoint in the Hugging Face layout.")],
    prompt: Annotated[list[str], typer.Option(help="Text to complete; may be given several times.")],
    max_tokens: Annotated[int, typer.Option(min=1, help="New tokens per prompt.")] = 128,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 takes the most likely token.")] = 1.0,
    top_k: Annotated[int, typer.Option(min=0, help="Keep the k most likely; 0 keeps all.")] = 0,
    top_p: Annotated[float, typer.Option(help="Keep the most likely that add up to p.")] = 1.0,
    min_p: Annotated[float, typer.Option(help="Drop those below this share of the most likely.")] = 0.0,
    stop: Annotated[list[str] | None, typer.Option(help="End at this string; may be given several times.")] = None,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    speculate: Annotated[int, typer.Option(min=0, help="MTP drafts per step; changes only the speed.")] = 0,
    as_json: Json = False,
) -> None:
    """Complete prompts with a trained model."""
    from dovetail.engine.llm import LLM
    from dovetail.engine.sampler import SamplingParams

    settings = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p, "max_tokens": max_tokens}
    params = [SamplingParams(**settings, stop=stop or (), seed=seed + i) for i in range(len(prompt))]
    completions = LLM.load(checkpoint).generate(prompt, params, speculate)
    if as_json:
        print_json([asdict(completion) for completion in completions])
        return
    for text, completion in zip(prompt, completions, strict=True):
        print(text + completion.text)
    print(*(completion.statistics.summary() for completion in completions), sep="\n", file=sys.stderr)


@app.command()
def export(
    checkpoint: Annotated[Path, typer.Argument(help="The directory of a training run, or a Hugging Face checkpoint.")],
    out: Annotated[Path, typer.Argument(help="Directory to write, in the Hugging Face layout.")],
    fp8: Annotated[bool, typer.Option(help="Quantise to E4M3 with 128x128 blocks, as published.")] = False,
    ema: Annotated[bool, typer.Option(help="Of a run, the moving average of the weights.")] = False,
    shard_gb: Annotated[float, typer.Option(min=0.001, help="Largest shard, in GB.")] = 5.0,
    overwrite: Annotated[bool, typer.Option(help="Replace OUT if it is there.")] = False,
) -> None:
    """Write weights in the Hugging Face layout, and say which engines' kernels take the shape."""
    from dovetail import convert

    for line in convert.export(checkpoint, out, convert.ExportOptions(fp8, ema, shard_gb * 1e9, overwrite)):
        print(line)


@app.command("import")
def import_(
    hf_dir: Annotated[Path, typer.Argument(help="A checkpoint in the Hugging Face layout, FP8 or not.")],
    out: Annotated[Path, typer.Argument(help="Directory to write: the same in BF16, checked tensor by tensor.")],
    drop_mtp: Annotated[bool, typer.Option(help="Go on without MTP tensors that the config asks for.")] = False,
    overwrite: Annotated[bool, typer.Option(help="Replace OUT if it is there.")] = False,
) -> None:
    """Read a published checkpoint, check every tensor, dequantise it, and write it for `generate`."""
    from dovetail import convert

    for line in convert.import_(hf_dir, out, drop_mtp, overwrite):
        print(line)


def main() -> None:
    """Run the command line; a user's mistake is one line on stderr and exit code 1, never a traceback.

    RuntimeErrors of our own (a run that diverged, a disk that is full) are such lines too; one of torch's or an
    AssertionError is a bug and keeps its traceback.
    """
    try:
        app()
    except (ValueError, OSError) as error:
        fail(error, 1)
    except RuntimeError as error:
        if not type(error).__module__.startswith("dovetail."):
            raise
        fail(error, 130 if type(error).__name__ == "Interrupted" else 1)


def fail(error: Exception, code: int) -> NoReturn:
    print("dovetail:", " ".join(str(error).split()), file=sys.stderr)
    sys.exit(code)


if __name__ == "__main__":
    main()
