"""A training step on the ranks of a pipeline: our executor beside torch's runtimes, on the very same stages.

Both run in the same processes, in turn: forward and backward of all micro-batches of a small model of V3's shape,
without optimizer, balance loss and MTP, which torch's stages have no place for. Gradients are compared first.

Our executor adds up gradients of micro-batches in FP32. torch's runtime does so in the format of the weights, which
moves fewer bytes and loses bits; a second side of torch adds in FP32 too, by hooks, as other trainers have it. (Weight
gradients that its DualPipeV and ZBV put off pass by the hooks, and are added in the format of the weights.)

torch's ZBV cuts the model as DualPipeV does, and is measured against our DualPipeV.

Bar: ours is no slower than the side of torch with the same sums: its time / ours is at least 1.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Annotated, Any

import torch
import torch.distributed as dist
import typer
from _ranks import Ranks, timed_together
from _sides import Case, Lap, Turn, append_rows, in_rounds, print_table, ratio
from torch import Tensor, nn
from torch.distributed.pipelining import (
    PipelineStage,
    Schedule1F1B,
    ScheduleDualPipeV,
    ScheduleInterleaved1F1B,
    ScheduleZBVZeroBubble,
)

from dovetail.cost.memory.stages import stages
from dovetail.model.experts.gate import Routing
from dovetail.model.transformer import Output, Transformer, initialize
from dovetail.numerics.formats.errors import normwise_error, tolerance
from dovetail.parallel.mesh import form_mesh
from dovetail.parallel.pipeline.held import Aims, Ended
from dovetail.parallel.pipeline.pipeline import Pipeline, Place, build_stages
from dovetail.parallel.schedules.pipelines import make_schedule
from dovetail.spec.family import Dial, dovetail_spec
from dovetail.spec.layout import Layout, ScheduleName
from dovetail.spec.model import ModelSpec
from dovetail.text.corpus import Batch
from dovetail.train.step.loss import weighted_loss

SIDES = ("dovetail", "torch", "torch, FP32 sums")


@dataclass(frozen=True, slots=True, kw_only=True)
class Rival:
    ours: ScheduleName
    theirs: Callable[..., Any]  # of torch.distributed.pipelining


RIVALS = {
    "1F1B": Rival(ours="1f1b", theirs=Schedule1F1B),
    "Interleaved1F1B": Rival(ours="interleaved", theirs=ScheduleInterleaved1F1B),
    "DualPipeV": Rival(ours="dualpipev", theirs=ScheduleDualPipeV),
    "ZBVZeroBubble": Rival(ours="dualpipev", theirs=ScheduleZBVZeroBubble),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    spec: ModelSpec
    ranks: int
    microbatches: int  # of one sequence each
    length: int
    dtype: torch.dtype

    def layout(self, schedule: ScheduleName) -> Layout:
        return Layout(pp=self.ranks, microbatches=self.microbatches, schedule=schedule)

    def batches(self, seed: int = 0) -> list[Batch]:
        generator = torch.Generator().manual_seed(seed)
        shape = (self.microbatches, 1, self.length + 1)
        tokens = torch.randint(self.spec.vocab_size, shape, generator=generator)
        return [Batch(tokens=each, document_ids=torch.zeros_like(each, dtype=torch.int32)) for each in tokens]

    def loss(self, model: Transformer, hidden: Tensor, targets: Tensor) -> Tensor:
        return weighted_loss(hidden, model.head_weight, targets, self.microbatches * self.length, 1.0)[0]


class _Wrapped(nn.Module):
    """A stage as torch's runtime wants it."""

    def __init__(self, model: Transformer) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        model = self.model
        hidden = model.run_stage(x, model.context(x[..., 0] if x.ndim == 3 else x, None, None, None, False)).hidden
        assert isinstance(hidden, Tensor)
        return hidden


class _WideSums:
    """Adds up gradients in FP32 as soon as autograd has made them."""

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        self.sums: dict[str, Tensor] = {}
        self.is_on = False
        for name, parameter in parameters.items():
            parameter.register_post_accumulate_grad_hook(partial(self.add, name))

    def add(self, name: str, parameter: Tensor) -> None:
        gradient = parameter.grad
        if not self.is_on or gradient is None:
            return
        parameter.grad = None
        if name in self.sums:
            self.sums[name] += gradient
        else:
            self.sums[name] = gradient.float()


Step = Callable[[], dict[str, Tensor]]  # of all micro-batches -> gradients of the stages here, by name


def build(work: Work, names: Sequence[str]) -> Turn:
    """On a rank. A case is the place of a rival in `names`, and which side runs."""
    steps: list[Sequence[Step]] = []
    errors = []
    for name in names:
        rival = RIVALS[name]
        layout = work.layout(rival.ours)
        schedule = make_schedule(layout.schedule, layout.pp, layout.microbatches, layout.chunks)
        models = build_stages(
            work.spec, stages(work.spec, layout, work.length), schedule.held_by(dist.get_rank()), work.dtype
        )
        for model in models.values():
            initialize(model, 0)
        sides = _ours(work, models, layout), *_theirs(work, models, rival.theirs, schedule.stages)
        steps.append(sides)
        errors.append(_compare(sides, work, name))

    def turn(case: Case) -> Lap:
        index, side = case

        def run() -> float:
            steps[index][side]()
            return errors[index]

        return timed_together(run)

    return turn


def aims(work: Work) -> Aims:
    """The next token's loss alone."""

    def end(model: Transformer, output: Output, batch: Batch) -> Ended:
        loss = work.loss(model, output.hidden, batch.tokens[:, 1:])
        return Ended(loss=loss, routings=[], report=loss.detach())

    def balance(routings: Sequence[Routing], batch: Batch) -> Tensor:
        return torch.zeros((), requires_grad=True)

    return Aims(end=end, balance=balance)


def _ours(work: Work, models: dict[Place, Transformer], layout: Layout) -> Step:
    schedule = make_schedule(layout.schedule, layout.pp, layout.microbatches, layout.chunks)
    pipeline, batches = Pipeline(models, schedule, form_mesh(layout)), work.batches()
    return lambda: pipeline.run(batches, aims(work)).gradients


def _theirs(work: Work, models: dict[Place, Transformer], runtime: Callable[..., Any], count: int) -> tuple[Step, Step]:
    cpu = torch.device("cpu")
    held = [PipelineStage(_Wrapped(model), number, count, cpu) for (number, _), model in sorted(models.items())]
    head = [model for model in models.values() if model.stage.has_head]
    runs = runtime(
        held[0] if runtime is Schedule1F1B else held,
        work.microbatches,
        loss_fn=lambda hidden, targets: work.loss(head[0], hidden, targets),
        scale_grads=False,
    )
    batches = work.batches()
    inputs = torch.cat([batch.tokens[:, :-1] for batch in batches]).contiguous()
    targets = torch.cat([batch.tokens[:, 1:] for batch in batches]).contiguous()
    first = (inputs,) if dist.get_rank() == 0 else ()
    parameters = {name: each for model in models.values() for name, each in model.named_parameters()}
    wide = _WideSums(parameters)

    def step(is_wide: bool) -> dict[str, Tensor]:
        wide.sums, wide.is_on = {}, is_wide
        runs.step(*first, target=targets if head else None, losses=[])
        for name, parameter in parameters.items():
            if is_wide:
                wide.add(name, parameter)
            elif parameter.grad is not None:
                wide.sums[name] = parameter.grad
            parameter.grad = None  # our executor would add it to its own
        wide.is_on = False
        return wide.sums

    return partial(step, False), partial(step, True)


def _compare(sides: Sequence[Step], work: Work, name: str) -> float:
    """The largest error of any gradient of torch's on any rank. Raises ValueError where it is not rounding's."""
    ours, *others = (side() for side in sides)
    found = [0.0]
    for theirs in others:
        assert all(each in theirs or not ours[each].any() for each in ours)
        found += [normwise_error(theirs[each].float(), ours[each]) for each in theirs]
    worst = torch.tensor(max(found), dtype=torch.float64)
    dist.all_reduce(worst, op=dist.ReduceOp.MAX)
    bound = tolerance(work.dtype, roundings=work.microbatches, terms=work.microbatches)
    if float(worst) > bound:
        raise ValueError(f"{name}: gradients differ by {float(worst):.2e}, rounding explains {bound:.2e}")
    return float(worst)


def main(
    ranks: int = 2,
    width: int = 256,
    layers: int = 8,
    microbatches: int = 8,
    length: int = 256,
    dtype: Annotated[str, typer.Option(help="Of weights: bfloat16 or float32.")] = "bfloat16",
    rival: Annotated[list[str], typer.Option(help=f"Of torch: {', '.join(RIVALS)}; may be repeated.")] = list(RIVALS),  # noqa: B006
    warmup: int = 1,
    repeats: int = 9,
    record: bool = True,
) -> None:
    spec = dovetail_spec(Dial(width=width, layers=layers, mtp_depth=0))
    work = Work(spec=spec, ranks=ranks, microbatches=microbatches, length=length, dtype=getattr(torch, dtype))
    team = Ranks(partial(build, work, rival), ranks)
    lines, rows = [], []
    for index, name in enumerate(rival):
        turns = {side: partial(team.turn, (index, place)) for place, side in enumerate(SIDES)}
        found = in_rounds(turns, warmup, repeats, name)
        ratios = {side: ratio(found[side], found[SIDES[0]]) for side in SIDES[1:]}
        error = found[SIDES[0]].laps[0].check
        cells = [f"{series.median * 1e3:.0f}" for series in found.values()] + list(map(str, ratios.values()))
        lines.append([name, RIVALS[name].ours, *cells, f"{error:.1e}"])
        row = {"ranks": ranks, "width": width, "layers": layers, "microbatches": microbatches, "length": length}
        row |= {"dtype": dtype, "rival": name, "ours": RIVALS[name].ours, "gradient_error": error}
        row |= {"times_dovetail": {side: asdict(each) for side, each in ratios.items()}}
        rows.append({**row, "sides": {side: series.summary() for side, series in found.items()}})
    team.stop()
    print(f"{ranks} ranks of one thread, {microbatches} micro-batches of {length} tokens, {layers} layers of {width}")
    print_table(
        ["torch's", "ours", *(f"{side} ms" for side in SIDES), "torch / dovetail", "FP32 sums / dovetail", "gradients"],
        lines,
    )
    if record:
        append_rows("schedules", rows)


if __name__ == "__main__":
    typer.run(main)
