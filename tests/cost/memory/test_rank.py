"""What ranks hold: together every parameter as often as it has replicas, and DeepSeek-V3 on GPUs of 80 GB."""

from collections.abc import Callable
from fractions import Fraction

import pytest

from dovetail.catalog.precision import load_recipe
from dovetail.catalog.presets import load_model
from dovetail.cost import count
from dovetail.cost.memory import process
from dovetail.cost.memory.activations import microbatch_bytes
from dovetail.cost.memory.held import held_by_rank
from dovetail.cost.memory.rank import in_flight, kept_by_stage, pipeline_memory, rank_memory
from dovetail.cost.memory.stages import stages
from dovetail.spec.layout import Layout
from dovetail.spec.model import ModelSpec

V3, FP8, BF16 = load_model("deepseek-v3"), load_recipe("deepseek-v3"), load_recipe("bf16")
PRETRAINING = Layout(pp=16, ep=64, dp=128, microbatches=120, schedule="dualpipe")
H800_BYTES = 84.9e9  # [profile-data]: what the driver reports

SpecFactory = Callable[..., ModelSpec]


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        ("deepseek-v3", PRETRAINING),
        ("deepseek-v3", Layout(pp=4, ep=8, dp=8, tp=4, microbatches=8, schedule="dualpipev")),
        ("deepseek-v2-lite", Layout(ep=4, dp=8, tp=2)),
        ("deepseek-v2", Layout(pp=16, ep=8, dp=8, schedule="zb1p")),
        ("quickstart", Layout()),
    ],
)
def test_ranks_together_hold_every_parameter(name: str, layout: Layout) -> None:
    """Each rank's tensors, times the ranks of a stage, over their replicas and the copies of their stage."""
    spec, stage_ranks = load_model(name), layout.dp * layout.tp
    total = sum(
        Fraction(each.elements * stage_ranks, each.replicas * layout.stage_copies)
        for rank in range(layout.pp)
        for each in held_by_rank(spec, layout, rank)
    )
    assert total == count.parameters(spec).total_with_mtp


def test_a_pipeline_that_parts_embedding_and_mtp_has_the_embedding_twice() -> None:
    layout = Layout(pp=4)
    total = sum(each.elements for rank in range(4) for each in held_by_rank(V3, layout, rank))
    assert total == count.parameters(V3).total_with_mtp + V3.vocab_size * V3.hidden_size


@pytest.mark.parametrize("name", ["quickstart", "deepseek-v2-lite", "deepseek-v3"])
def test_one_rank_alone_is_the_state_that_is_counted_tensor_by_tensor(name: str) -> None:
    spec = load_model(name)
    alone = rank_memory(spec, Layout(microbatches=2), BF16, 64)
    whole = process.training_memory(spec, 64)
    assert (alone.weights, alone.gradients, alone.master_weights, alone.moments, alone.host_average) == (
        whole.weights,
        whole.gradients,
        whole.master_weights,
        whole.moments,
        whole.moving_average,
    )


def test_moments_are_in_the_recipe_s_format() -> None:
    layout = Layout(pp=4, ep=8, dp=8)
    narrow, wide = (rank_memory(V3, layout, load_recipe(name), 64, 1) for name in ("bf16", "bf16-fp32-moments"))
    assert wide.moments == 2 * narrow.moments
    assert wide.total - narrow.total == narrow.moments


def test_what_stages_keep_is_what_the_model_keeps_without_experts_outputs(tiny_spec: SpecFactory) -> None:
    spec, length = tiny_spec(num_nextn_predict_layers=0), 12
    layout = Layout(pp=3, microbatches=1)
    ranks = pipeline_memory(spec, layout, BF16, length)
    saved = microbatch_bytes(spec, 1, length, BF16, recompute=True)
    assert spec.moe
    outputs = 2 * spec.moe.num_experts_per_tok * spec.hidden_size * spec.num_moe_layers
    assert sum(rank.activations for rank in ranks) == sum(saved.values()) - saved["losses"] - length * outputs


def test_optimizer_state_is_shared_out() -> None:
    """Experts over their replicas alone: at ep = dp nobody else holds them."""
    whole, split = (rank_memory(V3, Layout(pp=61, ep=8, dp=dp), BF16, 1, rank=30) for dp in (8, 16))
    experts = 32 * 44_040_192
    others = count.layer_parameters(V3, 30).total - 256 * 44_040_192 - 256  # the gate's bias is not trained
    assert whole.gradients == split.gradients == 4 * (experts + others)
    assert whole.moments == pytest.approx(4 * (experts + others / 8), rel=1e-6)
    assert split.moments == pytest.approx(whole.moments / 2, rel=1e-6)
    unshared = rank_memory(V3, Layout(pp=61, ep=8, dp=16, zero=0), BF16, 1, rank=30)
    assert unshared.moments == 4 * (experts + others) and unshared.gradients == split.gradients
    wide = 2 * 7168 + 1536 + 512 + 256 * 7168  # norms and the gate's weights are in FP32 and are their own masters
    assert unshared.master_weights == 4 * (experts + others - wide)


@pytest.mark.parametrize(
    ("layout", "expected"),
    [
        (Layout(pp=4, microbatches=9), [[4], [3], [2], [1]]),
        (Layout(pp=4, microbatches=2), [[2], [2], [2], [1]]),
        (Layout(pp=4, microbatches=9, schedule="zb1p"), [[4], [4], [4], [4]]),
        (Layout(pp=4, microbatches=8, schedule="dualpipe"), [[4, 1], [3, 2], [2, 3], [1, 4]]),
        (Layout(pp=2, microbatches=8, schedule="dualpipev"), [[4, 1], [3, 2]]),
        (Layout(pp=2, microbatches=8, schedule="interleaved"), [[4, 2], [3, 1]]),
    ],
)
def test_microbatches_in_flight(layout: Layout, expected: list[list[int]]) -> None:
    """[V3 Table 2]: at most PP activations in 1F1B and ZB1P, PP + 1 in DualPipe."""
    found = [[in_flight(layout, rank, stage) for stage in layout.stages_of(rank)] for rank in range(layout.pp)]
    assert found == expected


def test_deepseek_v3_fits_on_its_gpus() -> None:
    """[V3 §3.2]: without tensor parallelism, in what an H800 has; 1F1B holds half the parameters, and fits too."""
    ranks = pipeline_memory(V3, PRETRAINING, FP8, 4096)
    assert len(ranks) == 16
    for rank in ranks:
        assert 60e9 < rank.total < H800_BYTES - 2e9
        assert rank.band[0] < rank.total < rank.band[1] < H800_BYTES
        assert sum(count for _, count in rank.in_flight) == 17
    assert ranks[0].total == ranks[15].total
    plain = pipeline_memory(V3, PRETRAINING.model_copy(update={"schedule": "1f1b"}), FP8, 4096)
    assert 1.9 < ranks[5].gradients / plain[5].gradients < 2.1
    assert max(rank.total for rank in plain) < max(rank.total for rank in ranks)


def test_what_makes_it_fit() -> None:
    """FP8 activations and recomputation: without either it does not."""
    assert rank_memory(V3, PRETRAINING, BF16, 4096, rank=5).total > 1.1 * H800_BYTES
    assert rank_memory(V3, PRETRAINING, FP8, 4096, rank=5, recompute=False).total > 1.2 * H800_BYTES


def test_what_a_stage_keeps_under_the_recipe() -> None:
    """By far the most are the experts' rows: their input, and SwiGLU's, in FP8."""
    stage = stages(V3, PRETRAINING)[5]
    by_name: dict[str, int] = {}
    for _, tensor in kept_by_stage(V3, FP8, stage):
        by_name[tensor.name] = by_name.get(tensor.name, 0) + tensor.bytes
    largest = sorted(by_name, key=lambda name: -by_name[name])
    assert largest[:3] == ["experts input", "experts swiglu input", "o_proj input"]
    assert by_name["experts input"] == 4 * 8 * (7168 + 4 * 56)
    assert "expert outputs" not in by_name and "q, k, v" not in by_name
