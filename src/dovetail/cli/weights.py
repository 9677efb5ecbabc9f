"""The verbs `export` and `import`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import typer

from dovetail.cli.options import flat

app = typer.Typer()


@dataclass(frozen=True, slots=True, kw_only=True)
class Export:
    """What is written, and in which form."""

    fp8: Annotated[bool, typer.Option(help="Quantise to E4M3 with 128x128 blocks, as published.")] = False
    reader: Annotated[
        Literal["transformers"] | None,
        typer.Option("--for", help="With --fp8, leave in BF16 what this reader cannot take: weights of ragged blocks."),
    ] = None
    ema: Annotated[bool, typer.Option(help="Export the moving average of a run's weights.")] = False
    shard_gb: Annotated[float, typer.Option(min=0.001, help="Largest shard, in GB.")] = 5.0
    overwrite: Annotated[bool, typer.Option(help="Replace OUT if it is there.")] = False
    allow_non_finite: Annotated[
        bool, typer.Option("--allow-non-finite", help="Take weights that are NaN or infinite.")
    ] = False


@app.command()
@flat
def export(
    checkpoint: Annotated[Path, typer.Argument(help="The directory of a training run, or a Hugging Face checkpoint.")],
    out: Annotated[Path, typer.Argument(help="Directory to write, in the Hugging Face layout.")],
    how: Export,
) -> None:
    """Write weights in the Hugging Face layout, and say which engines' kernels take the shape."""
    if how.reader and not how.fp8:
        raise ValueError(f"--for {how.reader}: says how FP8 is written; add --fp8, or leave it out")
    from dovetail import convert

    shard_bytes = how.shard_gb * 1e9
    options = convert.ExportOptions(how.reader or how.fp8, how.ema, shard_bytes, how.overwrite, how.allow_non_finite)
    for line in convert.export(checkpoint, out, options):
        print(line)


@app.command("import")
def import_(
    hf_dir: Annotated[Path, typer.Argument(help="A checkpoint in the Hugging Face layout, FP8 or not.")],
    out: Annotated[Path, typer.Argument(help="Directory to write: the same weights in BF16, every tensor checked.")],
    drop_mtp: Annotated[bool, typer.Option(help="Accept that MTP tensors named in the config are missing.")] = False,
    overwrite: Annotated[bool, typer.Option(help="Replace OUT if it is there.")] = False,
    allow_non_finite: Annotated[
        bool, typer.Option("--allow-non-finite", help="Take weights that are NaN or infinite.")
    ] = False,
) -> None:
    """Read a published checkpoint, check every tensor, dequantise it, and write it for `generate`."""
    from dovetail import convert

    for line in convert.import_(hf_dir, out, drop_mtp, overwrite, allow_non_finite):
        print(line)
