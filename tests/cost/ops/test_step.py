"""The optimizer step's bytes, by hand."""

from dovetail.catalog.presets import load_model
from dovetail.cost import count
from dovetail.cost.ops.ops import Collective, Elementwise
from dovetail.cost.ops.step import step_ops
from dovetail.spec.layout import Layout

V3 = load_model("deepseek-v3")


def test_one_rank_alone_only_updates() -> None:
    ops = step_ops(V3, Layout(microbatches=2))
    parameters = count.parameters(V3).total_with_mtp - 59 * 256  # without the gates' biases, which are no parameters
    assert [op.name for op in ops] == ["gradient norm", "AdamW", "zero gradients"]
    assert [op.bytes for op in ops if isinstance(op, Elementwise)] == [4 * parameters, 22 * parameters, 4 * parameters]


def test_a_lone_micro_batch_has_its_gradient_in_bf16_and_nothing_to_zero() -> None:
    ops = step_ops(V3, Layout())
    parameters = count.parameters(V3).total_with_mtp - 59 * 256
    assert [op.name for op in ops] == ["gradient norm", "AdamW"]
    assert [op.bytes for op in ops if isinstance(op, Elementwise)] == [2 * parameters, 20 * parameters]


def test_every_gradient_is_summed_over_its_holders_and_every_weight_gathered() -> None:
    """Rank 5 of DeepSeek-V3's pipeline: eight layers; experts on 2 ranks, all else on 128, both on two stages."""
    layout = Layout(pp=16, ep=64, dp=128, microbatches=120, schedule="dualpipe")
    experts = 8 * 4 * 44_040_192
    others = 8 * (count.layer_parameters(V3, 30).total - 256 * 44_040_192 - 256)
    sums = [op for op in step_ops(V3, layout, rank=5) if isinstance(op, Collective) and op.name == "reduce_scatter"]
    assert [(op.bytes, op.ranks, op.stride) for op in sums] == [
        (4 * experts, 2, 64),
        (4 * experts / 2, 2, 128),
        (4 * others, 128, 1),
        (4 * others / 128, 2, 128),
    ]
    gathers = [op for op in step_ops(V3, layout, rank=5) if isinstance(op, Collective) and op.name == "all_gather"]
    assert [(op.ranks, op.stride) for op in gathers] == [(op.ranks, op.stride) for op in reversed(sums)]
    wide = 8 * (2 * 7168 + 1536 + 512 + 256 * 7168)  # FP32: norms and gate
    assert gathers[-1].bytes == 2 * experts
    assert gathers[1].bytes == 2 * others + 2 * wide


def test_the_update_touches_the_rank_s_share() -> None:
    layout = Layout(ep=8, dp=8)
    update = next(op for op in step_ops(V3, layout) if op.name == "AdamW")
    trained = count.parameters(V3).total_with_mtp - 59 * 256
    assert update.bytes == 22 * trained / 8
    wide = next(op for op in step_ops(V3, layout, moment_bytes=4) if op.name == "AdamW")
    assert wide.bytes == 30 * trained / 8  # two moments, read and written


def test_without_zero_every_rank_updates_all_its_weights() -> None:
    """An all-reduce of every gradient over its holders, and nothing to gather."""
    trained = count.parameters(V3).total_with_mtp - 59 * 256
    sums, norm, update, clear = step_ops(V3, Layout(dp=8, zero=0))
    assert isinstance(sums, Collective) and (sums.name, sums.bytes, sums.ranks) == ("all_reduce", 4 * trained, 8)
    assert (update.name, update.bytes) == ("AdamW", 22 * trained)
    split = Layout(pp=16, ep=64, dp=128, microbatches=120, schedule="dualpipe")
    shared, whole = (step_ops(V3, split.model_copy(update={"zero": zero}), rank=5) for zero in (1, 0))
    names = [(op.ranks, op.stride) for op in shared if isinstance(op, Collective) and op.name == "reduce_scatter"]
    assert [(op.ranks, op.stride) for op in whole if isinstance(op, Collective)] == names
    assert {op.name for op in whole if isinstance(op, Collective)} == {"all_reduce"}
