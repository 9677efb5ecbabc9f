"""Lists the simulated exchanges of a plan: one group alone, and all groups at once."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dovetail.cost.ops.ops import Collective, Exchange, Op, Send
from dovetail.network.demands.closed_forms import Mode
from dovetail.planner.serving.pieces import Work, layer_ops_of
from dovetail.planner.serving.plan import ServingPlan
from dovetail.planner.training.chunks import Workload, operations
from dovetail.planner.training.plan import TrainingPlan, slowest_update, stage_send

if TYPE_CHECKING:  # it loads NumPy, which closed forms do not need
    from dovetail.network.delivery.layout_traffic import AtOnce, LayoutTraffic

PASS = {"forward": "forward", "dgrad": "backward", "wgrad": "backward"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Simulated:
    """One exchange of a plan, and the part of the plan that it belongs to."""

    name: str
    part: str
    seconds: AtOnce


def networks_of(plan: TrainingPlan | ServingPlan) -> list[LayoutTraffic]:
    """Return the networks on which exchanges were simulated, or none if closed forms were used.

    For serving it is the prompts' network and then the outputs', or one if they are alike.
    """
    works = [plan.work] if isinstance(plan, TrainingPlan) else [plan.prefill.work, plan.decode.work]
    return list({str(work.traffic): work.traffic for work in works if work.traffic}.values())


def networks_text(plan: TrainingPlan | ServingPlan) -> str:
    """Return the names of these networks, with routing and failures, or "" for closed forms."""
    return " and ".join(map(str, networks_of(plan)))


def simulated(plan: TrainingPlan | ServingPlan) -> list[Simulated]:
    """Return each kind of exchange of a plan in its order, and of those between the same groups the longest.

    There are none if closed forms were used.
    """
    if not networks_of(plan):
        return []
    longest: dict[tuple[object, ...], Simulated] = {}
    for each in _all(plan):
        key = each.part, each.name, each.seconds.groups, each.seconds.ranks
        if key not in longest or each.seconds.alone > longest[key].seconds.alone:
            longest[key] = each
    return list(longest.values())


def _all(plan: TrainingPlan | ServingPlan) -> Iterator[Simulated]:
    if isinstance(plan, TrainingPlan):
        yield from _training(plan.work)
    else:
        yield from _serving(plan.prefill.work, "prompts")
        yield from _serving(plan.decode.work, "outputs")


def _training(work: Workload) -> Iterator[Simulated]:
    yield from _each(work.traffic, operations(work, "experts"), "layer")
    yield from _each(work.traffic, [stage_send(work)], "pipeline")
    yield from _each(work.traffic, slowest_update(work)[0], "optimizer")


def _serving(work: Work, part: str) -> Iterator[Simulated]:
    yield from _each(work.traffic, layer_ops_of(work), part, work.mode)


def _each(
    traffic: LayoutTraffic | None, ops: Iterable[Op | Send], part: str, mode: Mode = "normal"
) -> Iterator[Simulated]:
    assert traffic is not None
    for op in ops:
        if isinstance(op, Exchange | Collective | Send) and traffic.is_sent(op):
            yield Simulated(name=_name(op), part=part, seconds=traffic.at_once(op, mode))


def _name(op: Exchange | Collective | Send) -> str:
    if isinstance(op, Send):
        return "to the next stage"
    name = op.name.replace("_", "-")
    return f"{name}, {PASS[op.pass_]}" if op.part != "step" else name
