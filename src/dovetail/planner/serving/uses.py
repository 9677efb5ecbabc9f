"""The uses of a step's time in either pool, each with its operations."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace

from dovetail.cost.ops.ffn import touched_experts
from dovetail.planner.figure import Figure, Input, number
from dovetail.planner.serving.decode import DecodePlan
from dovetail.planner.serving.pieces import (
    KERNEL_SOURCE,
    TimedOp,
    Work,
    timed_dense_layer,
    timed_ends,
    timed_layer,
    timed_mtp,
)
from dovetail.planner.serving.prefill import PrefillPlan

Pool = PrefillPlan | DecodePlan

PIECES_OF = {  # uses of a step's time, and the pieces with their operations
    "attention and gate": ("before", "core"),
    "attention projections": ("before",),
    "attention core, o_proj, gate": ("core",),
    "experts": ("experts",),
    "shared experts": ("shared",),
    "waiting for exchanges": ("dispatch", "combine"),
}
KERNELS = ("issue_dispatch", "take_dispatch", "issue_combine", "take_combine")


def use_figures(plan: Pool, pool: str, unit: str, scale: float) -> Iterator[Figure]:
    """Yield the uses of a step of `pool` in `unit`, of which a second has `scale`."""
    for name, band in plan.seconds_by_use.items():
        formula, inputs = _use(plan, name, unit, scale)
        key = f"{pool}.{name.replace(',', '').replace(' ', '_')}"
        yield Figure(key=key, title=name, band=scale * band, unit=unit, formula=formula, inputs=tuple(inputs))


def _use(plan: Pool, name: str, unit: str, scale: float) -> tuple[str, Iterable[Input]]:
    """Return formula and inputs of one use of a step's time."""
    spec, work = plan.work.spec, plan.work
    if name == "waiting for exchanges":
        both, compute = (scale * each.value for each in (plan.layers.seconds, plan.layers.compute))
        order = f"{number(both)} {unit} of all layers in the published order [day 6] - {number(compute)} of arithmetic"
        return order, operations(plan, PIECES_OF[name])
    if name == "embedding and head":
        tokens = plan.goal.microbatches * work.tokens
        ends = timed_ends(replace(work, tokens=tokens), tokens if isinstance(plan, DecodePlan) else plan.sampled)
        return " + ".join(number(1e6 * op.seconds.value) for op in ends) + " us (all micro-batches)", map(_input, ends)
    if name == "MTP":
        return "its operations, micro-batches overlapped as in other layers", map(_input, timed_mtp(work))
    if name == "dense layers":
        dense = timed_dense_layer(work)
        each = sum(op.seconds.value for op in dense)
        return _times(plan, spec.num_hidden_layers - spec.num_moe_layers, each), map(_input, dense)
    if name == "kernels of exchanges":
        kernels = {each: getattr(plan.pieces, each).value for each in KERNELS}
        inputs = (
            Input(name=each.replace("_", " "), value=f"{number(1e6 * seconds)} us", source=KERNEL_SOURCE)
            for each, seconds in kernels.items()
        )
        return _times(plan, spec.num_moe_layers, sum(kernels.values())), inputs
    pieces = PIECES_OF[name]
    each = sum(getattr(plan.pieces, piece).value for piece in pieces)
    touched = [_touched(work)] if name == "experts" else []
    return _times(plan, spec.num_moe_layers, each), [*touched, *operations(plan, pieces)]


def _touched(work: Work) -> Input:
    """Return the experts of a GPU whose weights a micro-batch reads, as `touched_experts` computes them."""
    moe, layout = work.spec.moe, work.layout
    if moe is None:
        return Input(name="experts", value="none")
    here, tokens = layout.experts_per_rank(work.spec), work.own_tokens * layout.ep
    touched, share = (
        touched_experts(work.spec, layout, work.own_tokens),
        f"{moe.num_experts_per_tok} / {here * layout.ep}",
    )
    return Input(
        name="experts that are read",
        value=f"{number(touched)} of {here} on a GPU: {here} x (1 - (1 - {share})^{tokens:g})",
        source=f"expected of a micro-batch's {tokens:g} tokens on the {layout.ep} GPUs that share the experts",
    )


def _times(plan: Pool, layers: int, seconds: float) -> str:
    count = plan.goal.microbatches
    return f"{layers} layers x {count} micro-batch{'es' if count > 1 else ''} x {number(1e6 * seconds)} us"


def operations(plan: Pool, pieces: tuple[str, ...]) -> Iterator[Input]:
    return (_input(op) for op in timed_layer(plan.work) if op.piece in pieces)


def _input(op: TimedOp) -> Input:
    return Input(name=op.name, value=f"{number(op.seconds.value * 1e6)} us: {op.formula}", source=op.source)
