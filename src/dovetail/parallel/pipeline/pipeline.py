"""Runs any pipeline schedule: receive, run, send, action by action.

    schedule ---- its steps ----> Pipeline ---- F, B, I, W ----> Held, a stage
                                     |
                                     +--- hidden states, gradients ---> Mail ---> the neighbours' ranks

Each rank runs its own steps in order and waits for nothing but their inputs, so what runs is what
`planner.training.timeline` replays. All ranks of a pipeline are given the same micro-batches: no tokens are sent.
Ranks that share experts run the same schedule, so that their exchanges come in the same order. The halves of a `Pair`
take turns (`parallel.turns`): while the tokens of one are on their way to experts or back, the other computes.
A stage's gradients are given away after its last backward pass, while other stages and ranks are still at work.

Where the first and the last stage are on one rank, as in DualPipe, they share the embedding: one parameter, to which
both add their gradients [V3 §3.2.3].
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from dovetail.cost.memory.stages import Stage
from dovetail.model.transformer import Transformer
from dovetail.parallel.mesh import Mesh
from dovetail.parallel.pipeline.held import Aims, Held, Sums
from dovetail.parallel.pipeline.mail import Mail
from dovetail.parallel.pipeline.messages import key_for, key_of
from dovetail.parallel.schedules.schedule import Action, Schedule, Step
from dovetail.parallel.traffic import Traffic
from dovetail.spec.model import ModelSpec
from dovetail.text.corpus import Batch

Place = tuple[int, int]  # a stage, and the direction in which micro-batches pass it


@dataclass(frozen=True, slots=True, kw_only=True)
class PipelineStep:
    """What one rank has after all micro-batches."""

    gradients: dict[str, Tensor]  # FP32, of every parameter here, summed over micro-batches
    counts: dict[int, Tensor]  # [E] int64: tokens per expert, by layer; MTP modules come after the layers
    balances: dict[int, Tensor]  # by micro-batch: the balance losses of the layers here
    reports: dict[int, object]  # by micro-batch, those whose last stage is here
    peak: int  # the most (micro-batch, stage) held at once, as `Schedule.activation_limit` counts them


def build_stages(
    spec: ModelSpec,
    cut: Sequence[Stage],
    places: Sequence[Place],
    dtype: torch.dtype = torch.bfloat16,
    recompute: bool = False,
) -> dict[Place, Transformer]:
    """The stages that a rank holds, `Schedule.held_by`, of a model that is cut into `cut`; see `Transformer`."""
    models = {place: Transformer(spec, dtype, recompute=recompute, stage=cut[place[0]]) for place in places}
    embedded = [model for model in models.values() if "embed_tokens" in dict(model.named_children())]
    for model in embedded[1:]:
        model.embed_tokens = embedded[0].embed_tokens
    return models


def named_parameters(models: Mapping[Place, Transformer]) -> dict[str, Tensor]:
    """Of all stages here, by the names that they have in the whole; a shared embedding is there once."""
    return {name: parameter for model in models.values() for name, parameter in model.named_parameters()}


class Pipeline:
    """The stages of this rank, and how they run."""

    def __init__(
        self,
        models: Mapping[Place, Transformer],
        schedule: Schedule,
        mesh: Mesh,
        is_overlapped: bool = True,
        traffic: Traffic | None = None,
    ) -> None:
        """`is_overlapped`: whether the exchanges of a `Pair` hide behind each other's arithmetic. What is sent is added
        to `traffic`. Raises ValueError where mesh and schedule differ in ranks."""
        if mesh.pp.size != schedule.ranks:
            raise ValueError(f"the schedule {schedule.name} has {schedule.ranks} ranks, the pipeline {mesh.pp.size}")
        self.models, self.schedule, self.mesh = models, schedule, mesh
        self.steps = schedule.actions[mesh.pp.index]
        self.is_overlapped = is_overlapped and mesh.ep.size > 1  # alone there is nothing to hide
        self.traffic = Traffic() if traffic is None else traffic  # of hidden states and their gradients

    def run(
        self, batches: Sequence[Batch], aims: Aims, give: Callable[[str, Tensor], None] | None = None
    ) -> PipelineStep:
        """Forward and backward of all micro-batches, the same on all ranks of the pipeline, which call it together.

        `give` gets each gradient once, by name, as soon as no stage here adds to it any more. Raises ValueError unless
        they are as many as in the schedule.
        """
        if len(batches) != self.schedule.microbatches:
            raise ValueError(
                f"{len(batches)} micro-batches for a schedule of {self.schedule.microbatches}: give one Batch for each"
            )
        run = _Run(self, batches, aims, give)
        try:
            for number, step in enumerate(self.steps):
                run.step(number, step)
            run.mail.finish()
        finally:
            for model in self.models.values():
                model.put_off_weight_gradients(None)
        return run.result()


class _Run:
    """One step of the optimizer as it goes on."""

    def __init__(
        self,
        pipeline: Pipeline,
        batches: Sequence[Batch],
        aims: Aims,
        give: Callable[[str, Tensor], None] | None,
    ) -> None:
        self.pipeline, self.batches, self.give = pipeline, batches, give
        self.sums = Sums()
        self.held = {place: Held(place[0], model, aims, self.sums) for place, model in pipeline.models.items()}
        self.mail = Mail(pipeline.schedule, pipeline.mesh, pipeline.traffic, self._empty)
        self.peak = 0
        halves = [half for step in pipeline.steps for half in step.halves]
        self._split = {(half.microbatch, half.stage) for half in halves if half.kind == "I"}
        self._left = Counter((half.stage, half.direction) for half in halves if half.kind in "BW")

    def step(self, number: int, step: Step) -> None:
        self.mail.post(number)
        inputs = [self._input(half) for half in step.halves]
        works = [partial(self._run, half, x) for half, x in zip(step.halves, inputs, strict=True)]
        if len(works) == 2 and self.pipeline.is_overlapped:
            made: Iterable[Tensor | None] = self.pipeline.mesh.turns.both(*works)
        else:
            made = (work() for work in works)  # each is handed on before the next one runs
        for half, output in zip(step.halves, made, strict=True):  # in the order in which they are received
            if output is not None:
                self.mail.give(key_of(half), output)

    def result(self) -> PipelineStep:
        balances = dict[int, Tensor]()
        for (microbatch, _), balance in sorted(self.sums.balances.items()):
            balances[microbatch] = balances.get(microbatch, 0.0) + balance
        return PipelineStep(
            gradients=self.sums.gradients,
            counts=self.sums.counts,
            balances=balances,
            reports=self.sums.reports,
            peak=self.peak,
        )

    def _input(self, action: Action) -> Tensor | None:
        """What the stage next to it has made; None where there is none."""
        is_end = action.stage == (0 if action.kind == "F" else self.pipeline.schedule.stages - 1)
        return None if is_end or action.kind == "W" else self.mail.take(key_for(action))

    def _run(self, action: Action, x: Tensor | None) -> Tensor | None:
        """What the next stage needs; None where there is none."""
        held, microbatch = self.held[action.stage, action.direction], action.microbatch
        if action.kind == "W":
            held.weights(microbatch)
            self._end((action.stage, action.direction))
            return None
        if action.kind != "F":
            grad = held.backward(microbatch, x, is_whole=action.kind == "B")
            if action.kind == "B":
                self._end((action.stage, action.direction))
            return grad
        made = held.forward(microbatch, self.batches[microbatch], x, (microbatch, action.stage) in self._split)
        self.peak = max(self.peak, sum(len(each.kept) for each in self.held.values()))
        return made

    def _end(self, place: Place) -> None:
        """One backward pass of a stage has ended. After its last one its gradients are whole, but for weights that
        another stage here shares and still adds to."""
        self._left[place] -= 1
        if self._left[place]:
            return
        models, gradients = self.pipeline.models, self.sums.gradients
        at_work = {name for other, left in self._left.items() if left for name, _ in models[other].named_parameters()}
        for name, parameter in models[place].named_parameters():
            if name not in at_work:
                if name not in gradients:
                    gradients[name] = torch.zeros_like(parameter, dtype=torch.float32)
                if self.give is not None:
                    self.give(name, gradients[name])

    def _empty(self, microbatch: int) -> Tensor:
        model = next(iter(self.pipeline.models.values()))
        weight = next(iter(model.layers.values())).self_attn.o_proj.weight  # norms are FP32 in every model
        sequences, length = self.batches[microbatch].tokens.shape
        return torch.empty(sequences, length - 1, model.spec.hidden_size, dtype=weight.dtype, device=weight.device)
