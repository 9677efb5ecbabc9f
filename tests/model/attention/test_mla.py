"""MLA: the equations one head at a time in FP64, its two forms, its cache, document borders."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dovetail.model.attention.causal import document_starts
from dovetail.model.attention.mla import Context, MultiHeadLatentAttention
from dovetail.model.attention.rope import attention_scale, tables
from dovetail.model.norm import rms_norm_reference
from dovetail.numerics.formats.errors import network_terms, normwise_error, rowwise_error, tolerance
from dovetail.spec.model import ModelSpec

Draw = Callable[..., Tensor]
SpecFactory = Callable[..., ModelSpec]
YARN = {"factor": 40.0, "original_max_position_embeddings": 16, "mscale": 1.0, "mscale_all_dim": 1.0}
SHAPES = [{}, {"q_lora_rank": None}, {"rope_scaling": YARN}, {"qk_nope_head_dim": 12, "v_head_dim": 20}]


class PagedCache:
    """A `LatentCache` whose tokens lie in pages of three, handed out backwards; attention reads page by page."""

    PAGE = 3

    def __init__(self, spec: ModelSpec, batch: int, capacity: int) -> None:
        self.width, pages = spec.attention.kv_lora_rank, batch * -(-capacity // self.PAGE)
        self.data = torch.full((pages, self.PAGE, self.width + spec.attention.qk_rope_head_dim), torch.nan)
        self.table = torch.arange(pages).flip(0).view(batch, -1)  # page of each sequence's position // PAGE
        self.calls: list[int] = []

    def reserve(self, num_keys: int) -> None:
        pass

    def write(self, layer: int, positions: Tensor, latent: Tensor, rope_key: Tensor) -> None:
        self.calls.append(layer)
        pages = self.table.gather(1, positions // self.PAGE)
        self.data[pages, positions % self.PAGE] = torch.cat((latent, rope_key), dim=-1)

    def gather(self, layer: int, num_keys: int) -> tuple[Tensor, Tensor]:
        whole = self.data[self.table].flatten(1, 2)[:, :num_keys]
        return whole[..., : self.width], whole[..., self.width :]

    def attend(self, layer: int, query: Tensor, positions: Tensor, num_keys: int, scale: float) -> Tensor:
        """Softmax over pages one after another: each adds to the sums of those before it."""
        largest = torch.full(query.shape[:3], -torch.inf)
        total, mixed = torch.zeros(query.shape[:3]), torch.zeros(*query.shape[:3], self.width)
        for column in range(self.table.shape[1]):
            page = self.data[self.table[:, column]][:, None].nan_to_num()  # [B, 1, PAGE, width + rope]
            places = torch.arange(column * self.PAGE, (column + 1) * self.PAGE)
            scores = query @ page.transpose(-1, -2) * scale
            scores = scores.masked_fill(places > positions[:, None, :, None], -torch.inf)
            top = torch.maximum(largest, scores.amax(dim=-1))
            weights, kept = (scores - top[..., None]).exp(), (largest - top).exp()
            total = total * kept + weights.sum(dim=-1)
            mixed, largest = mixed * kept[..., None] + weights @ page[..., : self.width], top
        return mixed / total[..., None]


def layer_of(spec: ModelSpec, draw: Draw, dtype: torch.dtype = torch.float32) -> MultiHeadLatentAttention:
    layer = MultiHeadLatentAttention(spec, dtype)
    for name, parameter in layer.named_parameters():
        values = draw(*parameter.shape, scale=0.3)
        parameter.data = (values.abs() + 0.5 if "layernorm" in name else values).to(parameter.dtype)
    return layer


def context(spec: ModelSpec, positions: Tensor, **changes: object) -> Context:
    cos, sin = tables(spec, spec.attention.qk_rope_head_dim, positions)
    num_keys = int(positions.max()) + 1 if "cache" in changes else 0
    return Context(positions=positions, cos=cos, sin=sin, num_keys=num_keys, **changes)


def places(batch: int, start: int, stop: int) -> Tensor:
    return torch.arange(start, stop).expand(batch, -1)


def bound_of(spec: ModelSpec, length: int, dtype: torch.dtype = torch.float32) -> float:
    """One layer: q and kv down, norm, up, rotated, scores (an exponent of up to 8 or so), mixed, out."""
    return tolerance(dtype, roundings=16, terms=network_terms(spec, length))


def by_hand(layer: MultiHeadLatentAttention, spec: ModelSpec, x: Tensor) -> Tensor:
    """[V3 eqs 1-11] in FP64 for one sequence x [T, dim], head by head."""
    mla, eps = spec.attention, spec.rms_norm_eps
    weights = {name: parameter.detach().double() for name, parameter in layer.named_parameters()}
    nope, rope, v = mla.qk_nope_head_dim, mla.qk_rope_head_dim, mla.v_head_dim
    angles = torch.atan2(*reversed(tables(spec, rope, torch.arange(len(x))))).double()

    def rotated(pairs: Tensor) -> Tensor:
        turned = torch.view_as_complex(pairs.unflatten(-1, (rope // 2, 2)).contiguous()) * torch.exp(1j * angles)
        return torch.view_as_real(turned).flatten(-2)

    x = x.double()
    compressed = x @ weights["kv_a_proj_with_mqa.weight"].t()
    latent = rms_norm_reference(compressed[:, : mla.kv_lora_rank], weights["kv_a_layernorm.weight"], eps)
    shared_key = rotated(compressed[:, mla.kv_lora_rank :])
    if mla.q_lora_rank is None:
        queries = x @ weights["q_proj.weight"].t()
    else:
        down = x @ weights["q_a_proj.weight"].t()
        queries = rms_norm_reference(down, weights["q_a_layernorm.weight"], eps) @ weights["q_b_proj.weight"].t()
    heads = []
    for i in range(mla.num_attention_heads):
        q = queries[:, i * (nope + rope) : (i + 1) * (nope + rope)]
        kv = latent @ weights["kv_b_proj.weight"][i * (nope + v) : (i + 1) * (nope + v)].t()
        scores = q[:, :nope] @ kv[:, :nope].t() + rotated(q[:, nope:]) @ shared_key.t()
        future = torch.ones(len(x), len(x), dtype=torch.bool).triu(1)
        scores = (scores * attention_scale(spec, nope + rope)).masked_fill(future, float("-inf"))
        heads.append(scores.softmax(-1) @ kv[:, nope:])
    return torch.cat(heads, dim=-1) @ weights["o_proj.weight"].t()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_equations(shape: dict[str, object], tiny_spec: SpecFactory, draw: Draw) -> None:
    spec = tiny_spec(**shape)
    layer, x = layer_of(spec, draw), draw(2, 19, 32)
    output = layer(x, context(spec, places(2, 0, 19)), 0)
    truth = torch.stack([by_hand(layer, spec, row) for row in x])
    assert rowwise_error(output, truth) < bound_of(spec, 19)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_absorbed_is_expanded(shape: dict[str, object], dtype: torch.dtype, tiny_spec: SpecFactory, draw: Draw) -> None:
    spec = tiny_spec(**shape)
    layer, x = layer_of(spec, draw, dtype), draw(2, 19, 32, dtype=dtype)
    expanded = layer(x, context(spec, places(2, 0, 19)), 0)
    absorbed = layer(x, context(spec, places(2, 0, 19), absorbed=True), 0)
    assert normwise_error(absorbed, expanded) < bound_of(spec, 19, dtype)


@pytest.mark.parametrize("absorbed", [False, True])
def test_prefill_and_decode_are_the_full_pass(absorbed: bool, tiny_spec: SpecFactory, draw: Draw) -> None:
    """In chunks of 7, 5 and 1, over a cache of latents and rotary keys."""
    spec = tiny_spec(rope_scaling=YARN)
    layer, x, cache = layer_of(spec, draw), draw(2, 14, 32), PagedCache(spec, 2, 16)
    full = layer(x, context(spec, places(2, 0, 14)), 3)
    parts = []
    for start, stop in ((0, 7), (7, 12), (12, 13), (13, 14)):
        step = context(spec, places(2, start, stop), cache=cache, absorbed=absorbed)
        parts.append(layer(x[:, start:stop], step, 3))
    assert rowwise_error(torch.cat(parts, dim=1), full) < bound_of(spec, 14)
    assert cache.calls == [3] * 4


@pytest.mark.parametrize("absorbed", [False, True])
def test_sequences_at_different_positions(absorbed: bool, tiny_spec: SpecFactory, draw: Draw) -> None:
    """A sequence never sees past its own position, whatever others in the batch have left in the cache."""
    spec = tiny_spec()
    layer, x, cache = layer_of(spec, draw), draw(2, 10, 32), PagedCache(spec, 2, 16)
    full = layer(x, context(spec, places(2, 0, 10)), 0)
    cache.data.fill_(7.0)
    layer(x, context(spec, places(2, 0, 10), cache=cache), 0)
    stale = torch.arange(4, 16)
    cache.data[cache.table[1, stale // cache.PAGE], stale % cache.PAGE] = 7.0
    rows = torch.stack((x[0, 8:10], x[1, 3:5]))
    step = context(spec, torch.tensor([[8, 9], [3, 4]]), cache=cache, absorbed=absorbed)
    expected = torch.stack((full[0, 8:10], full[1, 3:5]))
    assert rowwise_error(layer(rows, step, 0), expected) < bound_of(spec, 10)


def test_packed_documents_are_those_alone(tiny_spec: SpecFactory, draw: Draw) -> None:
    """Although positions go on counting: scores depend on distance."""
    spec = tiny_spec()
    layer, x, grad = layer_of(spec, draw), draw(1, 80, 32).requires_grad_(), draw(1, 80, 32)
    ids = torch.zeros(1, 80, dtype=torch.int32)
    ids[:, 23:] += 1
    ids[:, 70:] += 1
    packed = layer(x, context(spec, places(1, 0, 80), first=document_starts(ids)), 0)
    borders = [(0, 23), (23, 70), (70, 80)]
    alone = [layer(x[:, a:b], context(spec, places(1, 0, b - a)), 0) for a, b in borders]
    # an angle at position p is wrong by p u
    bound = bound_of(spec, 80) + tolerance(torch.float32, roundings=80)
    assert rowwise_error(packed, torch.cat(alone, dim=1)) < bound
    leaves = (x, *layer.parameters())
    ours = torch.autograd.grad(packed, leaves, grad)
    theirs = torch.autograd.grad(torch.cat(alone, dim=1), leaves, grad)
    for mine, right in zip(ours, theirs, strict=True):
        assert normwise_error(mine, right) < 3 * bound
    joined = layer(x, context(spec, places(1, 0, 80)), 0)
    assert normwise_error(joined, packed) > 100 * bound


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(0, 5), (2, 0), (1, 1)], ids=str)
def test_nothing_and_one(shape: tuple[int, int], dtype: torch.dtype, tiny_spec: SpecFactory, draw: Draw) -> None:
    spec = tiny_spec()
    layer, x = layer_of(spec, draw, dtype), draw(*shape, 32, dtype=dtype).requires_grad_()
    output = layer(x, context(spec, places(shape[0], 0, shape[1])), 0)
    output.sum().backward()
    assert output.shape == (*shape, 32)
    assert x.grad is not None
    if shape == (1, 1):  # attention to oneself: the value projections alone
        mla, weights = spec.attention, dict(layer.named_parameters())
        latent = layer.kv_a_layernorm(layer.kv_a_proj_with_mqa(x)[..., : mla.kv_lora_rank])
        v = layer.keys_values(latent)[..., mla.qk_nope_head_dim :].flatten(2)
        assert torch.equal(output, F.linear(v, weights["o_proj.weight"]))


def test_strides_do_not_matter(tiny_spec: SpecFactory, draw: Draw) -> None:
    spec = tiny_spec()
    layer, x = layer_of(spec, draw), draw(2, 9, 32)
    here = context(spec, places(2, 0, 9))
    strided = x.transpose(0, 1).contiguous().transpose(0, 1)
    assert normwise_error(layer(strided, here, 0), layer(x, here, 0)) < bound_of(spec, 9)
    one_row = context(spec, places(1, 0, 9))
    assert torch.equal(layer(x, one_row, 0), layer(x, here, 0))


@pytest.mark.parametrize("absorbed", [False, True])
def test_nan_reaches_those_who_see_it(absorbed: bool, tiny_spec: SpecFactory, draw: Draw) -> None:
    spec = tiny_spec()
    layer, x = layer_of(spec, draw), draw(1, 9, 32)
    x[0, 5, 0] = float("nan")
    output = layer(x, context(spec, places(1, 0, 9), absorbed=absorbed), 0)
    assert not output[0, 5:].isfinite().any()
