"""Turns a question's collective into the flows to simulate, for one fabric, number of GPUs and size."""

from __future__ import annotations

from dataclasses import dataclass

from dovetail.network.ask.expert_traffic import TOKENS, ExpertCopies, check_exchange, exchange_demand, recorded_tokens
from dovetail.network.ask.question import EXPERTS, Question
from dovetail.network.demands import collectives, transfers
from dovetail.network.demands.collectives import Demand
from dovetail.network.fabric.topology import Fabric

SIZE = 2.0**30  # bytes, if none are given


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Task:
    """The demand to simulate; `copies` are for dispatch and combine only."""

    demand: Demand
    copies: ExpertCopies | None = None


def amounts_of(question: Question) -> tuple[float, ...]:
    """Return the sizes in bytes to simulate, or the tokens per GPU for dispatch and combine.

    Raises ValueError for a recording that cannot be read.
    """
    if not question.is_of_experts:
        return question.sizes or (SIZE,)
    recorded = recorded_tokens(question)
    return question.tokens or (TOKENS if recorded is None else recorded,)


def task_of(question: Question, name: str, fabric: Fabric, gpus: int, amount: float) -> Task:
    """Return the collective `name` (one of `question.BESIDE`) among the first `gpus`, with the question's options.

    Raises ValueError for GPUs that it cannot be run on.
    """
    ranks, node = range(gpus), fabric.gpus_per_node
    if name in EXPERTS:
        demand, copies = exchange_demand(question, name, fabric, gpus, int(amount))
        return Task(demand=demand, copies=copies)
    if name == "host-copy":
        return Task(demand=transfers.host_copy(fabric, ranks, amount))
    if name == "node-all-gather":
        return Task(demand=transfers.node_all_gather(fabric, ranks, amount))
    if name == "pipeline":
        assert question.stages is not None  # `Question` has checked that
        return Task(demand=transfers.pipeline(ranks, amount, question.stages, question.both_ways))
    if name == "kv-transfer":
        senders = gpus // 2 if question.prefill_gpus is None else question.prefill_gpus
        return Task(demand=transfers.kv_transfer(ranks, amount, senders, node))
    return Task(demand=collectives.collective(name, ranks, amount, node, question.channels or node))


def check_task(question: Question, name: str, fabric: Fabric, gpus: int) -> None:
    """Raise ValueError as `task_of` does, at little cost."""
    if name in EXPERTS:
        own = amounts_of(question) if name == question.collective else ()
        other = question.other[1:] if question.other and name == question.other[0] else ()
        check_exchange(question, name, fabric, gpus, int(max((*own, *other))))
    elif name not in collectives.COLLECTIVES:
        task_of(question, name, fabric, gpus, 0.0)


def num_flows(question: Question, name: str, fabric: Fabric, gpus: int) -> int:
    """Return an upper bound of the number of flows, without making them."""
    node = fabric.gpus_per_node
    if name == "all-to-all":
        return gpus**2
    if name in EXPERTS:
        return gpus**2 if question.mode == "low-latency" else gpus * (gpus // node + node)
    if name in collectives.RINGS:
        return gpus * (question.channels or node)
    return 4 * gpus
