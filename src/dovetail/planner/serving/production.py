"""DeepSeek's published serving figures beside predictions from single operations.

Two kinds of figures are published [day 6; profile-data]. Profiles were taken of full batches with evenly loaded
experts, so a prediction of this kind can be compared with them. Production figures are means over 24 hours:

    decoding   At a given output speed the number of requests, and so the throughput, is a prediction. The time of a
               step with 84 to 92 live requests per GPU is the same prediction in another form. That 1,850 tokens/s per
               GPU at 20 to 22 tokens/s are 84 to 92 requests is arithmetic.
               About two thirds of a step do not depend on the number of requests, so a step that is 10 % longer leaves
               a third fewer of them at the same speed: the step can be predicted well, the throughput cannot.
    prompts    73.7k input tokens/s per node with 56.3 % hits are 32.2k computed, half of what the profile of the same
               layout computes. That does not follow from the time of any operation: the pool was not full, or was held
               back for the time to first token. How full it was is not published.

It is not published whether MTP was on, so both cases are shown.

The figures of prompts are predictions throughout. In decoding one assumption decides: that DeepEP's kernels occupy the
multiprocessors for a time that does not shrink with few tokens (`planner.serving.pieces`), which is a fifth of a step.
It was made after decoding had been predicted too fast, with figures from DeepEP's users, so an agreement in decoding is
hindsight; `dovetail reproduce production` prints the result without it. The requests per GPU and the nodes of the
published day are arithmetic.
"""

from __future__ import annotations

from dataclasses import dataclass

from dovetail.catalog.hardware import load_cluster
from dovetail.catalog.precision import load_recipe
from dovetail.planner.serving.decode import evaluate_decode
from dovetail.planner.serving.goal import ServingGoal
from dovetail.planner.serving.prefill import evaluate_prefill
from dovetail.spec.band import Band
from dovetail.spec.layout import Layout
from dovetail.spec.model import ModelSpec

INPUT_TOKENS, HIT_TOKENS, OUTPUT_TOKENS = 608e9, 342e9, 168e9  # in 24 hours [day 6]
CONTEXT = 4989  # mean over output tokens [day 6]
SPEEDS = (20.0, 22.0)  # output tokens/s per user [day 6]
INPUT_PER_NODE, OUTPUT_PER_NODE = 73.7e3, 14.8e3  # tokens/s, input with hits [day 6]
PROFILED_PREFILL, PROFILED_DECODE = 7839, 2324  # tokens/s per GPU [profile-data, as InferSim's README reads it]
PREFILL_LAYOUT = Layout(ep=32, dp=32, redundant_experts=32)
DECODE_LAYOUT = Layout(ep=144, dp=144, redundant_experts=32)
PROFILED_DECODE_LAYOUT = Layout(ep=128, dp=128)
ACCEPTANCE = 0.875  # of the second token: 0.85 to 0.9 [V3 §5.4.3]


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """One published figure beside ours, in `unit`."""

    name: str
    published: tuple[float, float]  # the least and the most
    ours: Band
    unit: str
    source: str
    is_prediction: bool  # False if what was measured is a pool that is partly idle
    note: str = ""

    @property
    def difference(self) -> float:
        """The relative difference to the nearer end of the published range."""
        low, high = self.published
        nearest = min(max(self.ours.value, low), high)
        return self.ours.value / nearest - 1


def mean_lengths(context: float, input_tokens: float, output_tokens: float) -> tuple[float, float]:
    """Return the prompt and output lengths of a mean request: 4,383 and 1,211 for the published day.

    Their ratio is that of all tokens, and an output token has the prompt and half of the output before it, if requests
    are alike.
    """
    ratio = input_tokens / output_tokens
    output = context / (ratio + 0.5)
    return ratio * output, output


def production_goal(output_speed: float | None = None, mtp: bool = False) -> ServingGoal:
    """Return the goal of the published day."""
    prompt, output = mean_lengths(CONTEXT, INPUT_TOKENS, OUTPUT_TOKENS)
    return ServingGoal(
        context=CONTEXT,
        prompt_length=prompt,
        output_length=output,
        output_speed=output_speed,
        cache_hit=HIT_TOKENS / INPUT_TOKENS,
        mtp_acceptance=ACCEPTANCE if mtp else None,
    )


def readings(spec: ModelSpec) -> tuple[Reading, ...]:
    """Return all figures, for DeepSeek-V3 on H800."""
    return (*_profile_readings(spec), *_decode_readings(spec), _prefill_reading(spec))


def _profile_readings(spec: ModelSpec) -> tuple[Reading, ...]:
    recipe, source = load_recipe("deepseek-v3"), "profile-data, as InferSim's README reads it"
    prompts = ServingGoal(prompt_length=4096)
    prefill = evaluate_prefill(spec, load_cluster("h800-prefill"), PREFILL_LAYOUT, recipe, prompts)
    outputs = ServingGoal(context=4096, requests_per_gpu=128)
    decode = evaluate_decode(spec, load_cluster("h800-decode"), PROFILED_DECODE_LAYOUT, recipe, outputs)
    return (
        Reading(
            name="prefill profile, EP32, 16K tokens per GPU, prompts of 4K",
            published=(PROFILED_PREFILL, PROFILED_PREFILL),
            ours=prefill.computed_per_second,
            unit="tokens/s per GPU",
            source=source,
            is_prediction=True,
        ),
        Reading(
            name="decode profile, EP128, 128 requests per GPU, prompts of 4K",
            published=(PROFILED_DECODE, PROFILED_DECODE),
            ours=decode.tokens_per_second,
            unit="tokens/s per GPU",
            source=source,
            is_prediction=True,
        ),
    )


def _decode_readings(spec: ModelSpec) -> tuple[Reading, ...]:
    cluster, recipe = load_cluster("h800-decode"), load_recipe("deepseek-v3")
    found = []
    for mtp in (False, True):
        plans = [evaluate_decode(spec, cluster, DECODE_LAYOUT, recipe, production_goal(v, mtp)) for v in SPEEDS]
        most, least = (plan.per_node for plan in plans)
        value = (most.value + least.value) / 2
        found.append(
            Reading(
                name=f"decode, EP144, 20 to 22 tokens/s per user, {'with' if mtp else 'without'} MTP",
                published=(OUTPUT_PER_NODE, OUTPUT_PER_NODE),
                ours=Band(value, min(most.low, least.low), max(most.high, least.high)),
                unit="output tokens/s per node",
                source="day 6",
                is_prediction=True,
                note=f"{plans[1].requests} to {plans[0].requests} requests per GPU",
            )
        )
    given = production_goal().model_copy(update={"requests_per_gpu": 88})
    step = evaluate_decode(spec, cluster, DECODE_LAYOUT, recipe, given)
    reading = Reading(
        name="decode, EP144, 88 requests per GPU",
        published=SPEEDS,
        ours=step.speed,
        unit="tokens/s per user",
        source="day 6",
        is_prediction=True,
        note="the same prediction in another form; 88 requests are 1,850 tokens/s per GPU at 21 per user",
    )
    return (*found, reading)


def _prefill_reading(spec: ModelSpec) -> Reading:
    cluster, recipe = load_cluster("h800-prefill"), load_recipe("deepseek-v3")
    plan = evaluate_prefill(spec, cluster, PREFILL_LAYOUT, recipe, production_goal())
    share = INPUT_PER_NODE / plan.input_per_node.value
    return Reading(
        name="prefill, EP32, 56.3 % hits",
        published=(INPUT_PER_NODE, INPUT_PER_NODE),
        ours=plan.input_per_node,
        unit="input tokens/s per node",
        source="day 6",
        is_prediction=False,
        note=f"what a full pool reads: production is {share:.0%} of it, a mean over a day; the profile's rate is "
        f"{INPUT_PER_NODE * (1 - HIT_TOKENS / INPUT_TOKENS) / 8 / PROFILED_PREFILL:.0%} used in the same sense",
    )
