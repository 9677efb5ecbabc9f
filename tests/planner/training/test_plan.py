"""A training step: its parts, what must hold on any hardware, and memory against replayed schedules."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace

import pytest

from dovetail.catalog.hardware import load_cluster
from dovetail.catalog.precision import load_recipe
from dovetail.catalog.presets import load_model
from dovetail.cost.count import training_flop_per_token
from dovetail.cost.memory.rank import kept_by_stage, pipeline_memory
from dovetail.cost.memory.stages import stages
from dovetail.parallel.schedules.pipelines import make_schedule
from dovetail.parallel.schedules.schedule import activation_peaks
from dovetail.planner.training.chunks import Costs, Workload
from dovetail.planner.training.plan import (
    StepParts,
    StepUses,
    TrainingGoal,
    TrainingPlan,
    estimate,
    evaluate,
    replayed_seconds,
)
from dovetail.spec.band import Band
from dovetail.spec.hardware import Cluster
from dovetail.spec.layout import Layout, ScheduleName
from dovetail.spec.model import ModelSpec

LITE, FP8 = load_model("deepseek-v2-lite"), load_recipe("deepseek-v3")
NODES = load_cluster("h800-prefill")  # 4 of 8
SCHEDULES: tuple[ScheduleName, ...] = ("1f1b", "interleaved", "zb1p", "dualpipe", "dualpipev")

SpecFactory = Callable[..., ModelSpec]


def lite(schedule: ScheduleName = "dualpipe", cluster: Cluster = NODES, **changes: int) -> Workload:
    sizes = {"pp": 4, "ep": 8, "dp": 8, "microbatches": 16, **changes}
    return Workload(
        spec=LITE,
        cluster=cluster,
        layout=Layout(schedule=schedule, **sizes),  # type: ignore[arg-type]
        recipe=FP8,
        sequence_length=4096,
    )


def plan_of(work: Workload, tokens: float | None = None) -> TrainingPlan:
    return evaluate(work, TrainingGoal(batch=work.layout.batch, tokens=tokens))


def bands(plan: TrainingPlan) -> list[Band]:
    parts = [getattr(plan.parts, field.name) for field in fields(StepParts)]
    return parts + [getattr(plan.uses, field.name) for field in fields(StepUses)]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_parts_and_uses_add_up_to_the_step(schedule: ScheduleName) -> None:
    plan = plan_of(lite(schedule, tp=2, dp=4))
    step = plan.step_seconds
    assert plan.parts.total.value == pytest.approx(step.value)
    assert sum(getattr(plan.uses, field.name).value for field in fields(StepUses)) == pytest.approx(step.value)
    assert plan.uses.collectives.value > 0 and plan.uses.exchanges.value > 0
    for band in (*bands(plan), step):
        assert 0 <= band.low <= band.value <= band.high
    assert step.low < step.value < step.high
    assert (plan.parts.pair.value > 0) == schedule.startswith("dualpipe")


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_way_to_the_step_s_time_agrees(schedule: ScheduleName) -> None:
    work, costs = lite(schedule), Costs()
    exact = evaluate(work, TrainingGoal(batch=work.layout.batch), costs).step_seconds.value
    assert replayed_seconds(work, costs) == exact == plan_of(work).step_seconds.value
    assert estimate(work, costs) == pytest.approx(exact, rel=1 / 8)


def test_utilisation_times_time_is_the_work() -> None:
    plan = plan_of(lite())
    for causal in (True, False):
        done = plan.mfu(causal).value * plan.gpus * plan.work.cluster.gpu.peak("bf16") * plan.step_seconds.value
        tokens = plan.work.layout.batch * 4096
        assert done == pytest.approx(tokens * training_flop_per_token(LITE, 4096, causal))
    assert plan.tokens_per_day.value == pytest.approx(8 * 16 * 4096 * 86400 / plan.step_seconds.value)


def test_a_run_is_its_steps() -> None:
    plan = plan_of(lite(), tokens=1e12)
    assert plan.seconds and plan.gpu_hours and plan.dollars and NODES.price
    steps = 1e12 / (8 * 16 * 4096)
    assert plan.seconds.value == pytest.approx(steps * plan.step_seconds.value)
    assert plan.gpu_hours.value == pytest.approx(steps * plan.step_seconds.value * 32 / 3600)
    assert plan.dollars.value == pytest.approx(plan.gpu_hours.value * NODES.price.value)
    assert plan_of(lite()).dollars is None


def without_measured_exchanges(cluster: Cluster) -> Cluster:
    efficiency = cluster.gpu.efficiency.model_copy(update={"exchanges": ()})
    return cluster.model_copy(update={"gpu": cluster.gpu.model_copy(update={"efficiency": efficiency, "name": "bare"})})


def faster(cluster: Cluster, what: str) -> Cluster:
    if what in ("scale_up", "scale_out"):
        link = getattr(cluster, what)
        reached = link.achieved_gbs.model_copy(
            update={end: 1.5 * getattr(link.achieved_gbs, end) for end in ("value", "low", "high")}
        )
        return cluster.model_copy(
            update={what: link.model_copy(update={"gbs": 1.5 * link.gbs, "achieved_gbs": reached})}
        )
    gpu = cluster.gpu
    if what == "memory":
        share = gpu.efficiency.memory
        more = share.model_copy(update={end: 1.2 * getattr(share, end) for end in ("value", "low", "high")})
        changed = gpu.model_copy(update={"efficiency": gpu.efficiency.model_copy(update={"memory": more})})
    else:
        peaks = {key: 1.5 * value for key, value in gpu.peak_tflops.model_dump(exclude_none=True).items()}
        changed = gpu.model_copy(
            update={
                "peak_tflops": gpu.peak_tflops.model_copy(update=peaks),
                "bandwidth_gbs": 1.5 * gpu.bandwidth_gbs,
            }
        )
    return cluster.model_copy(update={"gpu": changed.model_copy(update={"name": what})})


@pytest.mark.parametrize("what", ["scale_up", "scale_out", "memory", "peak and bandwidth"])
def test_a_faster_part_never_makes_a_slower_step(what: str) -> None:
    bare = without_measured_exchanges(NODES)
    for sizes in ({}, {"ep": 32, "pp": 1, "dp": 32}, {"tp": 2, "dp": 4}):
        slow, fast = (
            plan_of(lite("dualpipev", cluster=cluster, **sizes)).step_seconds for cluster in (bare, faster(bare, what))
        )
        assert fast.value <= slow.value * (1 + 1e-9) and fast.low <= slow.low * (1 + 1e-9)
    assert fast.value < slow.value


def test_one_gpu_alone_only_computes() -> None:
    cluster = load_cluster("h800-node").model_copy(update={"gpus_per_node": 1})
    work = replace(lite("1f1b", cluster), layout=Layout(microbatches=4))
    plan = plan_of(work)
    assert plan.parts.bubble.value == pytest.approx(0, abs=1e-12)
    assert plan.uses.exchanges.value == pytest.approx(0, abs=1e-12) and plan.uses.collectives.value == 0
    with pytest.raises(ValueError, match="the cluster has 1"):
        plan_of(replace(work, layout=Layout(dp=2)))


def test_experts_that_all_ranks_hold_are_not_exchanged() -> None:
    plan = plan_of(lite(ep=1))
    assert plan.uses.exchanges.value == pytest.approx(0, abs=1e-9)
    assert plan.uses.bubble.value > 0


def test_a_dense_model_with_latent_attention(tiny_spec: SpecFactory) -> None:
    names = ("n_routed_experts", "num_experts_per_tok", "moe_intermediate_size", "n_group", "topk_group")
    spec = tiny_spec(**dict.fromkeys((*names, "n_shared_experts", "first_k_dense_replace")), num_hidden_layers=8)
    assert spec.moe is None
    plan = plan_of(replace(lite(ep=1), spec=spec))
    assert plan.fits and plan.uses.exchanges.value == pytest.approx(0, abs=1e-9)
    with pytest.raises(ValueError, match="the model has no experts: set ep = 1"):
        plan_of(replace(lite(ep=8), spec=spec))


def test_grouped_query_models_are_refused() -> None:
    work = replace(lite(ep=1), spec=load_model("qwen2.5-72b"))
    with pytest.raises(
        ValueError, match="grouped-query attention is described for counting; plans are made for latent"
    ):
        plan_of(work)


def test_layouts_that_cannot_be_are_refused() -> None:
    with pytest.raises(ValueError, match="does not divide n_routed_experts"):
        plan_of(lite(ep=7))
    with pytest.raises(ValueError, match="greater than 0"):
        Layout(pp=2, stage_layers=(0, 27))
    with pytest.raises(ValueError, match="a batch of 128 sequences, not 100"):
        evaluate(lite(), TrainingGoal(batch=100))


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(("pp", "microbatches"), [(2, 4), (4, 8), (4, 24), (8, 16)])
def test_activations_are_the_replayed_peaks(schedule: ScheduleName, pp: int, microbatches: int) -> None:
    """Byte for byte, with stages that differ: dense layers and the embedding first, MTP and the head last."""
    spec = load_model("deepseek-v3")
    layout = Layout(pp=pp, microbatches=microbatches, schedule=schedule)
    held = [sum(tensor.bytes for _, tensor in kept_by_stage(spec, FP8, stage)) for stage in stages(spec, layout)]
    peaks = activation_peaks(make_schedule(schedule, pp, microbatches), held)
    assert [rank.activations for rank in pipeline_memory(spec, layout, FP8, 4096)] == [4096 * peak for peak in peaks]
