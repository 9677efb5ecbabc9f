"""The listed work against torch's own FLOP counter on our model, the exact counts, and byte counts made by hand."""

import random
from collections.abc import Callable, Iterable
from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from dovetail.catalog.precision import load_recipe
from dovetail.catalog.presets import load_model
from dovetail.cost import count
from dovetail.cost.ops.ffn import touched_experts
from dovetail.cost.ops.layer import embedding_ops, head_ops, layer_ops, mtp_ops
from dovetail.cost.ops.ops import Attention, Collective, Elementwise, Exchange, Gemm, Op
from dovetail.model.experts.moe import LocalDispatcher
from dovetail.model.transformer import Transformer, initialize
from dovetail.spec.layout import Layout
from dovetail.spec.model import Mla, ModelSpec

V3 = load_model("deepseek-v3")
FP8, BF16 = load_recipe("deepseek-v3"), load_recipe("bf16")
PRETRAINING = Layout(pp=16, ep=64, dp=128, microbatches=120, schedule="dualpipe")
TOKENS = 32

SpecFactory = Callable[..., ModelSpec]


def whole_model(spec: ModelSpec, phase: str = "training", mtp: bool = True) -> list[Op]:
    """Everything one GPU runs for one sequence of TOKENS."""
    sizes = (TOKENS, phase, TOKENS)
    ops = [op for layer in range(spec.num_hidden_layers) for op in layer_ops(spec, layer, Layout(), BF16, *sizes)]
    modules = spec.num_nextn_predict_layers if mtp else 0
    ends = embedding_ops(spec, Layout(), TOKENS, phase) + head_ops(spec, Layout(), TOKENS, phase)
    return [*ops, *ends, *modules * mtp_ops(spec, Layout(), BF16, *sizes)]


def flop(ops: Iterable[Op], *passes: str, recomputed: bool = False) -> float:
    """Of products and attention, which torch counts without masks."""
    products = [replace(op, causal=False) if isinstance(op, Attention) else op for op in ops]
    listed = [op for op in products if isinstance(op, Gemm | Attention) and op.pass_ in passes]
    return sum(op.flop for op in listed if getattr(op, "recomputed", False) == recomputed)


def model_of(spec: ModelSpec, recompute: bool = False) -> Transformer:
    model = Transformer(spec, torch.float32, LocalDispatcher(row_multiple=1), recompute)
    initialize(model, seed=0)
    return model


def loss_of(model: Transformer) -> torch.Tensor:
    ids = torch.arange(TOKENS)[None]
    output = model(ids)
    total = model.logits(output.hidden).square().mean()
    for depth in range(model.spec.num_nextn_predict_layers):
        output = model.mtp_forward(depth, output.hidden, ids)
        total = total + model.logits(output.hidden).square().mean()
    return total


@pytest.mark.parametrize(
    "changes",
    [{}, {"first_k_dense_replace": 3}, {"q_lora_rank": None}, {"n_shared_experts": 0, "num_nextn_predict_layers": 2}],
    ids=["experts", "dense", "full-query", "two-mtp"],
)
def test_forward_and_backward_products_are_those_that_torch_counts(
    tiny_spec: SpecFactory, changes: dict[str, object]
) -> None:
    spec = tiny_spec(**changes)
    model, listed = model_of(spec), whole_model(spec)
    with FlopCounterMode(display=False) as forward:
        loss = loss_of(model)
    with FlopCounterMode(display=False) as backward:
        loss.backward()
    assert forward.get_total_flops() == flop(listed, "forward")
    assert backward.get_total_flops() == flop(listed, "dgrad", "wgrad")


def test_recomputed_products_are_what_recomputation_adds_in_torch(tiny_spec: SpecFactory) -> None:
    spec = tiny_spec()
    counts = []
    for recompute in (False, True):
        loss = loss_of(model_of(spec, recompute))
        with FlopCounterMode(display=False) as backward:
            loss.backward()
        counts.append(backward.get_total_flops())
    assert counts[1] - counts[0] == flop(whole_model(spec), "dgrad", recomputed=True) > 0


def test_absorbed_attention_is_what_torch_counts(tiny_spec: SpecFactory) -> None:
    model = model_of(tiny_spec())
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.logits(model(torch.arange(TOKENS)[None], absorbed=True).hidden)
    assert counter.get_total_flops() == flop(whole_model(model.spec, "decode", mtp=False), "forward")


@pytest.mark.parametrize("mtp", [False, True])
def test_deepseek_v3_runs_what_the_rule_says(mtp: bool) -> None:
    """[ISCA Table 2]: 250.46 GFLOP per token, exactly, but for the vectors (norms, gate biases), which the rule counts
    as if they were in products. Attention's backward pass is 2.6 times its forward, not twice, for scores again."""
    tokens, per_layer = 4096, 2 * 7168 + 1536 + 512
    vectors = 61 * per_layer + 58 * 256 + 7168 + mtp * (per_layer + 256 + 3 * 7168)
    ops = [o for layer in range(61) for o in layer_ops(V3, layer, PRETRAINING, FP8, tokens, "training", tokens)]
    ops += embedding_ops(V3, PRETRAINING, tokens, "training") + head_ops(V3, PRETRAINING, tokens, "training")
    ops += mtp_ops(V3, PRETRAINING, FP8, tokens, "training", tokens) if mtp else ()
    products = sum(op.flop for op in ops if isinstance(op, Gemm) and not op.recomputed)
    core = sum(op.flop for op in ops if isinstance(op, Attention) and op.pass_ == "forward")
    again = sum(op.flop for op in ops if isinstance(op, Attention) and op.pass_ == "dgrad")
    assert again == pytest.approx(2.6 * core)
    rule = count.training_flop_per_token(V3, tokens, mtp=mtp)
    assert (products + 3 * core) / tokens == rule - 6 * vectors


def test_products_of_deepseek_v3_have_the_published_shapes() -> None:
    """The rows of [DeepGEMM]'s tables; 4 experts with 8192 rows are its first grouped row."""
    ops = layer_ops(V3, 3, PRETRAINING, FP8, 4096, "training", 4096)
    forward = {
        op.name: (op.groups, op.m, op.n, op.k, op.format)
        for op in ops
        if isinstance(op, Gemm) and op.pass_ == "forward"
    }
    assert forward == {
        "q_a and kv_a": (1, 4096, 2112, 7168, "fp8"),
        "q_b": (1, 4096, 24576, 1536, "fp8"),
        "kv_b": (1, 4096, 32768, 512, "fp8"),
        "o_proj": (1, 4096, 7168, 16384, "fp8"),
        "gate": (1, 4096, 256, 7168, "fp32"),
        "experts gate and up": (4, 8192, 4096, 7168, "fp8"),
        "experts down": (4, 8192, 7168, 2048, "fp8"),
        "shared gate and up": (1, 4096, 4096, 7168, "fp8"),
        "shared down": (1, 4096, 7168, 2048, "fp8"),
    }


def test_the_same_product_three_times() -> None:
    ops = layer_ops(V3, 3, PRETRAINING, FP8, 4096, "training", 4096)
    by_name: dict[str, list[Gemm]] = {}
    for op in ops:
        if isinstance(op, Gemm) and not op.recomputed:
            by_name.setdefault(op.name, []).append(op)
    for products in by_name.values():
        assert [op.pass_ for op in products] == ["forward", "dgrad", "wgrad"]
        assert len({op.flop for op in products}) == 1
    assert {op.name for op in ops if isinstance(op, Gemm) and op.recomputed} == {"q_b", "kv_b"}


def total(ops: Iterable[Op], *names: str) -> float:
    found = [op for op in ops if isinstance(op, Elementwise) and op.name in names]
    assert {op.name for op in found} == set(names)
    return sum(op.bytes for op in found)


def test_bytes_of_casts_by_hand() -> None:
    """Per token: BF16 read, FP8 with an FP32 scale for every 128 written; o_proj's input also kept in E5M6."""
    ops, scaled = layer_ops(V3, 3, PRETRAINING, FP8, 4096, "training", 4096), 1 + 4 / 128
    assert total(ops, "quantise input of q_a and kv_a") == 4096 * 7168 * (2 + scaled)
    assert total(ops, "quantise input of o_proj") == 4096 * 16384 * (2 + scaled + 1.5 + 4 / 128)
    assert total(ops, "experts SwiGLU") == 8 * 4096 * 2048 * (2 * 2 + scaled)
    assert total(ops, "keep experts SwiGLU input") == 8 * 4096 * 4096 * (2 + scaled)
    assert total(ops, "requantise input of experts gate and up") == 8 * 4096 * 7168 * 2 * scaled
    assert total(ops, "quantise weight of o_proj") == 2 * 16384 * 7168 * (3 + 4 / 128**2)  # for fprop and for dgrad
    assert total(ops, "quantise weight of kv_b") == 32768 * 512 * (7 + 3 * 4 / 128**2)  # fprop; fprop again and dgrad


def test_plain_recipe_casts_nothing_and_makes_norms_again() -> None:
    ops = layer_ops(V3, 3, PRETRAINING, BF16, 4096, "training", 4096)
    assert not [op.name for op in ops if isinstance(op, Elementwise) and "quantise" in op.name]
    assert {op.format for op in ops if isinstance(op, Gemm)} == {"bf16", "fp32"}
    again = {op.name for op in ops if isinstance(op, Elementwise) and op.recomputed}
    assert again == {"ffn norm", "latent norms", "attention norm", "head layout"}
    in_fp8 = layer_ops(V3, 3, PRETRAINING, FP8, 4096, "training", 4096)
    assert {op.name for op in in_fp8 if isinstance(op, Elementwise) and op.recomputed} == {"ffn norm", "head layout"}


def exchanges(ops: Iterable[Op]) -> list[tuple[str, str, float]]:
    return [(op.name, op.pass_, op.bytes_per_copy) for op in ops if isinstance(op, Exchange)]


def test_messages_have_deepep_sizes() -> None:
    decode = layer_ops(V3, 3, Layout(ep=128, dp=128), FP8, 128, "decode", 4096, 128)
    assert exchanges(decode) == [("dispatch", "forward", 7408), ("combine", "forward", 14336)]
    training = exchanges(layer_ops(V3, 3, PRETRAINING, FP8, 4096, "training", 4096))
    assert [(name, pass_) for name, pass_, _ in training] == [
        ("dispatch", "forward"),
        ("combine", "forward"),
        ("dispatch", "dgrad"),
        ("combine", "dgrad"),
    ]
    assert [round(size / 7168, 2) for _, _, size in training] == [1.04, 2.0, 1.03, 2.0]
    assert exchanges(layer_ops(V3, 0, PRETRAINING, FP8, 4096, "training", 4096)) == []


@pytest.mark.parametrize(("name", "size"), [("combine-logfmt-10", 9184), ("combine-e4m3", 7392)])
def test_messages_back_in_narrow_formats(name: str, size: int) -> None:
    """[DeepEP] LogFMT-10: 9,184 bytes, two BF16 limits for every 128 values included."""
    decode = layer_ops(V3, 3, Layout(ep=128, dp=128), load_recipe(name), 128, "decode", 4096, 128)
    assert exchanges(decode)[1] == ("combine", "forward", size)


def test_tensor_parallel_heads_share_the_work_out() -> None:
    """Each of four ranks has a quarter of the heads for all tokens, and a quarter of the tokens elsewhere."""
    whole = layer_ops(V3, 3, Layout(ep=32, dp=32), FP8, 4096, "prefill", 4096)
    split = layer_ops(V3, 3, Layout(ep=32, dp=8, tp=4), FP8, 4096, "prefill", 4096)
    assert flop(whole, "forward") == 4 * flop(split, "forward")
    moved = [(op.name, op.bytes) for op in split if isinstance(op, Collective)]
    assert moved == [("all_gather", 4096 * 2112 * 2), ("reduce_scatter", 4096 * 7168 * 2)]
    assert not [op for op in whole if isinstance(op, Collective)]


def test_redundant_experts_share_the_same_rows() -> None:
    """288 slots on 144 GPUs: 2 each [V3 §3.4]."""
    ops = layer_ops(V3, 3, Layout(ep=144, dp=144, redundant_experts=32), FP8, 90, "decode", 5000, 90)
    up = next(op for op in ops if isinstance(op, Gemm) and op.name == "experts gate and up")
    assert (up.groups, up.m, up.layout) == (2, 90 * 8 / 2, "masked")


@pytest.mark.parametrize(
    ("layout", "tokens"),
    [
        (Layout(ep=8, dp=8), 0.5),
        (Layout(ep=8, dp=8), 3),
        (Layout(ep=4, dp=8), 2),  # two groups that share nothing
        (Layout(), 3),
        (Layout(ep=9, dp=9, redundant_experts=2), 1),
    ],
    ids=["half", "few", "replicas", "one rank", "redundant"],
)
def test_experts_that_tokens_touch_by_counting_draws(layout: Layout, tokens: float, tiny_spec: SpecFactory) -> None:
    """The mean over many draws, of groups of experts as of all alike, is what the formula expects."""
    spec = tiny_spec(n_routed_experts=16, num_experts_per_tok=3, n_group=4, topk_group=2)
    slots, ranks, draw = 16 + layout.redundant_experts, layout.ep, random.Random(0)
    grouped = not layout.redundant_experts

    def chosen() -> list[int]:
        if not grouped:
            return draw.sample(range(slots), 3)
        groups = draw.sample(range(4), 2)
        return draw.sample([4 * group + place for group in groups for place in range(4)], 3)

    draws = 4000
    counts = [len({each for _ in range(int(tokens * ranks)) for each in chosen()}) for _ in range(draws)]
    expected = touched_experts(spec, layout, tokens) * ranks
    error = (sum(each * each for each in counts) / draws - (sum(counts) / draws) ** 2) ** 0.5 / draws**0.5
    assert abs(sum(counts) / draws - expected) < 4 * error


def test_training_reads_all_experts() -> None:
    ops = layer_ops(V3, 3, PRETRAINING, FP8, 4096, "training", 4096)
    assert {op.filled for op in ops if isinstance(op, Gemm)} == {1.0}


def test_prefix_keys_are_made_again_from_the_cache() -> None:
    """Half a prompt that was cached: kv_b sees all of it, the other products and the queries only what is new."""
    ops = layer_ops(V3, 3, Layout(ep=32, dp=32), FP8, 2048, "prefill", 4096)
    rows = {op.name: op.m for op in ops if isinstance(op, Gemm)}
    assert (rows["kv_b"], rows["q_b"]) == (4096, 2048)
    core = next(op for op in ops if isinstance(op, Attention))
    assert core.visible == 2048 + 1024


def test_decoding_reads_the_cache_and_is_compute_bound_at_128_heads() -> None:
    """[FlashMLA]: 2 x heads FLOP per byte, 576 and 512 wide keys and values: intensity 242 at 128 heads."""
    assert isinstance(V3.attention, Mla)
    ops = layer_ops(V3, 3, Layout(ep=144, dp=144, redundant_experts=32), FP8, 90, "decode", 5000, 90)
    core = next(op for op in ops if isinstance(op, Attention))
    cache = 90 * 5000 * count.cache_bytes_per_token(V3) / V3.num_hidden_layers
    assert cache < core.bytes < 1.1 * cache
    assert core.flop == 2 * 128 * 90 * 5000 * (576 + 512)
    assert core.flop / cache == pytest.approx(2 * 128 * (576 + 512) / (2 * 576))


def test_sampled_tokens_alone_meet_the_head_in_serving() -> None:
    serving = head_ops(V3, Layout(), 3, "prefill")
    assert [op.pass_ for op in serving] == ["forward"] * 3
    assert sum(op.flop for op in serving if isinstance(op, Gemm)) == 2 * 3 * 129280 * 7168


def test_grouped_query_attention_is_refused() -> None:
    with pytest.raises(ValueError, match="plans are made for latent attention"):
        layer_ops(load_model("qwen2.5-72b"), 0, Layout(), BF16, 8, "training", 8)
