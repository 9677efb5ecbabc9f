"""The whole network: shapes at published size, initialisation, causality, caches, packed documents."""

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dovetail.catalog.presets import load_model
from dovetail.cost import count
from dovetail.engine.steps.cache import contiguous_cache
from dovetail.model.experts.gate import Routing
from dovetail.model.experts.moe import Dispatched, LocalDispatcher
from dovetail.model.transformer import Transformer, initialize
from dovetail.numerics.formats.errors import network_terms, normwise_error, rowwise_error, tolerance
from dovetail.spec.model import Mla, ModelSpec

SpecFactory = Callable[..., ModelSpec]
ModelFactory = Callable[..., Transformer]


def on_meta(name: str) -> Transformer:
    with torch.device("meta"):
        return Transformer(load_model(name))


def some_tokens(spec: ModelSpec, batch: int, length: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, spec.vocab_size, (batch, length), generator=generator)


def bound_of(spec: ModelSpec, length: int) -> float:
    # beside the sums, an angle at position p is wrong by p u
    return tolerance(torch.float32, roundings=length, terms=network_terms(spec, length))


# ---- At published size ----


@pytest.mark.parametrize(
    ("name", "total"),
    [("deepseek-v3", 671_026_419_200), ("deepseek-v2", 235_741_434_880), ("deepseek-v2-lite", 15_706_484_224)],
)
def test_parameter_counts_of_the_published_models(name: str, total: int) -> None:
    model = on_meta(name)
    tensors = model.state_dict()
    mtp = sum(tensor.numel() for key, tensor in tensors.items() if key.startswith("mtp."))
    assert sum(tensor.numel() for tensor in tensors.values()) - mtp == total
    assert count.parameters(model.spec).total == total
    assert mtp == count.parameters(model.spec).mtp == (11_610_068_224 if name == "deepseek-v3" else 0)


def expected_block(spec: ModelSpec, layer: int) -> dict[str, tuple[int, ...]]:
    mla, moe, dim = spec.attention, spec.moe, spec.hidden_size
    assert isinstance(mla, Mla)
    assert moe
    heads, width = mla.num_attention_heads, moe.moe_intermediate_size
    shapes: dict[str, tuple[int, ...]] = {
        "input_layernorm.weight": (dim,),
        "post_attention_layernorm.weight": (dim,),
        "self_attn.kv_a_proj_with_mqa.weight": (mla.kv_lora_rank + mla.qk_rope_head_dim, dim),
        "self_attn.kv_a_layernorm.weight": (mla.kv_lora_rank,),
        "self_attn.kv_b_proj.weight": (heads * (mla.qk_nope_head_dim + mla.v_head_dim), mla.kv_lora_rank),
        "self_attn.o_proj.weight": (dim, heads * mla.v_head_dim),
    }
    if mla.q_lora_rank is None:
        shapes["self_attn.q_proj.weight"] = (heads * mla.qk_head_dim, dim)
    else:
        shapes["self_attn.q_a_proj.weight"] = (mla.q_lora_rank, dim)
        shapes["self_attn.q_a_layernorm.weight"] = (mla.q_lora_rank,)
        shapes["self_attn.q_b_proj.weight"] = (heads * mla.qk_head_dim, mla.q_lora_rank)
    if not spec.is_moe_layer(layer):
        shapes["mlp.gate_up_proj.weight"] = (2 * spec.intermediate_size, dim)
        shapes["mlp.down_proj.weight"] = (dim, spec.intermediate_size)
        return shapes
    shapes["mlp.gate.weight"] = (moe.n_routed_experts, dim)
    if moe.has_bias:
        shapes["mlp.gate.e_score_correction_bias"] = (moe.n_routed_experts,)
    shapes["mlp.experts.gate_up_proj"] = (moe.n_routed_experts, 2 * width, dim)
    shapes["mlp.experts.down_proj"] = (moe.n_routed_experts, dim, width)
    if moe.n_shared_experts:
        shapes["mlp.shared_experts.gate_up_proj.weight"] = (2 * width * moe.n_shared_experts, dim)
        shapes["mlp.shared_experts.down_proj.weight"] = (dim, width * moe.n_shared_experts)
    return shapes


def expected_state(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    dim, layers = spec.hidden_size, spec.num_hidden_layers
    shapes: dict[str, tuple[int, ...]] = {"embed_tokens.weight": (spec.vocab_size, dim), "norm.weight": (dim,)}
    if not spec.tie_word_embeddings:
        shapes["lm_head.weight"] = (spec.vocab_size, dim)
    for layer in range(layers):
        shapes |= {f"layers.{layer}.{name}": shape for name, shape in expected_block(spec, layer).items()}
    for k in range(spec.num_nextn_predict_layers):
        shapes |= {f"mtp.{k}.{name}.weight": (dim,) for name in ("enorm", "hnorm", "norm")}
        shapes[f"mtp.{k}.eh_proj.weight"] = (dim, 2 * dim)
        block = expected_block(spec, layers + k)
        shapes |= {f"mtp.{k}.block.{name}": shape for name, shape in block.items()}
    return shapes


@pytest.mark.parametrize("name", ["deepseek-v3", "deepseek-v2", "deepseek-v2-lite"])
def test_names_shapes_and_dtypes(name: str) -> None:
    model = on_meta(name)
    assert {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()} == expected_state(model.spec)
    for key, tensor in model.state_dict().items():
        is_wide = key.endswith(("norm.weight", ".gate.weight", "e_score_correction_bias"))
        assert tensor.dtype == (torch.float32 if is_wide else torch.bfloat16), key


def test_tied_embeddings_have_no_head(tiny_spec: SpecFactory, random_model: ModelFactory) -> None:
    spec = tiny_spec(tie_word_embeddings=True, num_nextn_predict_layers=0)
    model = random_model(spec)
    assert {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()} == expected_state(spec)
    logits = model.logits(model(some_tokens(spec, 1, 5)).hidden)
    logits.logsumexp(-1).sum().backward()
    grad = model.embed_tokens.weight.grad
    assert grad is not None
    assert grad.abs().sum(1).count_nonzero() == spec.vocab_size


# ---- Initialisation ----


def test_initialisation_is_normal_with_the_published_deviation() -> None:
    published = load_model("deepseek-v3").initializer_range
    assert published == 0.006
    spec = load_model("quickstart").model_copy(update={"initializer_range": published})
    model = Transformer(spec, torch.float32)
    initialize(model, 0)
    for name, parameter in model.named_parameters():
        if name.endswith("norm.weight"):
            assert (parameter == 1).all(), name
            continue
        n = parameter.numel()
        standard = parameter.detach().double() / 0.006
        # six standard errors of the mean, of the variance and of the fourth moment
        assert abs(standard.mean()) < 6 / n**0.5, name
        assert abs(standard.square().mean() - 1) < 6 * (2 / n) ** 0.5, name
        assert abs(standard.pow(4).mean() - 3) < 6 * (96 / n) ** 0.5, name
    assert all((buffer == 0).all() for buffer in model.buffers())


def test_initialisation_is_a_function_of_the_seed_in_every_dtype(tiny_spec: SpecFactory) -> None:
    spec = tiny_spec()
    states = []
    for dtype, seed in ((torch.float32, 1), (torch.float32, 1), (torch.bfloat16, 1), (torch.float32, 2)):
        torch.manual_seed(len(states))  # the global generator plays no part
        model = Transformer(spec, dtype)
        initialize(model, seed)
        states.append(model.state_dict())
    first, again, low, other = states
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert all(torch.equal(first[name].to(low[name].dtype), low[name]) for name in first)
    drawn = [name for name in first if first[name].std() > 0]
    assert len(drawn) > 30
    assert not any(torch.equal(first[name], other[name]) for name in drawn)
    experts = first["layers.1.mlp.experts.down_proj"]
    assert not torch.equal(experts[0], experts[1])


def test_first_loss_is_that_of_guessing(tiny_spec: SpecFactory) -> None:
    spec = tiny_spec(initializer_range=0.006)
    model = Transformer(spec, torch.float32)
    initialize(model, 0)
    tokens = some_tokens(spec, 2, 30)
    logits = model.logits(model(tokens).hidden)
    loss = F.cross_entropy(logits.flatten(0, 1), tokens.flatten())
    # logits have a deviation of 0.006 sqrt(32) = 0.034; their part of the loss is of that order over sqrt(60)
    assert abs(float(loss.detach()) - math.log(96)) < 6 * 0.006 * 32**0.5 / 60**0.5 + 0.034**2


# ---- What a pass sees ----


def test_a_token_sees_its_past_only(tiny_spec: SpecFactory, random_model: ModelFactory) -> None:
    spec = tiny_spec()
    model, tokens = random_model(spec), some_tokens(spec, 2, 30)
    changed = tokens.clone()
    changed[:, 20] = (changed[:, 20] + 1) % spec.vocab_size
    with torch.no_grad():
        before, after = model(tokens).hidden, model(changed).hidden
    assert rowwise_error(after[:, :20], before[:, :20]) < bound_of(spec, 30)
    assert ((after - before)[:, 20:].abs().amax(-1) > 100 * bound_of(spec, 30)).all()


@pytest.mark.parametrize("absorbed", [False, True])
def test_prefill_and_decode_are_the_full_pass(
    absorbed: bool, tiny_spec: SpecFactory, random_model: ModelFactory
) -> None:
    spec = tiny_spec()
    model, tokens = random_model(spec), some_tokens(spec, 2, 17)
    cache = contiguous_cache(spec, 2, capacity=20, dtype=torch.float32).select(range(2))
    with torch.no_grad():
        full = model(tokens).hidden
        parts = []
        for start, stop in ((0, 9), (9, 14), (14, 15), (15, 16), (16, 17)):
            positions = torch.arange(start, stop).expand(2, -1)
            is_absorbed = absorbed and start > 0
            parts.append(model(tokens[:, start:stop], positions, cache=cache, absorbed=is_absorbed).hidden)
    assert rowwise_error(torch.cat(parts, dim=1), full) < bound_of(spec, 17)


def test_packed_documents_are_those_alone(tiny_spec: SpecFactory, random_model: ModelFactory) -> None:
    """Hidden states and gradients, over a border inside a step of keys and one past a block of queries."""
    spec = tiny_spec()
    model, tokens = random_model(spec), some_tokens(spec, 1, 290)
    borders = [(0, 70), (70, 271), (271, 290)]
    ids = torch.cat([torch.full((1, b - a), n) for n, (a, b) in enumerate(borders)], dim=1)
    packed = model(tokens, document_ids=ids).hidden
    alone = torch.cat([model(tokens[:, a:b]).hidden for a, b in borders], dim=1)
    assert rowwise_error(packed, alone) < bound_of(spec, 290)
    weights = [parameter for name, parameter in model.named_parameters() if not name.startswith(("mtp", "lm_head"))]
    probe = torch.randn(packed.shape, generator=torch.Generator().manual_seed(1))
    ours = torch.autograd.grad(packed, weights, probe, allow_unused=True)
    theirs = torch.autograd.grad(alone, weights, probe, allow_unused=True)
    for mine, right in zip(ours, theirs, strict=True):
        assert mine is not None
        assert right is not None
        assert normwise_error(mine, right) < 3 * bound_of(spec, 290)
    with torch.no_grad():
        assert normwise_error(model(tokens).hidden, alone) > 100 * bound_of(spec, 290)


def test_documents_and_a_cache_do_not_go_together(tiny_spec: SpecFactory, random_model: ModelFactory) -> None:
    spec = tiny_spec()
    model, tokens = random_model(spec), some_tokens(spec, 1, 4)
    cache = contiguous_cache(spec, 1, capacity=8, dtype=torch.float32).select([0])
    for changes in ({"cache": cache}, {"absorbed": True}):
        with pytest.raises(ValueError, match="one document per row"):
            model(tokens, document_ids=torch.zeros_like(tokens), **changes)


@pytest.mark.parametrize("shape", [(2, 0), (1, 1), (3, 1)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_tokens_and_one(
    shape: tuple[int, int], dtype: torch.dtype, tiny_spec: SpecFactory, random_model: ModelFactory
) -> None:
    spec = tiny_spec()
    model = random_model(spec, dtype)
    output = model(some_tokens(spec, *shape))
    logits = model.logits(output.hidden)
    assert logits.shape == (*shape, 96)
    assert logits.dtype == torch.float32
    assert output.hidden.dtype == dtype
    logits.sum().backward()
    assert [int(routing.counts.sum()) for routing in output.routings] == [2 * shape[0] * shape[1]] * 2


def test_bf16_is_fp32_to_its_own_rounding(tiny_spec: SpecFactory, random_model: ModelFactory) -> None:
    """Without experts, whose choice may change by a rounding."""
    spec = tiny_spec(first_k_dense_replace=3, num_nextn_predict_layers=0)
    wide, low = random_model(spec, torch.float32), random_model(spec, torch.bfloat16)
    wide.load_state_dict({name: tensor.float() for name, tensor in low.state_dict().items()})
    tokens = some_tokens(spec, 2, 30)
    with torch.no_grad():
        # ten roundings in a row per layer, scores of up to 8 or so among them
        bound = tolerance(torch.bfloat16, roundings=3 * (10 + 8), terms=network_terms(spec, 30))
        assert normwise_error(low(tokens).hidden, wide(tokens).hidden) < bound


@pytest.mark.parametrize("name", ["layers.0.self_attn.o_proj.weight", "norm.weight", "lm_head.weight"])
def test_a_broken_weight_is_not_hidden(name: str, tiny_spec: SpecFactory, random_model: ModelFactory) -> None:
    spec = tiny_spec()
    model = random_model(spec)
    with torch.no_grad():
        model.state_dict()[name].flatten()[0] = float("nan")
        assert not model.logits(model(some_tokens(spec, 1, 6)).hidden).isfinite().all()


def test_the_dispatcher_is_handed_in(tiny_spec: SpecFactory) -> None:
    class Counting(LocalDispatcher):
        calls = 0

        def dispatch(self, x: Tensor, routing: Routing) -> Dispatched:
            Counting.calls += 1
            return super().dispatch(x, routing)

    spec = tiny_spec()
    model = Transformer(spec, torch.float32, dispatcher=Counting())
    initialize(model, 0)
    output = model(some_tokens(spec, 1, 4))
    model.mtp_forward(0, output.hidden, some_tokens(spec, 1, 4))
    assert Counting.calls == 3


def test_grouped_query_models_are_refused() -> None:
    with pytest.raises(ValueError, match="counting only"):
        Transformer(load_model("llama-3.1-405b"))
