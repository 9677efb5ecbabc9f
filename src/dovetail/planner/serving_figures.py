"""Every number of a serving plan with its formula, its inputs and their sources: what `--explain` prints."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from dovetail.planner.decode import DecodePlan
from dovetail.planner.figures import Figure, Input, number
from dovetail.planner.limits import SpeedLimit
from dovetail.planner.prefill import PrefillPlan
from dovetail.planner.serving import ServingPlan
from dovetail.planner.serving_pieces import KERNEL_SOURCE, TimedOp, Work, timed_ends, timed_layer
from dovetail.spec.band import Band

PIECES_OF = {  # uses of a step's time, and the pieces whose operations they are
    "attention and gate": ("before", "core"),
    "attention projections": ("before",),
    "attention core, o_proj, gate": ("core",),
    "experts": ("experts",),
    "shared experts": ("shared",),
    "waiting for exchanges": ("dispatch", "combine"),
}
OVERLAP = "both micro-batches' compute and network in the published order, less the compute [day 6]"


def figures(plan: ServingPlan) -> tuple[Figure, ...]:
    """Of the whole plan, both pools first."""
    found = [*prefill_figures(plan.prefill), *decode_figures(plan.decode)]
    if plan.limit is not None:
        found += _limit(plan.limit)
    return (*found, *_money(plan))


def prefill_figures(plan: PrefillPlan) -> tuple[Figure, ...]:
    goal, step = plan.goal, plan.step_seconds
    tokens = Input(name="tokens per GPU and step", value=f"{plan.tokens_per_step:,}", source="goal.prefill_tokens")
    nodes = Input(name="GPUs per node", value=str(plan.work.cluster.gpus_per_node), source=plan.work.cluster.source)
    hits = Input(name="cache hits", value=f"{goal.cache_hit:.1%}", source="goal.cache_hit")
    step_input = Input(name="step", value=f"{number(step.value)} s", source="prefill.step_seconds")
    rate, wait = f"{plan.tokens_per_step:,} / {number(step.value)} s", f"({plan.steps_per_prompt} + 1/2)"
    found = [
        Figure(
            key="prefill.step_seconds",
            title="a step of reading prompts",
            band=step,
            unit="s",
            formula=" + ".join(f"{number(band.value)} ({name})" for name, band in plan.seconds_by_use.items()),
            inputs=(tokens, Input(name="multiprocessors", value=str(plan.work.multiprocessors), source="day 6")),
        ),
        *_uses("prefill", plan.seconds_by_use, plan.work, goal.prefill_tokens / goal.computed_per_prompt, "s", 1.0),
        _rate("prefill.computed", "computed tokens per GPU", plan.computed_per_second, rate, tokens, step_input),
        _rate("prefill.computed_node", "computed tokens per node", plan.computed_per_node, f"{rate} x GPUs", nodes),
        _rate("prefill.input", "input tokens per GPU, with hits", plan.input_per_second, f"{rate} / (1 - hits)", hits),
        _rate("prefill.input_node", "input tokens per node", plan.input_per_node, f"{rate} / (1 - hits) x GPUs", hits),
        Figure(
            key="prefill.ttft",
            title="time to first token",
            band=plan.ttft,
            unit="s",
            formula=f"{wait} x {number(step.value)} + {number(plan.transfer_seconds.value)} (latents to the decoders)",
            inputs=(step_input,),
        ),
        _bytes("prefill.weights", "weights per GPU", plan.memory.weights, "the checkpoint's FP8 codes and scales"),
        _bytes("prefill.activations", "activations per GPU", plan.activation_bytes, "one micro-batch at its largest"),
    ]
    return tuple(found)


def decode_figures(plan: DecodePlan) -> tuple[Figure, ...]:
    goal, step, memory = plan.goal, plan.step_seconds, plan.memory
    per_step = Input(name="tokens of a request per step", value=f"{goal.tokens_per_step:g}", source="V3 §5.4.3")
    requests = Input(name="requests per GPU", value=str(plan.requests), source="goal, or the most that are fast enough")
    context = Input(name="context", value=f"{goal.mean_context:,.0f}", source="goal.context")
    gpus = plan.work.cluster.gpus_per_node
    rate = f"{plan.requests} x {goal.tokens_per_step:g} / {number(step.value)} s"
    free = plan.work.cluster.gpu.usable_bytes - memory.weights - memory.buffers
    fits = f"{free:.4g} B / ({goal.mean_context:,.0f} tokens x {memory.cache_per_token:,} B)"
    found = [
        Figure(
            key="decode.step_seconds",
            title="a step of decoding",
            band=1e3 * step,
            unit="ms",
            formula=" + ".join(f"{number(1e3 * band.value)} ({name})" for name, band in plan.seconds_by_use.items()),
            inputs=(requests, context),
        ),
        *_uses("decode", plan.seconds_by_use, plan.work, plan.requests, "ms", 1e3),
        Figure(
            key="decode.tpot",
            title="time per output token",
            band=1e3 * plan.tpot,
            unit="ms",
            formula=f"{number(1e3 * step.value)} ms / {goal.tokens_per_step:g}",
            inputs=(per_step,),
        ),
        _rate(
            "decode.speed", "output tokens of one user", plan.speed, f"1 / {number(1e3 * plan.tpot.value)} ms", per_step
        ),
        _rate("decode.tokens", "output tokens per GPU", plan.tokens_per_second, rate, requests),
        _rate("decode.tokens_node", "output tokens per node", plan.per_node, f"{gpus} GPUs x {rate}", requests),
        _count("decode.requests", "requests decoded at once per GPU", plan.requests, "what speed and memory allow"),
        _count("decode.requests_that_fit", "requests that fit per GPU", plan.requests_that_fit, fits),
        _bytes("decode.cache", "latents per GPU", plan.cache_bytes, f"{plan.requests} requests x context x bytes"),
        _bytes("decode.weights", "weights per GPU", memory.weights, "the checkpoint's FP8 codes and scales"),
        _bytes("decode.buffers", "buffers of exchanges per GPU", memory.buffers, "DeepEP's low-latency layout"),
        Figure(
            key="decode.communication",
            title="all exchanges of a step, one after the other",
            band=1e3 * plan.communication_seconds,
            unit="ms",
            formula=f"{plan.work.spec.num_moe_layers} layers x {goal.microbatches} x (dispatch + combine)",
            inputs=tuple(_ops(plan.work, ("dispatch", "combine"))),
        ),
    ]
    return tuple(found)


def _uses(pool: str, uses: dict[str, Band], work: Work, sampled: float, unit: str, scale: float) -> Iterator[Figure]:
    for name, band in uses.items():
        inputs: Iterable[Input] = _ops(work, PIECES_OF.get(name, ()))
        formula = "all layers and micro-batches of the operations below"
        if name == "waiting for exchanges":
            formula = OVERLAP
        elif name == "kernels of exchanges":
            inputs = (Input(name="issue and take", value="per dispatch and combine", source=KERNEL_SOURCE),)
        elif name == "embedding and head":
            inputs, formula = map(_input, timed_ends(work, sampled)), "the operations below, for all micro-batches"
        elif name in ("MTP", "dense layers"):
            formula = "the sum of its operations, as for other layers"
        key = f"{pool}.{name.replace(',', '').replace(' ', '_')}"
        yield Figure(key=key, title=name, band=scale * band, unit=unit, formula=formula, inputs=tuple(inputs))


def _ops(work: Work, pieces: tuple[str, ...]) -> Iterator[Input]:
    return (_input(op) for op in timed_layer(work) if op.piece in pieces) if pieces else iter(())


def _input(op: TimedOp) -> Input:
    return Input(name=op.name, value=f"{op.seconds.value * 1e6:.4g} us: {op.formula}", source=op.source)


def _rate(key: str, title: str, band: Band, formula: str, *inputs: Input) -> Figure:
    return Figure(key=key, title=title, band=band, unit="tokens/s", formula=formula, inputs=inputs)


def _bytes(key: str, title: str, value: float, formula: str) -> Figure:
    return Figure(key=key, title=title, band=Band.exact(value / 1e9), unit="GB", formula=formula)


def _count(key: str, title: str, value: float, formula: str) -> Figure:
    return Figure(key=key, title=title, band=Band.exact(value), unit="", formula=formula)


def _limit(limit: SpeedLimit) -> list[Figure]:
    each = f"{limit.layers} layers x 2 micro-batches x {number(1e6 * limit.exchange.value)} us"
    waits = f"{each} + {limit.waits} waits x {number(1e6 * limit.latency.value)} us"
    bandwidth = Input(name="bandwidth", value=f"{limit.bandwidth.value / 1e9:g} GB/s", source="the cluster's link")
    pairs = (
        ("limit.tpot", "time per token if only exchanges took time", limit.token, each),
        ("limit.tpot_latency", "the same with a latency for every wait", limit.token_with_latency, waits),
    )
    found = [
        Figure(key=key, title=title, band=1e3 * band, unit="ms", formula=formula, inputs=(bandwidth,))
        for key, title, band, formula in pairs
    ]
    return [*found, _rate("limit.speed", "tokens per user at that limit", limit.tokens_per_second, f"1 / ({each})")]


def _money(plan: ServingPlan) -> Iterator[Figure]:
    cluster = plan.decode.work.cluster
    price = cluster.price_per_gpu_hour or cluster.gpu.price_per_hour
    source = price.source if price else ""
    ratio, goal = plan.prefill_per_decode, plan.goal
    if ratio is not None:
        formula = f"{goal.prompt:,.0f} / {goal.output:,.0f} tokens x decode.tokens / prefill.input"
        yield Figure(key="pools", title="prefill GPUs per decode GPU", band=ratio, unit="", formula=formula)
    for name, band, rate in (
        ("input", plan.dollars_per_million_input, plan.prefill.input_per_second),
        ("output", plan.dollars_per_million_output, plan.decode.tokens_per_second),
    ):
        if band is not None and price is not None:
            yield Figure(
                key=f"dollars_{name}",
                title=f"dollars per million {name} tokens",
                band=band,
                unit="$",
                formula=f"{price.value:g} $/h / 3600 s / {number(rate.value)} tokens/s x 10^6",
                inputs=(Input(name="price", value=f"{price.value:g} $ per GPU and hour", source=source),),
            )
