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

from dovetail.atomic import check_new_file
from dovetail.train.compare import summary
from dovetail.train.compare.compare import measure
from dovetail.train.compare.gap import PAPER, Gap, percent, said
from dovetail.train.compare.sides import comparison
from dovetail.train.compare.summary import Summary
from dovetail.train.run.run_file import ModelConfig, RunConfig, TrainConfig

SEEDS, STEPS = 5, 600  # about 15 minutes on two cores
HEADER = ("seed", ">gap, last quarter", ">largest smoothed", ">deepseek-v3 loss", ">bf16 loss", ">paper")


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    summary: Summary
    gap: Gap  # of the loss
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
    base = config or run_config()
    ours = base.model_copy(update={"train": base.train.model_copy(update={"precision": "deepseek-v3"})})
    found = measure(comparison(base, ours, out=directory), num_seeds, picture)
    assert found.loss is not None
    return Result(summary=found, gap=found.loss, directory=directory, picture=picture)


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
    return summary.as_json(result.summary) | rest | {"is_reproduced": result.is_reproduced}


def printed_rows(result: Result) -> Iterable[tuple[str, ...]]:
    """Seed by seed, and the paper's bound beside the mean."""
    gap = result.gap
    for each in gap.seeds:
        yield str(each.seed), percent(each.gap), percent(each.largest), f"{each.b:.4f}", f"{each.a:.4f}", ""
    yield "mean", percent(gap.mean), "", "", "", f"< {PAPER:.2%}"
    if len(gap.seeds) > 1:
        yield "standard deviation", f"{100 * gap.deviation:.3f}%", "", "", "", ""


def printed_notes(result: Result) -> Iterable[str]:
    gap, (base, ours) = result.gap, result.summary.sides
    yield said(gap, base.name, ours.name)
    least, most = gap.bounds
    if len(gap.seeds) > 1:
        if most < PAPER:
            verdict = f"within the paper's {PAPER:.2%}"
        elif least > PAPER:
            verdict = f"beyond the paper's {PAPER:.2%}"
        else:
            verdict = f"so this size cannot say whether it is within the paper's {PAPER:.2%}"
        yield f"size of the gap: {least:.3%} to {most:.3%} (95 %), {verdict}"
    farthest = max((each.largest for each in gap.seeds), key=abs)
    yield f"a single seed's smoothed curve is up to {percent(farthest)} away, by chance and by the recipe together"
    yield f"a step takes {ours.seconds / base.seconds:.2f} times that of {base.name}; {ours.skipped} steps were skipped"
    yield f"pairs of steps: {result.directory}; picture: {result.picture}"
