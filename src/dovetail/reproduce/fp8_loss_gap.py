"""An experiment: the loss of FP8 training over that of BF16, at a size for two CPU cores.

The paper [V3 App. B.1] reports that the loss of FP8 training differs from that of BF16 by less than 0.25 %, on models
of about 16B and 230B parameters and about 1.33T and 0.9T tokens, with curves smoothed with 0.9. Here it is the
quickstart model on Python's own library, with recipe `deepseek-v3` against `bf16` and several seeds. So small a model,
so early in training, shows whether the recipe's arithmetic learns as BF16's does; it has neither the outliers nor the
length of the paper's runs.

The paper had one run of each recipe and millions of tokens per step. With a thousand tokens chance moves a single
curve. So the mean over seeds and the last quarter of the steps is compared with the bound, with its 95 % interval; it
is reproduced if the whole interval is within the bound. The first steps decide how far chance goes. Schedule `paired`,
with a long warm-up, keeps it ten times smaller than the quickstart's own schedule (docs/log.md).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dovetail.text.atomic import check_new_file
from dovetail.train.compare import gap
from dovetail.train.compare.compare import comparison, measure
from dovetail.train.compare.gap import PAPER, Gap, percent
from dovetail.train.run.run_file import ModelConfig, RunConfig, TrainConfig

SEEDS, STEPS = 5, 600  # about 15 minutes on two cores
HEADER = (*gap.HEADER, ">paper")


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    gap: Gap
    directory: Path  # of the comparison
    picture: Path
    title: str = "Loss of the deepseek-v3 recipe over BF16, quickstart model"
    source: str = "[V3 App. B.1]"

    @property
    def is_reproduced(self) -> bool:
        """Whether the 95 % interval of the gap is within the paper's bound."""
        return self.gap.bounds[1] < PAPER


def reproduce(picture: Path, num_seeds: int = SEEDS, config: RunConfig | None = None) -> Result:
    """Train the pairs, or continue where they were stopped, and draw the PNG `picture`.

    The comparison is in a directory named like the picture. `config` replaces the run file.
    """
    check_new_file(picture)
    directory = picture.with_name(f"{picture.stem}-runs")
    settings = comparison(config or run_config(), "deepseek-v3", out=directory)
    return Result(gap=measure(settings, num_seeds, picture), directory=directory, picture=picture)


def run_config() -> RunConfig:
    """Return the model and batches of `dovetail quickstart`, in BF16 on any machine."""
    return RunConfig(
        out=Path("fp8_loss_gap"),
        model=ModelConfig(preset="quickstart"),
        train=TrainConfig(steps=STEPS, sequence_length=256, microbatch_size=4, dtype="bfloat16"),
        schedule="paired",
    )


def as_json(result: Result) -> dict[str, Any]:
    """Return plain data, with the verdict."""
    rest = {"directory": str(result.directory), "picture": str(result.picture), "paper": PAPER}
    return gap.as_json(result.gap) | rest | {"is_reproduced": result.is_reproduced}


def printed_rows(result: Result) -> Iterable[tuple[str, ...]]:
    """Yield the rows of any comparison, with the paper's bound beside the mean."""
    for row in gap.printed_rows(result.gap):
        yield *row, f"< {PAPER:.2%}" if row[0] == "mean" else ""


def printed_notes(result: Result) -> Iterable[str]:
    found = result.gap
    yield from gap.printed_notes(found)
    least, most = found.bounds
    if len(found.seeds) > 1:
        if most < PAPER:
            verdict = f"within the paper's {PAPER:.2%}"
        elif least > PAPER:
            verdict = f"beyond the paper's {PAPER:.2%}"
        else:
            verdict = f"so this size cannot say whether it is within the paper's {PAPER:.2%}"
        yield f"size of the gap: {least:.3%} to {most:.3%} (95 %), {verdict}"
    farthest = max((each.largest for each in found.seeds), key=abs)
    yield f"a single seed's smoothed curve is up to {percent(farthest)} away, by chance and by the recipe together"
    yield f"pairs of steps: {result.directory}; picture: {result.picture}"
