"""Layouts that can be, and the message for each that cannot."""

import pytest

from dovetail.catalog.presets import load_model
from dovetail.spec.layout import Layout, check_layout, nearest_divisor

V3, DENSE = load_model("deepseek-v3"), load_model("qwen2.5-72b")
PRETRAINING = Layout(pp=16, ep=64, dp=128, microbatches=120, schedule="dualpipe")


def varied(**changes: object) -> Layout:
    return PRETRAINING.model_copy(update=changes)


def test_deepseek_v3_as_it_was_trained() -> None:
    """[V3 §3.2]: 2,048 GPUs, 15,360 sequences per step; by arithmetic 4 experts per rank and two replicas of each."""
    check_layout(PRETRAINING, V3, 2048, 15360)
    assert (PRETRAINING.gpus, PRETRAINING.batch) == (2048, 15360)
    assert (PRETRAINING.experts_per_rank(V3), PRETRAINING.expert_replicas) == (4, 2)


@pytest.mark.parametrize(("gpus", "ep", "slots"), [(144, 144, 2), (32, 32, 9)])
def test_deepseek_v3_as_it_is_served(gpus: int, ep: int, slots: int) -> None:
    """[day 6]: 32 redundant experts; 2 slots on each of 144 GPUs, 9 on each of 32."""
    layout = Layout(dp=gpus, ep=ep, redundant_experts=32)
    check_layout(layout, V3, gpus)
    assert layout.experts_per_rank(V3) == slots


@pytest.mark.parametrize(
    ("layout", "held"),
    [
        (Layout(pp=4), [(0,), (1,), (2,), (3,)]),
        (Layout(pp=2, schedule="interleaved", chunks=3), [(0, 2, 4), (1, 3, 5)]),
        (Layout(pp=4, schedule="dualpipe"), [(0, 3), (1, 2), (2, 1), (3, 0)]),
        (Layout(pp=2, schedule="dualpipev"), [(0, 3), (1, 2)]),
    ],
)
def test_stages_that_ranks_hold(layout: Layout, held: list[tuple[int, ...]]) -> None:
    assert [layout.stages_of(rank) for rank in range(layout.pp)] == held
    everywhere = sorted(stage for rank in held for stage in rank)
    assert everywhere == sorted(list(range(layout.num_stages)) * layout.stage_copies)


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        (
            varied(ep=48),
            "ep = 48 does not divide n_routed_experts .* = 256; nearest: ep = 32, or redundant_experts = 32",
        ),
        (varied(ep=256), "ep = 256 does not divide the 128 ranks of a stage .* nearest: ep = 128"),
        (varied(tp=3, dp=128), "tp = 3 does not divide num_attention_heads = 128; nearest: tp = 2"),
        (varied(pp=62), "62 stages .* for 61 layers: .* the largest pp is 61"),
        (varied(pp=32, schedule="dualpipev"), "64 stages .* the largest pp is 30"),
        (varied(pp=15), "pp = 15: DualPipe .* even pp; nearest: 16"),
        (varied(microbatches=121), "microbatches = 121: .* nearest: 122"),
        (varied(microbatches=30), "microbatches = 30 with pp = 16: dualpipe needs at least 2 pp = 32"),
        (varied(schedule="interleaved", microbatches=121), "microbatches = 121 with pp = 16: .* nearest: 128"),
        (varied(stage_layers=(4,) * 15), "stage_layers has 15 stages with 60 layers; the layout has 16 .* 61 layers"),
    ],
)
def test_layouts_that_cannot_be_say_what_could(layout: Layout, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_layout(layout, V3)


def test_too_few_gpus_and_another_batch() -> None:
    with pytest.raises(ValueError, match="needs 2048 GPUs, the cluster has 1024; the largest dp that fits is 64"):
        check_layout(PRETRAINING, V3, cluster_gpus=1024)
    with pytest.raises(ValueError, match="is a batch of 15360 sequences, not 3072; microbatches = 24 makes it"):
        check_layout(PRETRAINING, V3, batch=3072)
    with pytest.raises(ValueError, match="not 15000; nearest batches .*: 14976 and 15104"):
        check_layout(PRETRAINING, V3, batch=15000)


def test_a_model_without_experts_has_none_to_split() -> None:
    with pytest.raises(ValueError, match="ep = 8, .* no experts: set ep = 1"):
        check_layout(Layout(dp=8, ep=8), DENSE)
    check_layout(Layout(dp=8), DENSE)


def test_nearest_divisor_takes_the_smaller_of_two() -> None:
    assert [nearest_divisor(value, 12) for value in (1, 5, 9, 40)] == [1, 4, 6, 12]
    assert nearest_divisor(5, 24) == 4
