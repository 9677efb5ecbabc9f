"""The same stages under torch's own runtime of pipelines."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from pipelines_on_ranks import SEED, Case, mesh_of
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleDualPipeV, ScheduleInterleaved1F1B

from dovetail.cost.memory.stages import stages
from dovetail.model.experts.gate import Routing
from dovetail.model.transformer import Output, Transformer, initialize
from dovetail.parallel.pipeline.held import Aims, Ended
from dovetail.parallel.pipeline.pipeline import Pipeline, build_stages
from dovetail.text.corpus import Batch
from dovetail.train.step.loss import weighted_loss

RUNTIMES: dict[str, Callable[..., Any]] = {
    "1f1b": lambda held, *rest, **settings: Schedule1F1B(held[0], *rest, **settings),
    "interleaved": ScheduleInterleaved1F1B,
    "dualpipev": ScheduleDualPipeV,
}


class _Wrapped(nn.Module):
    def __init__(self, model: Transformer) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        context = self.model.context(x[..., 0] if x.ndim == 3 else x, None, None, None, False)
        return self.model.run_stage(x, context).hidden


def both(case: Case) -> list[tuple[dict[str, Tensor], list[Tensor]]]:
    """Gradients and losses of this rank, by torch's runtime and by ours; the loss is the next token's alone."""
    return [_torch(case), _ours(case)]


def _torch(case: Case) -> tuple[dict[str, Tensor], list[Tensor]]:
    models, batches = _models(case), case.batches()
    count = case.schedule.stages
    held = [
        PipelineStage(_Wrapped(model), number, count, torch.device("cpu"))
        for (number, _), model in sorted(models.items())
    ]
    head = [model for model in models.values() if model.stage.has_head]

    def loss(hidden: Tensor, targets: Tensor) -> Tensor:
        return _loss(head[0], hidden, targets, case)

    runtime = RUNTIMES[case.layout.schedule](held, len(batches), loss_fn=loss, scale_grads=False)
    inputs = torch.cat([batch.tokens[:, :-1] for batch in batches])
    targets = torch.cat([batch.tokens[:, 1:] for batch in batches])
    losses: list[Tensor] = []
    first = (inputs,) if dist.get_rank() == 0 else ()
    runtime.step(*first, target=targets if head else None, losses=losses)
    gradients = {name: each.grad for model in models.values() for name, each in model.named_parameters()}
    return gradients, [each.detach() for each in losses]


def _ours(case: Case) -> tuple[dict[str, Tensor], list[Tensor]]:
    def end(model: Transformer, output: Output, batch: Batch) -> Ended:
        loss = _loss(model, output.hidden, batch.tokens[:, 1:], case)
        return Ended(loss=loss, routings=[], report=loss.detach())

    def balance(routings: Sequence[Routing], batch: Batch) -> Tensor:
        return 0 * routings[0].scores.sum()

    pipeline = Pipeline(_models(case), case.schedule, mesh_of(2, 1, 1, 1))
    step = pipeline.run(case.batches(), Aims(end=end, balance=balance))
    return step.gradients, [report for _, report in sorted(step.reports.items())]


def _models(case: Case) -> dict[tuple[int, int], Transformer]:
    places = case.schedule.held_by(dist.get_rank())
    models = build_stages(case.spec, stages(case.spec, case.layout), places, case.dtype)
    for model in models.values():
        initialize(model, SEED)
    return models


def _loss(model: Transformer, hidden: Tensor, targets: Tensor, case: Case) -> Tensor:
    return weighted_loss(hidden, model.head_weight, targets, case.length * len(case.batches()), 1.0)[0]
