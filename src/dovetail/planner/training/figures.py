"""The figures of a training plan, each with its formula, inputs and sources.

Times of a step are means over the ranks of a pipeline, as in ISCA Table 4. Times of a layer are those of one
micro-batch in a layer with experts (or in any layer, if the model has none), with each operation run alone.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

from dovetail.cost.count import training_flop_per_token
from dovetail.cost.ops.ops import Exchange, Op
from dovetail.planner.figure import Figure, Input, number
from dovetail.planner.operation import operation_time
from dovetail.planner.training.chunks import Workload, operations
from dovetail.planner.training.plan import TrainingPlan, slowest_update
from dovetail.spec.band import Band, sum_bands

PARTS = {  # field of StepParts, its title, and the steps of a schedule that it counts
    "forward": ("forward alone (1F)", "F"),
    "input_backward": ("gradients of inputs alone (1B)", "IB"),
    "weight_backward": ("gradients of weights alone (1W)", "WB"),
    "pair": ("forward and backward overlapped (1F1B)", "FB"),
}
SUFFIX = {"forward": "", "dgrad": "_backward", "wgrad": "_weights"}
PASS = {"forward": "forward", "dgrad": "gradients of inputs", "wgrad": "gradients of weights"}
NAMES = {"mlp": "feed-forward and residual", "shared": "shared expert"}
COUNTED = "matrix products and attention, no recomputation, MTP apart [ISCA §2.2.2]"
USES = {  # field of RankMemory, and how it is held
    "weights": "BF16, norms and router FP32 [V3 §3.3]",
    "gradients": "FP32 accumulators [V3 §3.3.3]",
    "master_weights": "FP32 [V3 §3.3.3]",
    "moments": "of the recipe's format [V3 §3.3.3]",
    "activations": "of the micro-batches in flight, with recomputation [V3 §3.2.3]",
    "buffers": "one layer forward and one backward at work; an estimate",
}
STATE = ("master_weights", "moments")  # what ZeRO-1 shares out


def training_figures(plan: TrainingPlan) -> tuple[Figure, ...]:
    """Return the step first, then rates, memory, the run if the goal has tokens, and operations of a layer."""
    return (*step_figures(plan), *_rates(plan), memory_figure(plan), *_run(plan), *layer_figures(plan.work))


def step_figures(plan: TrainingPlan) -> tuple[Figure, ...]:
    """Return the step and the parts that add up to it."""
    parts, timeline = plan.parts, plan.timeline
    named = [*((key, title) for key, (title, _) in PARTS.items()), ("bubble", "idle"), ("optimizer", "optimizer")]
    terms = " + ".join(f"{number(getattr(parts, key).value)} ({title})" for key, title in named)
    kinds: Counter[str] = Counter(step.kind for steps in timeline.schedule.actions for step in steps)
    found = [_seconds("step_time", "step", plan.step_seconds, terms, _layout_input(plan))]
    for key, (title, letters) in PARTS.items():
        found.append(_part(plan, key, title, kinds, ("FB",) if letters == "FB" else tuple(letters)))
    idle = sum(timeline.bubble) / len(timeline.bubble)
    bubble = f"{number(timeline.seconds)} s until the last rank is done - {number(timeline.seconds - idle)} s of work"
    schedule = Input(
        name="schedule",
        value=f"{timeline.schedule.name}, {timeline.schedule.ranks} ranks, {timeline.schedule.microbatches} "
        "micro-batches, replayed step by step",
    )
    found.append(_seconds("bubble", "idle", parts.bubble, bubble, schedule))
    ops = [_op_input(op, plan.work, None) for op in slowest_update(plan.work)[0]]
    text = "of the pipeline rank that takes longest: the operations below, all of them exposed"
    return (*found, _seconds("optimizer", "optimizer", parts.optimizer, text, *ops))


def layer_figures(work: Workload) -> tuple[Figure, ...]:
    """Return the operations of a layer with experts, then those of the head, for one micro-batch."""
    groups: dict[tuple[str, str], list[Op]] = {}
    for op in (*operations(work, "experts"), *operations(work, "head")):
        groups.setdefault((op.name if isinstance(op, Exchange) else op.part, op.pass_), []).append(op)
    found = []
    for (name, pass_), ops in groups.items():
        bands = [operation_time(op, work.cluster, work.multiprocessors, traffic=work.traffic).seconds for op in ops]
        total, formula = 1e3 * sum_bands(bands), " + ".join(number(1e3 * band.value) for band in bands)
        where = "one micro-batch" if name == "head" else "one layer and micro-batch"
        title = f"{NAMES.get(name, name)} of {where}, {PASS[pass_]}"
        inputs = tuple(_op_input(op, work, work.multiprocessors) for op in ops)
        key = (name or "other") + SUFFIX[pass_]
        found.append(Figure(key=key, title=title, band=total, unit="ms", formula=formula, inputs=inputs))
    return tuple(found)


def memory_figure(plan: TrainingPlan) -> Figure:
    """Return the memory of the fullest rank, with the runtime's bytes."""
    rank, runtime = plan.largest_memory, plan.work.cluster.gpu.runtime_bytes
    shared = "shared out over the ranks that hold the same weight (ZeRO-1)"
    state = f", {shared if plan.work.layout.zero else 'whole on every rank'}"
    uses = [
        (name.replace("_", " "), getattr(rank, name), source + (state if name in STATE else ""))
        for name, source in USES.items()
    ]
    uses.append(("runtime", int(runtime), "CUDA's context and communicators; unverified" if runtime else "none"))
    low, high = rank.band
    flights = ", ".join(f"{count} of stage {stage}" for stage, count in rank.in_flight)
    inputs = [Input(name=name, value=f"{size / 1e9:.2f} GB", source=source) for name, size, source in uses]
    inputs.append(Input(name="rank", value=f"{rank.rank}, of 0 to {len(plan.memory) - 1}"))
    inputs.append(Input(name="micro-batches in flight", value=flights))
    inputs.append(Input(name="on the host", value=f"{rank.host_average / 1e9:.2f} GB", source="moving average"))
    inputs.append(Input(name="GPU", value=f"{plan.work.cluster.gpu.memory_bytes / 1e9:.1f} GB"))
    return Figure(
        key="memory",
        title="memory of the fullest rank",
        band=Band(rank.total + runtime, low + runtime, high + runtime) / 1e9,
        unit="GB",
        formula=" + ".join(f"{size / 1e9:.2f} ({name})" for name, size, _ in uses),
        inputs=tuple(inputs),
    )


def _rates(plan: TrainingPlan) -> Iterator[Figure]:
    tokens, step = f"{plan.tokens_per_step:,} tokens", f"{number(plan.step_seconds.value)} s"
    work, gpu = plan.work, plan.work.cluster.gpu
    batch = Input(name="tokens of a step", value=f"{plan.goal.batch:,} x {work.sequence_length:,}", source="the goal")
    yield Figure(
        key="tokens_per_day",
        title="tokens per day",
        band=plan.tokens_per_day,
        unit="tokens",
        formula=f"{tokens} x 86,400 s / {step}",
        inputs=(batch,),
    )
    for suffix, title, causal in (("", "", False), ("_causal", ", causal", True)):
        flop = training_flop_per_token(work.spec, work.sequence_length, causal)
        per_token = Input(name="FLOP per token", value=f"{flop:.4g}", source=COUNTED)
        rate, peak = plan.flop_rate(causal), gpu.peak("bf16")
        yield Figure(
            key=f"tflops{suffix}",
            title=f"TFLOPS per GPU{title}",
            band=rate / 1e12,
            unit="TFLOPS",
            formula=f"{flop:.4g} FLOP x {tokens} / {plan.gpus:,} GPUs / {step}",
            inputs=(per_token, batch),
        )
        yield Figure(
            key=f"mfu{suffix}",
            title=f"share of the BF16 peak (MFU){title}",
            band=100 * plan.mfu(causal),
            unit="%",
            formula=f"{number(rate.value / 1e12)} TFLOPS / {number(peak / 1e12)} TFLOPS",
            inputs=(per_token, Input(name="peak", value=f"{peak / 1e12:g} TFLOPS, BF16", source=gpu.source)),
        )


def _run(plan: TrainingPlan) -> Iterator[Figure]:
    """Yield the figures of the whole run; none if the goal has no tokens."""
    seconds, hours, dollars, cluster = plan.seconds, plan.gpu_hours, plan.dollars, plan.work.cluster
    if seconds is None or hours is None or plan.goal.tokens is None:
        return
    steps = f"{plan.goal.tokens:.4g} / {plan.tokens_per_step:,} tokens x {number(plan.step_seconds.value)} s"
    run = Input(name="tokens", value=f"{plan.goal.tokens:.4g}", source="the goal; no restarts, evaluation or annealing")
    days = seconds / 86400
    yield Figure(key="days", title="wall clock", band=days, unit="days", formula=f"{steps} / 86,400", inputs=(run,))
    formula = f"{steps} x {plan.gpus:,} GPUs / 3,600"
    yield Figure(key="gpu_hours", title="GPU hours", band=hours, unit="hours", formula=formula, inputs=(run,))
    price = cluster.price_per_gpu_hour or cluster.gpu.price_per_hour
    if dollars is not None and price is not None:
        rent = Input(name="price", value=f"{price.value:g} $ per GPU and hour", source=price.source)
        formula = f"{number(hours.value)} h x {price.value:g} $/h"
        yield Figure(key="dollars", title="dollars", band=dollars, unit="$", formula=formula, inputs=(rent,))


def _part(plan: TrainingPlan, key: str, title: str, kinds: Counter[str], letters: tuple[str, ...]) -> Figure:
    """Return a part as steps per rank times their mean length; B counts if backwards are not split."""
    band, ranks = getattr(plan.parts, key), plan.timeline.schedule.ranks
    count = sum(kinds[kind] for kind in letters) / ranks
    formula = f"{number(count)} per rank (mean) x {number(band.value / count)} s" if count else "none in this schedule"
    inputs = _stage_inputs(getattr(plan.timeline.durations, key)) if count else ()
    return _seconds(key, title, band, formula, *inputs)


def _stage_inputs(seconds: float | Sequence[float] | None) -> Iterator[Input]:
    """Yield the seconds of the first stage, the middle one and the last."""
    each = [seconds] if isinstance(seconds, int | float) else list(seconds or ())
    source = "sum of its layers' operations: explain attention, experts, dispatch, combine"
    for index in sorted({0, len(each) // 2, len(each) - 1} if each else ()):
        yield Input(name=f"stage {index}", value=f"{number(1e3 * each[index])} ms", source=source)


def _op_input(op: Op, work: Workload, multiprocessors: int | None) -> Input:
    timed = operation_time(op, work.cluster, multiprocessors, traffic=work.traffic)
    value = f"{number(1e6 * timed.seconds.value)} us: {timed.formula}"
    return Input(name=op.name, value=value, source=timed.source)


def _layout_input(plan: TrainingPlan) -> Input:
    layout = plan.work.layout
    value = f"pp {layout.pp}, ep {layout.ep}, tp {layout.tp}, dp {layout.dp}, {layout.schedule}"
    return Input(name="layout", value=value, source="given, or found by the search")


def _seconds(key: str, title: str, band: Band, formula: str, *inputs: Input) -> Figure:
    return Figure(key=key, title=title, band=band, unit="s", formula=formula, inputs=tuple(inputs))
