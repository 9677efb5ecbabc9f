"""What ranks do in the tests of pipelines, and what one process does instead."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from dovetail.cost.memory.stages import stages
from dovetail.model.experts.gate import Routing, balance_loss
from dovetail.model.transformer import Output, Transformer, initialize
from dovetail.parallel.experts.dispatch import OneHop, TwoHop
from dovetail.parallel.mesh import Mesh, form_mesh
from dovetail.parallel.part import take_part
from dovetail.parallel.pipeline import mail
from dovetail.parallel.pipeline.held import Aims, Ended, Held
from dovetail.parallel.pipeline.messages import Due, Message, arrivals
from dovetail.parallel.pipeline.pipeline import Pipeline, _Run, build_stages
from dovetail.parallel.schedules.pipelines import make_schedule
from dovetail.parallel.schedules.schedule import Schedule
from dovetail.spec.layout import Layout
from dovetail.spec.model import ModelSpec
from dovetail.text.corpus import Batch
from dovetail.train.step.losses import Share, compute_losses, count_targets, end_losses

ALPHA = 0.01
SEED = 5
DISPATCHERS: dict[str, Callable[[Mesh], OneHop | TwoHop]] = {"one": OneHop, "two": TwoHop}


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    spec: ModelSpec
    layout: Layout
    dtype: torch.dtype = torch.float32
    length: int = 9
    recompute: bool = False
    separate_documents: bool = False
    hops: str = "one"
    ranks_per_node: int = 1
    is_overlapped: bool = True
    twin: str = ""  # what is broken

    @property
    def schedule(self) -> Schedule:
        layout = self.layout
        return make_schedule(layout.schedule, layout.pp, layout.microbatches, layout.chunks)

    @property
    def depths(self) -> int:
        return 1 + self.spec.num_nextn_predict_layers

    def batches(self) -> list[Batch]:
        """All micro-batches, those of the first data-parallel rank first."""
        generator = torch.Generator().manual_seed(SEED)
        shape = (self.layout.dp * self.layout.microbatches, self.layout.microbatch_size, self.length + 1)
        tokens = torch.randint(0, self.spec.vocab_size, shape, generator=generator)
        borders = torch.rand(shape, generator=generator) < 0.2
        ids = borders.cumsum(2).int()
        return [Batch(tokens=each, document_ids=its) for each, its in zip(tokens, ids, strict=True)]

    def share(self) -> Share:
        counts = count_targets(self.batches(), self.depths, self.separate_documents)
        return Share(num_targets=counts, weights=[1.0, *[0.3 / max(self.depths - 1, 1)] * (self.depths - 1)])

    @property
    def alpha(self) -> float:
        return ALPHA / (self.layout.dp * self.layout.microbatches)


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """Of one rank, or of one process that has all tokens."""

    gradients: dict[str, Tensor]
    losses: dict[int, Tensor]  # by micro-batch of all ranks
    balance: float
    counts: dict[int, Tensor]
    was_whole: bool = True  # whether gradients did not change after they were given
    was_early: bool = False  # whether a gradient was given before the last message was sent
    peak: int = 0
    nic: int = 0  # bytes sent by the pipeline
    node: int = 0


# ---- One process ----


def alone(case: Case) -> Found:
    model = Transformer(case.spec, case.dtype, recompute=case.recompute)
    initialize(model, SEED)
    share, gradients, losses, balance, counts = case.share(), dict[str, Tensor](), dict[int, Tensor](), 0.0, []
    for index, batch in enumerate(case.batches()):
        found = compute_losses(model, batch, case.separate_documents, share)
        torch.stack([found.token, *found.mtp, case.alpha * found.balance]).sum().backward()
        for name, parameter in model.named_parameters():
            grad = parameter.grad.float()
            gradients[name] = gradients[name] + grad if name in gradients else grad
            parameter.grad = None
        losses[index], balance = found.plain, balance + case.alpha * found.balance.item()
        counts = [a + b for a, b in zip(counts, found.counts, strict=True)] if counts else found.counts
    layers = range(case.spec.num_hidden_layers + case.depths - 1)
    by_layer = dict(zip(filter(case.spec.is_moe_layer, layers), counts, strict=True))
    return Found(gradients=gradients, losses=losses, balance=balance, counts=by_layer)


# ---- Ranks ----


@functools.cache
def mesh_of(pp: int, dp: int, ep: int, ranks_per_node: int) -> Mesh:
    return form_mesh(Layout(pp=pp, dp=dp, ep=ep), ranks_per_node)


def on_ranks(cases: Sequence[Case]) -> list[Found]:
    return [_on_rank(case) for case in cases]


def _on_rank(case: Case) -> Found:
    layout, schedule = case.layout, case.schedule
    mesh = mesh_of(layout.pp, layout.dp, layout.ep, case.ranks_per_node)
    places = schedule.held_by(mesh.pp.index)
    models = build_stages(case.spec, stages(case.spec, layout), places, case.dtype, case.recompute)
    dispatcher = DISPATCHERS[case.hops](mesh)
    for model in models.values():
        initialize(model, SEED)
        if layout.ep > 1:
            take_part(model, mesh, dispatcher)
    first = mesh.dp.index * layout.microbatches
    own = case.batches()[first : first + layout.microbatches]
    pipeline = Pipeline(models, schedule, mesh, case.is_overlapped)
    given, before = dict[str, Tensor](), list[int]()

    def give(name: str, gradient: Tensor) -> None:
        assert name not in given, f"{name} is given twice"
        given[name] = gradient.clone()
        before.append(pipeline.traffic.nic + pipeline.traffic.node)

    with BROKEN.get(case.twin, nullcontext)():
        step = pipeline.run(own, aims_of(case), give)
    return Found(
        gradients=step.gradients,
        was_whole=given.keys() == step.gradients.keys()
        and all(torch.equal(gradient, given[name]) for name, gradient in step.gradients.items()),
        was_early=before[0] < pipeline.traffic.nic + pipeline.traffic.node,
        losses={first + index: report for index, report in step.reports.items()},
        balance=float(sum(step.balances.values())),
        counts=step.counts,
        peak=step.peak,
        nic=pipeline.traffic.nic,
        node=pipeline.traffic.node,
    )


def aims_of(case: Case) -> Aims:
    share, moe = case.share(), case.spec.moe

    def end(model: Transformer, output: Output, batch: Batch) -> Ended:
        found = end_losses(model, output, batch, case.separate_documents, share)
        loss = torch.stack([found.token, *found.mtp]).sum()
        return Ended(loss=loss, routings=found.routings, report=found.plain)

    def balance(routings: Sequence[Routing], batch: Batch) -> Tensor:
        assert moe is not None
        return case.alpha * torch.stack([balance_loss(each, len(batch.tokens), moe) for each in routings]).sum()

    return Aims(end=end, balance=balance, separate_documents=case.separate_documents)


def joined(case: Case, found: Sequence[Found]) -> tuple[Found, set[str]]:
    """The ranks' results as one, and the names of weights whose gradient is one rank's alone."""
    gradients, losses, counts = dict[str, Tensor](), dict[int, Tensor](), dict[int, Tensor]()
    holders = dict[str, int]()
    for name in {name for each in found for name in each.gradients}:
        here = [rank for rank, each in enumerate(found) if name in each.gradients]
        holders[name] = len(here)
        if ".mlp.experts." in name:
            blocks = [[rank for rank in here if rank % case.layout.ep == member] for member in range(case.layout.ep)]
            gradients[name] = torch.cat([sum(found[rank].gradients[name] for rank in block) for block in blocks])
        else:
            gradients[name] = sum(found[rank].gradients[name] for rank in here)
    for each in found:
        losses |= each.losses
        for layer, count in each.counts.items():
            counts[layer] = counts.get(layer, 0) + count
    balance = sum(each.balance for each in found)
    single = {name for name, count in holders.items() if count == 1}
    return Found(gradients=gradients, losses=losses, balance=balance, counts=counts), single


def refusals(spec: ModelSpec) -> list[str]:
    """The messages for a schedule of other ranks, and for other micro-batches than the schedule has."""
    right = Case(spec=spec, layout=Layout(pp=2, microbatches=2))
    mesh, schedule, found = mesh_of(2, 1, 1, 1), right.schedule, []
    models = build_stages(spec, stages(spec, right.layout), schedule.held_by(mesh.pp.index), torch.float32)
    for attempt in (
        lambda: Pipeline(models, make_schedule("1f1b", 3, 2), mesh),
        lambda: Pipeline(models, schedule, mesh).run(right.batches()[:1], aims_of(right)),
    ):
        try:
            attempt()
        except ValueError as error:
            found.append(str(error))
    return found


# ---- Twins with a fault each ----


@contextmanager
def _embedding_twice() -> Iterator[None]:
    collect = Held._collect

    def twice(self: Held) -> None:
        embedding = self._parameters.get("embed_tokens.weight")
        if embedding is not None and embedding.grad is not None:
            embedding.grad *= 2
        collect(self)

    with patch.object(Held, "_collect", twice):
        yield


@contextmanager
def _dropped() -> Iterator[None]:
    """The weight half of one micro-batch is never made."""
    weights = Held.weights

    def dropping(self: Held, microbatch: int) -> None:
        if microbatch == 1:
            del self.kept[microbatch]
        else:
            weights(self, microbatch)

    with patch.object(Held, "weights", dropping):
        yield


@contextmanager
def _swapped() -> Iterator[None]:
    """The first two messages of each rank are taken for each other."""

    def swapping(sent: Sequence[Message], rank: int) -> dict[int, tuple[Due, ...]]:
        found = {}
        for source, (one, two, *rest) in arrivals(sent, rank).items():
            found[source] = (replace(one, message=two.message), replace(two, message=one.message), *rest)
        return found

    with patch.object(mail, "arrivals", swapping), patch.object(mail, "AHEAD", 99):
        yield


@contextmanager
def _hasty() -> Iterator[None]:
    """Gradients are given after the first backward pass of a stage."""
    init = _Run.__init__

    def hasty(self: _Run, *arguments: Any) -> None:
        init(self, *arguments)
        self._left = Counter(list(self._left))

    with patch.object(_Run, "__init__", hasty):
        yield


BROKEN = {"embedding twice": _embedding_twice, "dropped": _dropped, "swapped": _swapped, "hasty": _hasty}
