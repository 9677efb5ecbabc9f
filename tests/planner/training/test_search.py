"""The search against evaluating everything, and what it says where nothing can be."""

from __future__ import annotations

import random
from dataclasses import fields, replace

import pytest

from dovetail.catalog.hardware import load_cluster
from dovetail.catalog.precision import load_recipe
from dovetail.catalog.presets import load_model
from dovetail.planner.training.chunks import Workload
from dovetail.planner.training.plan import StepUses, TrainingGoal, TrainingPlan, evaluate
from dovetail.planner.training.search import Candidate, Found, compared, layouts, pareto_front, search, search_all
from dovetail.planner.training.vary import Choices
from dovetail.spec.layout import Layout

NODE = load_cluster("h800-node")
GOAL = TrainingGoal(batch=32)
LITE = Workload(
    spec=load_model("deepseek-v2-lite"),
    cluster=NODE,
    layout=Layout(),
    recipe=load_recipe("deepseek-v3"),
    sequence_length=4096,
)
FEW = Choices(microbatch_size=(1, 2))


@pytest.fixture(scope="module")
def all_plans() -> list[TrainingPlan]:
    """Every layout of the small model on one node, evaluated whole, those that fit."""
    found = (evaluate(replace(LITE, layout=layout), GOAL) for layout in layouts(LITE.spec, 8, 8, GOAL.batch, FEW))
    return sorted((plan for plan in found if plan.fits), key=lambda plan: plan.step_seconds.value)


@pytest.fixture(scope="module")
def found() -> Found:
    return search(LITE, GOAL, choices=FEW)


def seconds(plans: list[TrainingPlan]) -> list[float]:
    return [plan.step_seconds.value for plan in plans]


def test_the_best_found_are_the_best_there_are(found: Found, all_plans: list[TrainingPlan]) -> None:
    assert 20 < len(all_plans) == found.fitting < found.tried
    assert seconds(list(found.plans)) == pytest.approx(seconds(all_plans[: len(found.plans)]))
    assert found.plans[0].work.layout == all_plans[0].work.layout
    assert all(plan.fits for plan in found.plans) and found.smallest is None


def test_the_front_is_what_nothing_beats(found: Found, all_plans: list[TrainingPlan]) -> None:
    points = [(plan.step_seconds.value, plan.largest_memory.total) for plan in all_plans]
    expected = {
        point for point in points if not any(o != point and o[0] <= point[0] and o[1] <= point[1] for o in points)
    }
    times, memory = zip(*sorted(expected), strict=True)
    assert [each.memory for each in found.front] == list(memory)
    assert [each.seconds for each in found.front] == pytest.approx(times)
    assert len(times) > 1
    assert all(each.is_replayed for each in found.front)


def test_the_ranking_holds_every_layout_once(found: Found, all_plans: list[TrainingPlan]) -> None:
    times = [each.seconds for each in found.ranking]
    assert times == sorted(times)
    assert {each.work.layout for each in found.ranking} == {plan.work.layout for plan in all_plans}


@pytest.mark.parametrize("seed", range(5))
def test_pareto_front_of_random_candidates(seed: int) -> None:
    draw = random.Random(seed)
    each = [
        Candidate(
            work=replace(LITE, layout=Layout(dp=draw.choice([1, 2, 4]))),
            seconds=float(draw.randint(1, 9)),
            memory=float(draw.randint(1, 9)),
        )
        for _ in range(60)
    ]
    front = pareto_front(each)

    def measures(one: Candidate) -> tuple[float, float, float]:
        return one.seconds, one.memory, one.gpu_seconds

    def beats(one: Candidate, other: Candidate) -> bool:
        pairs = list(zip(measures(one), measures(other), strict=True))
        return all(mine <= theirs for mine, theirs in pairs) and any(mine < theirs for mine, theirs in pairs)

    assert {measures(one) for one in front} == {
        measures(one) for one in each if not any(beats(other, one) for other in each)
    }
    assert len({measures(one) for one in front}) == len(front)


def test_of_equally_fast_layouts_the_one_with_less_memory_is_first() -> None:
    """Nothing is exchanged on one rank, so DualPipeV's overlap gains nothing over 1F1B."""
    work = Workload(
        spec=load_model("104m"),
        cluster=load_cluster("h800-node"),
        layout=Layout(),
        recipe=load_recipe("bf16"),
        sequence_length=1024,
    )
    only = Choices(pp=(1,), ep=(1,), tp=(1,), microbatch_size=(1,))
    plans = search(work, TrainingGoal(batch=64), choices=only).plans
    assert [plan.work.layout.schedule for plan in plans] == ["1f1b", "dualpipev"]
    assert plans[0].step_seconds.value == pytest.approx(plans[1].step_seconds.value, rel=1e-12)


def test_layouts_are_legal_and_different() -> None:
    each = list(layouts(LITE.spec, 8, 8, 32))
    assert len(set(each)) == len(each)
    assert all(layout.gpus == 8 and layout.batch == 32 for layout in each)
    assert {layout.schedule for layout in each} == {"1f1b", "interleaved", "zb1p", "dualpipe", "dualpipev"}
    assert {layout.schedule for layout in each if layout.pp == 1} == {"1f1b", "dualpipev"}
    assert {layout.tp for layout in each} == {1, 2, 4, 8}


def test_layouts_share_out_the_optimizer_as_dovetail_train_does() -> None:
    assert {layout.zero for layout in layouts(LITE.spec, 8, 8, 32)} == {1}
    both = list(layouts(LITE.spec, 8, 8, 32, Choices(zero=(0, 1))))
    assert len(set(both)) == len(both) == 2 * len(list(layouts(LITE.spec, 8, 8, 32)))
    with pytest.raises(ValueError, match="zero = 2: expected 0 or 1"):
        Choices(zero=(2,))  # type: ignore[arg-type]


def test_choices_hold_the_search(found: Found) -> None:
    held = search(LITE, GOAL, choices=Choices(pp=(4,), schedule=("zb1p", "1f1b"), tp=(1, 2), microbatch_size=(1,)))
    assert 0 < held.tried < found.tried
    for each in held.ranking:
        layout = each.work.layout
        assert layout.pp == 4 and layout.schedule in ("zb1p", "1f1b") and layout.tp <= 2 and layout.microbatch_size == 1
    interleaved = search(LITE, GOAL, choices=Choices(pp=(4,), schedule=("interleaved",), chunks=(3,)))
    assert {each.work.layout.chunks for each in interleaved.ranking} == {3}
    part = search(LITE, GOAL, gpus=4, choices=FEW)
    assert {each.work.layout.gpus for each in part.ranking} == {4}


def test_works_that_share_a_model_are_each_costed_by_their_own() -> None:
    """The second's recipe is another, the third's model."""
    moe = LITE.spec.moe
    assert moe
    wider = LITE.spec.model_copy(update={"moe": moe.model_copy(update={"num_experts_per_tok": 8})})
    works = [LITE, replace(LITE, recipe=load_recipe("bf16")), replace(LITE, spec=wider)]
    choices = Choices(pp=(1, 2), tp=(1,), microbatch_size=(1,))
    together = search_all(works, GOAL, choices=choices)
    apart = [search(work, GOAL, choices=choices) for work in works]
    assert together.tried == sum(each.tried for each in apart)
    assert together.plans[0].step_seconds == min((each.plans[0].step_seconds for each in apart), key=lambda b: b.value)
    assert {plan.work.recipe.name for plan in together.plans} == {"bf16", "deepseek-v3"}
    for plan in together.plans:
        assert plan.step_seconds == evaluate(plan.work, GOAL).step_seconds


def test_a_layout_is_compared_with_the_better_ones(found: Found) -> None:
    best = compared(found, found.plans[0].work, GOAL)
    assert (best.place, best.behind, best.better) == (1, 0.0, ())
    third = compared(found, found.plans[3].work, GOAL)
    own = third.plan.step_seconds.value
    assert third.place == 1 + sum(time < own for time in seconds(list(found.plans)))
    assert third.behind == pytest.approx(own / found.plans[0].step_seconds.value - 1)
    assert len(third.better) == third.place - 1 > 0
    for gain in third.better:
        assert {name for name, _ in gain.seconds} == {field.name for field in fields(StepUses)}
        assert sum(saved for _, saved in gain.seconds) == pytest.approx(own - gain.plan.step_seconds.value)
        assert f"PP{gain.plan.work.layout.pp} " in str(gain)


def test_where_nothing_fits_the_smallest_is_named() -> None:
    work = replace(LITE, spec=load_model("deepseek-v3"))
    found = search(work, GOAL, choices=Choices(microbatch_size=(1,)))
    assert found.plans == () and found.front == () and found.fitting == 0 < found.tried
    assert found.smallest and found.smallest.memory > NODE.gpu.usable_bytes
    whole = evaluate(found.smallest.work, GOAL)
    assert whole.largest_memory.total == found.smallest.memory and not whole.fits
    others = [evaluate(replace(work, layout=layout), GOAL) for layout in layouts(work.spec, 8, 8, 32, Choices(pp=(8,)))]
    assert min(plan.largest_memory.total for plan in others) >= found.smallest.memory


def test_what_cannot_be_searched_is_refused() -> None:
    with pytest.raises(ValueError, match="makes steps of 100 sequences; the nearest batch that its ranks divide is 96"):
        search(LITE, TrainingGoal(batch=100), choices=Choices(dp=(8,), microbatch_size=(2,)))
    with pytest.raises(ValueError, match="no layout with pp = 3 on 8 GPUs of h800-node: pp x tp has to divide"):
        search(LITE, GOAL, choices=Choices(pp=(3,)))
    with pytest.raises(ValueError, match="larger batch"):
        search(LITE, TrainingGoal(batch=8), choices=Choices(schedule=("dualpipe",), dp=(4,)))
    with pytest.raises(ValueError, match="16 GPUs: h800-node has 8"):
        search(LITE, GOAL, gpus=16)
    with pytest.raises(ValueError, match="grouped-query attention"):
        search(replace(LITE, spec=load_model("llama-3.1-405b")), GOAL)


def test_one_gpu(found: Found) -> None:
    alone = NODE.model_copy(update={"gpus_per_node": 1})
    tiny = search(replace(LITE, spec=load_model("quickstart"), cluster=alone), GOAL)
    assert {each.work.layout.schedule for each in tiny.ranking} == {"1f1b", "dualpipev"}
    assert tiny.plans[0].gpus == 1
