"""The ranks of a layout as a team: other tokens, other experts or other stages on each.

    dp    each rank reads its part of the batch; gradients are summed over those that hold a weight, each sent off as
          soon as no micro-batch adds to it any more (`parallel.weights.shard`)
    ep    experts are on several ranks, and rows go to them and back (`parallel.experts.dispatch`)
    pp    a rank has stages, and micro-batches pass them as a schedule says (`parallel.pipeline`)

Losses and loads of experts are summed over all ranks, once a step: each rank tells what it has found, and nobody finds
the same.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from dovetail.model.experts.gate import Routing
from dovetail.model.transformer import Output, Transformer
from dovetail.parallel.expected import Ways, expected_bytes
from dovetail.parallel.experts.dispatch import OneHop, TwoHop
from dovetail.parallel.mesh import Mesh
from dovetail.parallel.pipeline.forward import forward
from dovetail.parallel.pipeline.held import Aims, Ended
from dovetail.parallel.pipeline.pipeline import Pipeline, PipelineStep, Place
from dovetail.parallel.schedules.pipelines import make_schedule
from dovetail.parallel.told import Account, Told
from dovetail.parallel.traffic import Traffic
from dovetail.parallel.weights.pieces import Piece
from dovetail.parallel.weights.replicas import replicas_of
from dovetail.parallel.weights.shard import Shares
from dovetail.spec.layout import Layout
from dovetail.text.corpus import Batch
from dovetail.train.step.losses import balance_losses, count_targets, end_losses
from dovetail.train.step.team import Aim, Sums, backward


class Ranks:
    """A rank, by its stages: one, and no pipeline, where the layout has one stage."""

    def __init__(
        self,
        models: Mapping[Place, Transformer],
        mesh: Mesh,
        shares: Shares,
        layout: Layout,
        ways: Ways,
        replica_check: int = 0,
    ) -> None:
        """Every `replica_check` steps ranks compare the weights that they have in common; 0: never."""
        self.models, self.mesh, self.shares, self.layout = list(models.values()), mesh, shares, layout
        self.spec = self.models[0].spec
        self._stages = models
        self._between_stages = Traffic()
        self._step, self._ways, self._account = 0, ways, Account(self._sent, mesh.turns, self._device)
        self._replica_check, self._replicas = replica_check, replicas_of(self.models, shares)
        self.num_shares, self.index, self.expert_ranks = mesh.dp.size, mesh.dp.index, layout.ep
        depths = self.spec.num_nextn_predict_layers
        self._layers = [each for each in range(self.spec.num_hidden_layers + depths) if self.spec.is_moe_layer(each)]

    def parameters(self) -> Mapping[str, Tensor | Piece]:
        return self.shares.pieces()

    def begin(self, step: int) -> None:
        self._step = step
        self._account.begin()

    def num_targets(self, batches: Sequence[Batch], separate_documents: bool) -> list[int]:
        counts = count_targets(batches, 1 + self.spec.num_nextn_predict_layers, separate_documents)
        if not separate_documents:  # each rank has as many
            return [self.num_shares * count for count in counts]
        total = torch.tensor(counts, device=self._device)
        self.mesh.turns.await_exchange(dist.all_reduce(total, group=self.mesh.dp.handle, async_op=True))
        found: list[int] = total.tolist()
        return found

    def backward(self, batches: Sequence[Batch], aim: Aim) -> Sums:
        layout = self.layout.model_copy(update={"microbatches": len(batches)})
        self._account.expect(Traffic(*expected_bytes(self.spec, layout, self._ways)[self.mesh.rank]))
        if self.layout.pp == 1:
            return backward(self.models[0], batches, aim, in_fp32=True, give=self.shares.give)
        batches = [_on(self._device, batch) for batch in batches]
        return self._sums(self._pipeline(len(batches)).run(batches, self._aims(aim), self.shares.give))

    def add_up(self, sums: Sums) -> Sums:
        # The loads of all layers in one tensor, zeros for layers that are on other stages.
        none = torch.zeros(self._experts, dtype=torch.int64, device=self._device)
        counts = torch.stack([sums.counts.get(layer, none) for layer in self._layers]) if self._layers else none
        turns, losses = self.mesh.turns, sums.losses.clone()
        self._account.end_work()
        with turns.waiting("stages" if self.layout.pp > 1 else "gradients"):  # the ranks that end later
            dist.all_reduce(losses)
        dist.all_reduce(counts)
        if self._replica_check and self._step % self._replica_check == 0:
            self._replicas.compare(self._step)
        with turns.waiting("gradients"):
            gradients = self.shares.finish()
        return Sums(gradients=gradients, losses=losses, counts=dict(zip(self._layers, counts, strict=False)))

    def norm(self, squares: Mapping[str, Tensor]) -> float:
        return self.shares.norm(squares)

    def gather(self) -> None:
        with self.mesh.turns.waiting("gradients"):
            self.shares.gather()

    def told(self) -> list[Told]:
        return self._account.tell()

    def hidden(self, tokens: Tensor) -> Tensor | None:
        if self.layout.pp > 1:
            return forward(self._pipeline(self.layout.microbatches), tokens)
        hidden: Tensor = self.models[0](tokens).hidden
        return hidden

    def _sent(self) -> Traffic:
        hops = [each.dispatcher for each in self.models if isinstance(each.dispatcher, OneHop | TwoHop)]
        parts = [self.shares.traffic, self._between_stages, *(each.traffic for each in hops)]
        return sum(parts, Traffic())

    @property
    def _device(self) -> torch.device:
        return next(self.models[0].parameters()).device

    @property
    def _experts(self) -> int:
        return self.spec.moe.n_routed_experts if self.spec.moe else 0

    def _pipeline(self, microbatches: int) -> Pipeline:
        """A batch that grows has more of them."""
        layout = self.layout
        schedule = make_schedule(layout.schedule, layout.pp, microbatches, layout.chunks)
        return Pipeline(self._stages, schedule, self.mesh, traffic=self._between_stages)

    def _aims(self, aim: Aim) -> Aims:
        def end(model: Transformer, output: Output, batch: Batch) -> Ended:
            losses = end_losses(model, output, batch, aim.separate_documents, aim.share)
            loss = torch.stack([losses.token, *losses.mtp]).sum()
            return Ended(loss=loss, routings=losses.routings, report=losses.plain)

        def balance(routings: Sequence[Routing], batch: Batch) -> Tensor:
            return aim.alpha * balance_losses(routings, len(batch.tokens), self.spec)

        return Aims(end=end, balance=balance, separate_documents=aim.separate_documents)

    def _sums(self, step: PipelineStep) -> Sums:
        losses = torch.zeros(2 + self.spec.num_nextn_predict_layers, dtype=torch.float64, device=self._device)
        for plain in step.reports.values():
            assert isinstance(plain, Tensor)
            losses[:-1] += plain.double()
        for balance in step.balances.values():
            losses[-1] += balance.double()
        return Sums(gradients=step.gradients, losses=losses, counts=step.counts)


def _on(device: torch.device, batch: Batch) -> Batch:
    return Batch(tokens=batch.tokens.to(device), document_ids=batch.document_ids.to(device))
