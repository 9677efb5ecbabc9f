"""Settings as workloads and as choices of layouts, and every way to get them wrong."""

from __future__ import annotations

import pytest

from dovetail.catalog.hardware import load_cluster
from dovetail.catalog.precision import load_recipe
from dovetail.catalog.presets import load_model
from dovetail.planner.training.chunks import Workload
from dovetail.planner.training.vary import FREE, Choices, vary
from dovetail.spec.layout import Layout


def work_of(name: str = "deepseek-v3") -> Workload:
    return Workload(
        spec=load_model(name),
        cluster=load_cluster("h800-2048"),
        layout=Layout(),
        recipe=load_recipe("deepseek-v3"),
        sequence_length=4096,
    )


def test_nothing_to_vary_is_the_work_itself() -> None:
    works, choices = vary(work_of(), [])
    assert works == [work_of()] and choices == FREE and str(choices) == ""


def test_models_and_recipes_are_multiplied() -> None:
    works, choices = vary(work_of(), ["topk_group=2,4,8", "precision=bf16,combine-logfmt-10"])
    assert choices == FREE
    moes = [work.spec.moe for work in works]
    assert [moe.topk_group for moe in moes if moe] == [2, 2, 4, 4, 8, 8]
    assert [work.recipe.name for work in works] == 3 * ["bf16", "combine-logfmt-10"]
    assert works[1].label == "topk_group = 2, precision = combine-logfmt-10"
    assert len({work.label for work in works}) == 6
    assert works[2].spec == work_of().spec  # the value that it has


@pytest.mark.parametrize("name", ["deepseek-v3", "deepseek-v2-lite", "quickstart"])
def test_only_the_given_keys_change(name: str) -> None:
    spec = load_model(name)
    (other,), _ = vary(work_of(name), ["kv_lora_rank=256"])
    changed = spec.model_copy(update={"attention": spec.attention.model_copy(update={"kv_lora_rank": 256})})
    assert other.spec == changed != spec


def test_layout_keys_hold_the_search_and_make_no_workloads() -> None:
    works, choices = vary(work_of(), ["microbatch_size=1,2", "schedule=dualpipe,zb1p", "num_experts_per_tok=4,8"])
    assert len(works) == 2
    assert choices == Choices(microbatch_size=(1, 2), schedule=("dualpipe", "zb1p"))
    assert str(choices) == "microbatch_size = 1 or 2, schedule = dualpipe or zb1p"
    _, both = vary(work_of(), ["tp=1,2"], Choices.of({"pp": 16, "schedule": "dualpipe"}))
    assert both == Choices(pp=(16,), tp=(1, 2), schedule=("dualpipe",))


def test_a_value_twice_is_once() -> None:
    works, _ = vary(work_of(), ["topk_group=4, 4,2"])
    assert len(works) == 2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["topk_grup=2"], "--vary topk_grup: no such key; did you mean topk_group"),
        (["schedul=1f1b"], "--vary schedul: no such key; did you mean schedule"),
        (["topk_group=16"], "topk_group = 16 groups cannot be kept of n_group = 8"),
        (["n_routed_experts=128,255"], "--vary n_routed_experts = 255: .* does not divide into n_group = 8"),
        (["n_routed_experts=8", "num_experts_per_tok=8"], "8 is more than the 4 experts in topk_group = 4"),
        (["topk_group=two"], "topk_group = 'two': input should be a valid integer"),
        (["num_experts_per_tok=4.5"], "num_experts_per_tok = 4.5"),
        (["schedule=dualpip"], "schedule = dualpip: no such schedule; did you mean dualpipe"),
        (["precision=fp9"], "'fp9' is no precision recipe"),
        (["pp=0"], "pp = 0: expected a whole number of at least 1"),
        (["tp=two"], "tp = two: expected a whole number"),
        (["topk_group"], "--vary topk_group: expected key=value,value"),
        (["topk_group=2,,4"], "expected key=value,value"),
        (["=4"], "expected key=value,value"),
        (["topk_group=4", "topk_group=8"], "topk_group is given twice"),
        (["head_dim=64"], "--vary head_dim: the model's attention is Mla"),
        (["rope_scaling=2"], "--vary rope_scaling: no such key"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        vary(work_of(), settings)
    assert "\n" not in str(caught.value)


def test_a_value_that_the_model_has_no_use_for_is_refused() -> None:
    with pytest.raises(ValueError, match="topk_group = 2: with the model's other keys topk_group is 1, whatever is"):
        vary(work_of("deepseek-v2-lite"), ["topk_group=1,2"])
    with pytest.raises(ValueError, match="no such key; known are those of the model.*precision"):
        vary(work_of(), ["foo=1"])


def test_a_dense_model_has_no_experts_to_vary() -> None:
    with pytest.raises(ValueError, match="--vary topk_group: the model has no experts"):
        vary(work_of("llama-3.1-405b"), ["topk_group=2"])
    with pytest.raises(ValueError, match="--vary kv_lora_rank: the model's attention is Gqa"):
        vary(work_of("llama-3.1-405b"), ["kv_lora_rank=512"])


def test_what_is_fixed_is_not_varied() -> None:
    with pytest.raises(ValueError, match="--vary pp: it is already fixed to 16"):
        vary(work_of(), ["pp=8,16"], Choices.of({"pp": 16}))
