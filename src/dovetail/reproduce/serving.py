"""DeepSeek's published serving figures, predicted.

`planner.serving.production` makes the predictions and says which figures they can be compared with. In decoding one
assumption decides: that DeepEP's kernels, which issue and receive messages, occupy the multiprocessors for as long as
its users measured, and for no less if there are fewer tokens than multiprocessors. It was made after decoding had been
predicted too fast, so rows of decoding that are met are hindsight. The result without it is printed beside them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from dovetail.catalog.hardware import load_cluster
from dovetail.catalog.precision import load_recipe
from dovetail.catalog.presets import load_model
from dovetail.planner.serving import production
from dovetail.planner.serving.decode import DecodePlan, evaluate_decode
from dovetail.planner.serving.goal import ServingGoal
from dovetail.planner.serving.microbatches import NOTHING, overlap
from dovetail.reproduce.rows import Found
from dovetail.spec.model import ModelSpec


def find() -> Found:
    spec = load_model("deepseek-v3")
    readings = production.readings(spec)
    notes = (f"{each.name}: {each.note}" for each in readings if each.note)
    return Found(
        values={(each.name, each.unit): each.ours for each in readings}, remarks=(*notes, *_sensitivities(spec))
    )


def without_kernels(plan: DecodePlan) -> DecodePlan:
    """Return the same step as if exchanges needed the network only."""
    pieces = plan.pieces
    free = replace(
        pieces,
        issue_dispatch=NOTHING,
        take_dispatch=NOTHING,
        issue_combine=NOTHING,
        take_combine=NOTHING,
        dispatch=pieces.dispatch + pieces.issue_dispatch + pieces.take_dispatch,
        combine=pieces.combine + pieces.issue_combine + pieces.take_combine,
    )
    layers = overlap(free, "decode", plan.work.spec.num_moe_layers, plan.goal.microbatches)
    return replace(plan, pieces=free, layers=layers)


def _sensitivities(spec: ModelSpec) -> Iterator[str]:
    cluster, recipe = load_cluster("h800-decode"), load_recipe("deepseek-v3")
    profile = ServingGoal(context=4096, requests_per_gpu=128)
    live = production.production_goal().model_copy(update={"requests_per_gpu": 88})
    produced = production.OUTPUT_PER_NODE / cluster.gpus_per_node
    for name, layout, goal, published in (
        ("decode profile", production.PROFILED_DECODE_LAYOUT, profile, production.PROFILED_DECODE),
        ("88 requests per GPU", production.DECODE_LAYOUT, live, produced),
    ):
        plan = evaluate_decode(spec, cluster, layout, recipe, goal)
        taken, free = (each.tokens_per_second.value for each in (plan, without_kernels(plan)))
        yield (
            f"sensitivity, not the prediction: {name}: {taken:,.0f} tokens/s per GPU ({taken / published - 1:+.0%}) are"
            f" {free:,.0f} ({free / published - 1:+.0%}) if DeepEP's kernels took no multiprocessors"
        )
