"""The figures of a serving plan, each with its formula, inputs and sources."""

from __future__ import annotations

from collections.abc import Iterator

from dovetail.planner.figure import Figure, Input, number
from dovetail.planner.limits import COMBINE_BYTES, DISPATCH_BYTES, SpeedLimit, joining_link
from dovetail.planner.serving.decode import DecodePlan
from dovetail.planner.serving.pieces import COMMUNICATION_SHARE
from dovetail.planner.serving.plan import ServingPlan
from dovetail.planner.serving.prefill import PrefillPlan
from dovetail.planner.serving.uses import Pool, operations, use_figures
from dovetail.spec.band import Band

CACHED = "latent and rotary key of all layers, BF16 [V3 §2.1.1]"


def serving_figures(plan: ServingPlan) -> tuple[Figure, ...]:
    """Return the figures of the whole plan, those of both pools first."""
    found = [*prefill_figures(plan.prefill), *decode_figures(plan.decode)]
    if plan.limit is not None:
        found += _limit(plan.limit, plan.decode)
    return (*found, *_money(plan))


def prefill_figures(plan: PrefillPlan) -> tuple[Figure, ...]:
    goal, step, cluster, memory = plan.goal, plan.step_seconds, plan.work.cluster, plan.memory
    tokens = Input(name="tokens per GPU and step", value=f"{plan.tokens_per_step:,}", source="goal.prefill_tokens")
    nodes = Input(name="GPUs per node", value=str(cluster.gpus_per_node), source=cluster.source)
    hits = Input(name="cache hits", value=f"{goal.cache_hit:.1%}", source="goal.cache_hit")
    latents = Input(
        name="latents of a prompt", value=f"{goal.prompt:,.0f} tokens x {memory.cache_per_token:,} B", source=CACHED
    )
    step_input = Input(name="step", value=f"{number(step.value)} s", source="explain prefill.step_seconds")
    rate, missed = f"{plan.tokens_per_step:,} / {number(step.value)} s", f"(1 - {goal.cache_hit:g})"
    sent = f"{number(plan.transfer_seconds.value)} (latents to the decoders)"
    ttft = f"({plan.steps_per_prompt} + 1/2) x {number(step.value)} + {sent}"
    found = [
        _step(plan, "prefill", "a step of reading prompts", "s", 1.0, (tokens, _multiprocessors(plan))),
        *use_figures(plan, "prefill", "s", 1.0),
        _rate("prefill.computed", "computed tokens per GPU", plan.computed_per_second, rate, tokens, step_input),
        _rate(
            "prefill.computed_node",
            "computed tokens per node",
            plan.computed_per_node,
            f"{rate} x {cluster.gpus_per_node} GPUs",
            tokens,
            step_input,
            nodes,
        ),
        _rate(
            "prefill.input",
            "input tokens per GPU, with hits",
            plan.input_per_second,
            f"{rate} / {missed}",
            tokens,
            step_input,
            hits,
        ),
        _rate(
            "prefill.input_node",
            "input tokens per node",
            plan.input_per_node,
            f"{rate} / {missed} x {cluster.gpus_per_node} GPUs",
            tokens,
            step_input,
            hits,
            nodes,
        ),
        Figure(
            key="prefill.ttft",
            title="time to first token",
            band=plan.ttft,
            unit="s",
            formula=ttft,
            inputs=(step_input, latents),
        ),
        _weights(plan, "prefill"),
        _bytes(
            "prefill.activations",
            "activations per GPU",
            plan.activation_bytes,
            "attention's queries, keys and values or the experts' rows, whichever is more, and the residuals",
            Input(name="tokens of a micro-batch", value=f"{plan.work.own_tokens:,.0f}", source=tokens.source),
        ),
    ]
    return tuple(found)


def decode_figures(plan: DecodePlan) -> tuple[Figure, ...]:
    goal, memory, gpus = plan.goal, plan.memory, plan.work.cluster.gpus_per_node
    taken = "goal.mtp_acceptance: 1 + the second token's [V3 §5.4.3]" if goal.mtp_acceptance else "no MTP"
    per_step = Input(name="tokens of a request per step", value=f"{goal.tokens_per_step:g}", source=taken)
    requests = Input(name="requests per GPU", value=str(plan.requests), source=_why_requests(plan))
    context = Input(name="context", value=f"{goal.mean_context:,.0f} tokens", source="the goal")
    step = Input(name="step", value=f"{number(1e3 * plan.step_seconds.value)} ms", source="explain decode.step_seconds")
    nodes = Input(name="GPUs per node", value=str(gpus), source=plan.work.cluster.source)
    rate = f"{plan.requests} x {goal.tokens_per_step:g} / {step.value}"
    copies = f" x {plan.layout.tp} (every rank of tp has all latents)" if plan.layout.tp > 1 else ""
    held = f"{goal.mean_context:,.0f} tokens x {memory.cache_per_token:,} B{copies}"
    gpu = plan.work.cluster.gpu
    free = gpu.usable_bytes - memory.weights - memory.buffers
    fits = f"{free:.4g} B / ({held}), at most {goal.max_requests_per_gpu} (goal.max_requests_per_gpu)"
    beside = Input(
        name="left for latents",
        value=f"{free / 1e9:.2f} GB",
        source=f"{gpu.memory_bytes / 1e9:.1f} GB of {gpu.name} less weights, buffers and {gpu.runtime_bytes / 1e9:g} "
        "GB of runtime",
    )
    exchanges = Figure(
        key="decode.communication",
        title="all exchanges of a step, one after the other",
        band=1e3 * plan.communication_seconds,
        unit="ms",
        formula=f"{plan.work.spec.num_moe_layers} layers x {goal.microbatches} micro-batches x (dispatch + combine)",
        inputs=tuple(operations(plan, ("dispatch", "combine"))),
    )
    found = [
        _step(plan, "decode", "a step of decoding", "ms", 1e3, (requests, context)),
        *use_figures(plan, "decode", "ms", 1e3),
        Figure(
            key="decode.tpot",
            title="time per output token",
            band=1e3 * plan.tpot,
            unit="ms",
            formula=f"{step.value} / {goal.tokens_per_step:g}",
            inputs=(step, per_step),
        ),
        _rate(
            "decode.speed",
            "output tokens of one user",
            plan.speed,
            f"{goal.tokens_per_step:g} / {step.value}",
            step,
            per_step,
        ),
        _rate("decode.tokens", "output tokens per GPU", plan.tokens_per_second, rate, requests, step, per_step),
        _rate(
            "decode.tokens_node",
            "output tokens per node",
            plan.per_node,
            f"{gpus} GPUs x {rate}",
            nodes,
            requests,
            step,
            per_step,
        ),
        _count("decode.requests", "requests decoded at once per GPU", plan.requests, _why_requests(plan), step),
        _count(
            "decode.requests_that_fit", "requests that fit per GPU", plan.requests_that_fit, fits, beside, _cached(plan)
        ),
        _bytes(
            "decode.cache", "latents per GPU", plan.cache_bytes, f"{plan.requests} requests x {held}", _cached(plan)
        ),
        _weights(plan, "decode"),
        _bytes(
            "decode.buffers",
            "buffers of exchanges per GPU",
            memory.buffers,
            "DeepEP's low-latency layout: two sets, each a message per expert and token to send and one to receive",
            requests,
        ),
        exchanges,
    ]
    return tuple(found)


def _step(plan: Pool, pool: str, title: str, unit: str, scale: float, inputs: tuple[Input, ...]) -> Figure:
    terms = ((name, scale * band.value) for name, band in plan.seconds_by_use.items())
    formula = " + ".join(f"{number(value)} ({name})" for name, value in terms if value)
    key = f"{pool}.step_seconds"
    return Figure(key=key, title=title, band=scale * plan.step_seconds, unit=unit, formula=formula, inputs=inputs)


def _multiprocessors(plan: PrefillPlan) -> Input:
    has, left = plan.work.cluster.gpu.multiprocessors, plan.work.multiprocessors
    source = "all" if left == has else f"of {has}; exchanges take the share {COMMUNICATION_SHARE:.3f} of them [day 6]"
    return Input(name="multiprocessors", value=str(left), source=source)


def _why_requests(plan: DecodePlan) -> str:
    goal = plan.goal
    if goal.requests_per_gpu is not None:
        return "goal.requests_per_gpu"
    if plan.requests == goal.max_requests_per_gpu:
        return "goal.max_requests_per_gpu"
    allowed = goal.step_seconds_allowed
    if allowed is None or plan.requests >= plan.requests_that_fit:
        return "as many as memory holds, with their buffers"
    return f"the most whose step takes at most {number(1e3 * allowed)} ms, for {goal.output_speed:g} tokens/s of a user"


def _cached(plan: Pool) -> Input:
    return Input(name="cache of a token", value=f"{plan.memory.cache_per_token:,} B", source=CACHED)


def _weights(plan: Pool, pool: str) -> Figure:
    memory, layout = plan.memory, plan.layout
    kind = "FP8 codes, a scale for 128 x 128" if plan.work.recipe.sites else "BF16"
    slots = plan.work.spec.moe.n_routed_experts + layout.redundant_experts if plan.work.spec.moe else 0
    inputs = (
        Input(name="routed experts", value=f"{slots / layout.ep:g} of each layer with experts", source=f"{kind}"),
        Input(name="others", value="attention, shared experts, dense layers, ends", source=f"{kind}; ends BF16"),
    )
    formula = f"{memory.experts / 1e9:.2f} (routed experts) + {memory.others / 1e9:.2f} (others)"
    return _bytes(f"{pool}.weights", "weights per GPU", memory.weights, formula, *inputs)


def _rate(key: str, title: str, band: Band, formula: str, *inputs: Input) -> Figure:
    return Figure(key=key, title=title, band=band, unit="tokens/s", formula=formula, inputs=inputs)


def _bytes(key: str, title: str, value: float, formula: str, *inputs: Input) -> Figure:
    return Figure(key=key, title=title, band=Band.exact(value / 1e9), unit="GB", formula=formula, inputs=inputs)


def _count(key: str, title: str, value: float, formula: str, *inputs: Input) -> Figure:
    return Figure(key=key, title=title, band=Band.exact(value), unit="", formula=formula, inputs=inputs)


def _limit(limit: SpeedLimit, decode: DecodePlan) -> list[Figure]:
    work = decode.work
    each = f"{limit.layers} layers x 2 micro-batches x {number(1e6 * limit.exchange.value)} us"
    waits = f"{each} + {limit.waits} waits x {number(1e6 * limit.latency.value)} us"
    link = joining_link(work.cluster, work.layout.ep)
    assert work.spec.moe is not None
    copies = work.spec.moe.num_experts_per_tok + work.spec.moe.n_shared_experts
    inputs = (
        Input(
            name="dispatch and combine of a micro-batch",
            value=f"{work.own_tokens:g} tokens x {copies} experts x {work.spec.hidden_size} x "
            f"{DISPATCH_BYTES + COMBINE_BYTES} B / {limit.bandwidth.value / 1e9:g} GB/s",
            source="FP8 there, BF16 back, the shared expert as one more [ISCA §2.3.2]",
        ),
        Input(name="bandwidth", value=f"{link.achieved_gbs.value:g} GB/s", source=link.achieved_gbs.source),
        Input(name="latency", value=f"{link.latency_us.value:g} us", source=link.latency_us.source),
    )
    pairs = (
        ("limit.tpot", "time per token if only exchanges took time", limit.token, each),
        ("limit.tpot_latency", "the same with a latency for every wait", limit.token_with_latency, waits),
    )
    found = [
        Figure(key=key, title=title, band=1e3 * band, unit="ms", formula=formula, inputs=inputs)
        for key, title, band, formula in pairs
    ]
    speed = f"1 / ({each})"
    return [*found, _rate("limit.speed", "tokens per user at that limit", limit.tokens_per_second, speed, *inputs[:2])]


def _money(plan: ServingPlan) -> Iterator[Figure]:
    ratio, goal = plan.prefill_per_decode, plan.goal
    if ratio is not None:
        written, read = plan.decode.tokens_per_second.value, plan.prefill.input_per_second.value
        prompt, output = f"{goal.prompt:,.0f}", f"{goal.output or 0:,.0f}"
        yield Figure(
            key="pools",
            title="prefill GPUs per decode GPU",
            band=ratio,
            unit="",
            formula=f"{prompt} / {output} tokens x {number(written)} / {number(read)} tokens/s",
            inputs=(
                Input(name="prompt / output", value=f"{prompt} / {output} tokens", source="the goal"),
                Input(name="written per GPU", value=f"{number(written)} tokens/s", source="explain decode.tokens"),
                Input(name="read per GPU", value=f"{number(read)} tokens/s", source="explain prefill.input"),
            ),
        )
    for name, band, rate, pool in (
        ("input", plan.dollars_per_million_input, plan.prefill.input_per_second, plan.prefill),
        ("output", plan.dollars_per_million_output, plan.decode.tokens_per_second, plan.decode),
    ):
        cluster = pool.work.cluster
        price = cluster.price_per_gpu_hour or cluster.gpu.price_per_hour
        if band is not None and price is not None:
            yield Figure(
                key=f"dollars_{name}",
                title=f"dollars per million {name} tokens",
                band=band,
                unit="$",
                formula=f"{price.value:g} $/h / 3600 s / {number(rate.value)} tokens/s x 10^6",
                inputs=(Input(name="price", value=f"{price.value:g} $ per GPU and hour", source=price.source),),
            )
