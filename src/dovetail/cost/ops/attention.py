"""The operations of a layer's latent attention on one rank, up to the sum with the residual.

    down   norm, q_a and kv_a as one product, the norms of both latents
    up     q_b, kv_b, rotation and the layout of heads, the attention core, o_proj

Expanded attention (training, prompts) computes keys and values from the latents. Absorbed attention (decoding) applies
kv_b to the queries and the outputs instead, in BF16, and reads the cache of latents [V3 §2.1.1, day 6]. With tp > 1 a
rank runs "up" for all tokens and its share of the heads, and everything else for its share of the tokens.

For the backward pass the up-projections and the layout of heads are computed again, as are norms whose result a
product in BF16 needs [V3 §3.2.3]; products in FP8 have kept their own input [V3 §3.3.3].
"""

from __future__ import annotations

from dataclasses import dataclass

from dovetail.cost.ops.ops import BF16, FP32, Attention, Collective, Elementwise, Gemm, Op, Pass
from dovetail.cost.ops.product import Linear, coded_bytes, site_precision
from dovetail.spec.layout import Layout
from dovetail.spec.measurements import ElementwiseKind
from dovetail.spec.model import Mla, ModelSpec
from dovetail.spec.precision import Recipe

PART = "attention"


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionWork:
    """One layer's attention for `tokens` tokens of `sequences` sequences with `context` keys each."""

    spec: ModelSpec
    mla: Mla
    recipe: Recipe
    tp: int
    tokens: float
    context: float
    sequences: float
    is_training: bool

    @property
    def heads(self) -> int:
        return self.mla.num_attention_heads // self.tp

    @property
    def own_tokens(self) -> float:
        return self.tokens / self.tp

    @property
    def latent_dims(self) -> int:
        """The width of both latents, which have norms."""
        return (self.mla.q_lora_rank or 0) + self.mla.kv_lora_rank

    @property
    def key_tokens(self) -> float:
        """The number of tokens whose keys and values are computed, those of a cached prefix included."""
        return self.tokens if self.is_training else self.sequences * self.context


def attention_work(
    spec: ModelSpec, layout: Layout, recipe: Recipe, tokens: float, context: float, sequences: float, is_training: bool
) -> AttentionWork:
    """Return the attention of one layer. Raises ValueError if it is not MLA."""
    if not isinstance(spec.attention, Mla):
        raise ValueError("grouped-query attention is described for counting; plans are made for latent attention")
    return AttentionWork(
        spec=spec,
        mla=spec.attention,
        recipe=recipe,
        tp=layout.tp,
        tokens=tokens,
        context=context,
        sequences=sequences,
        is_training=is_training,
    )


def expanded_forward(work: AttentionWork) -> list[Op]:
    """Return the forward pass in training and for prompts."""
    out = _out(work)
    ops = [*_down_forward(work), *_gather(work, "forward", _down(work).n_out)]
    for up in _ups(work):
        ops += [*up.cast_input(work.is_training), *_forward(work, up)]
    ops += [_head_layout(work, "forward"), _core(work, "forward")]
    ops += [*out.cast_input(work.is_training), *_forward(work, out), *_scatter(work, "forward", out.n_out)]
    return ops


def absorbed_forward(work: AttentionWork) -> list[Op]:
    """Return the forward pass in decoding, with `context` cached tokens per sequence, new ones included."""
    mla, heads, out = work.mla, work.heads, _out(work)
    rank, nope, value = mla.kv_lora_rank, mla.qk_nope_head_dim, mla.v_head_dim
    ops = [*_down_forward(work), *_gather(work, "forward", _down(work).n_out)]
    query = _query(work)
    if query is not None:
        ops += [*query.cast_input(False), query.forward()]
    rotated = 2 * heads * mla.qk_rope_head_dim * BF16  # copied into the absorbed query
    ops += [
        _headwise("absorb key into query", heads, work.tokens, rank, nope),
        Elementwise(name="rotate query", pass_="forward", bytes=work.tokens * rotated, part=PART),
        Attention(
            name="attention",
            pass_="forward",
            tokens=work.tokens,
            context=work.context,
            heads=heads,
            qk_dim=mla.cache_dim,
            v_dim=rank,
            causal=work.tokens > work.sequences,
            absorbed=True,
            sequences=work.sequences,
        ),
        _headwise("value of mixed latent", heads, work.tokens, value, rank),
    ]
    return ops + [*out.cast_input(False), out.forward(), *_scatter(work, "forward", out.n_out)]


def expanded_backward(work: AttentionWork) -> list[Op]:
    """Return the backward pass, from the gradient of o_proj's output to those of the layer's input and weights."""
    out, down, ups = _out(work), _down(work), _ups(work)
    ops: list[Op] = [*_gather(work, "dgrad", out.n_out), *out.cast_grad(), *out.cast_weight("dgrad"), out.dgrad()]
    ops += [*out.cast_for_wgrad(), out.wgrad(), *_remade_latents(work)]
    for up in ups:
        ops += [*up.cast_weight("dgrad", orders=2), up.forward(recomputed=True)]
    ops += [_head_layout(work, "dgrad", recomputed=True), *_output_back(work), *_around_core(work)]
    ops += [_core(work, "dgrad"), _head_layout(work, "dgrad")]
    for up in ups:
        ops += [*up.cast_grad(), up.dgrad(), *up.cast_for_wgrad(), up.wgrad()]
    ops += _scatter(work, "dgrad", down.n_out)
    ops += [_norm("latent norms' gradient", "dgrad", work.own_tokens, work.latent_dims, reads=2)]
    ops += [
        *down.cast_grad(),
        *down.cast_weight("dgrad"),
        down.dgrad(),
        *_remade_norm(work),
        *down.cast_for_wgrad(),
        down.wgrad(),
    ]
    # It reads the norm's input, the gradient of its result, and that of the residual, which is added.
    return ops + [_norm("attention norm's gradient", "dgrad", work.own_tokens, work.spec.hidden_size, reads=3)]


def _down_forward(work: AttentionWork) -> list[Op]:
    down, tokens = _down(work), work.own_tokens
    ops: list[Op] = [_norm("attention norm", "forward", tokens, work.spec.hidden_size)]
    ops += [*down.cast_input(work.is_training), *_forward(work, down)]
    ops += [_norm("latent norms", "forward", tokens, work.latent_dims)]
    rotated = 2 * work.mla.qk_rope_head_dim * BF16
    ops += [Elementwise(name="rotate key", pass_="forward", bytes=tokens * rotated, part=PART)]
    if not work.is_training:
        written = 2 * work.mla.cache_dim * BF16
        ops += [Elementwise(name="write cache", pass_="forward", bytes=tokens * written, part=PART)]
    return ops


def _down(work: AttentionWork) -> Linear:
    """Return q_a and kv_a, which read the same input and run as one product, 2112 wide in V3 [DeepGEMM]."""
    query = work.mla.q_lora_rank or work.mla.num_attention_heads * work.mla.qk_head_dim
    return Linear(
        name="q_a and kv_a" if work.mla.q_lora_rank else "q_proj and kv_a",
        part=PART,
        n_in=work.spec.hidden_size,
        n_out=query + work.mla.cache_dim,
        rows=work.own_tokens,
        precision=site_precision(work.recipe, "attention_down"),
    )


def _query(work: AttentionWork) -> Linear | None:
    if work.mla.q_lora_rank is None:
        return None
    return Linear(
        name="q_b",
        part=PART,
        n_in=work.mla.q_lora_rank,
        n_out=work.heads * work.mla.qk_head_dim,
        rows=work.tokens,
        precision=site_precision(work.recipe, "attention_up"),
    )


def _ups(work: AttentionWork) -> list[Linear]:
    query = _query(work)
    keys = Linear(
        name="kv_b",
        part=PART,
        n_in=work.mla.kv_lora_rank,
        n_out=work.heads * (work.mla.qk_nope_head_dim + work.mla.v_head_dim),
        rows=work.key_tokens,
        precision=site_precision(work.recipe, "attention_up"),
    )
    return [keys] if query is None else [query, keys]


def _out(work: AttentionWork) -> Linear:
    return Linear(
        name="o_proj",
        part=PART,
        n_in=work.heads * work.mla.v_head_dim,
        n_out=work.spec.hidden_size,
        rows=work.tokens,
        precision=site_precision(work.recipe, "attention_out"),
    )


def _forward(work: AttentionWork, linear: Linear) -> list[Op]:
    return [*(linear.cast_weight("forward") if work.is_training else ()), linear.forward()]


def _core(work: AttentionWork, pass_: Pass) -> Attention:
    return Attention(
        name="attention",
        pass_=pass_,
        tokens=work.tokens,
        context=work.context,
        heads=work.heads,
        qk_dim=work.mla.qk_head_dim,
        v_dim=work.mla.v_head_dim,
        sequences=work.sequences,
    )


def _headwise(name: str, heads: int, tokens: float, n: int, k: int) -> Gemm:
    """Return a product per head with its part of kv_b, in BF16 [day 6: core attention in BF16]."""
    return Gemm(name=name, pass_="forward", m=tokens, n=n, k=k, groups=heads, part=PART)


def _head_layout(work: AttentionWork, pass_: Pass, recomputed: bool = False) -> Elementwise:
    """Return the work of rotating queries in place, and of writing whole keys from kv_b's output and the rotated key.
    The gradient goes the other way. Values are used where kv_b wrote them."""
    mla, heads = work.mla, work.heads
    queries = work.tokens * heads * 2 * mla.qk_rope_head_dim
    keys = work.key_tokens * (heads * (mla.qk_nope_head_dim + mla.qk_head_dim) + mla.qk_rope_head_dim)
    kind: ElementwiseKind = "heads" if pass_ == "forward" or recomputed else "heads gradient"
    name = "head layout" if kind == "heads" else "head layout's gradient"
    return Elementwise(
        name=name, pass_=pass_, bytes=BF16 * (queries + keys), part=PART, recomputed=recomputed, kind=kind
    )


def _around_core(work: AttentionWork) -> list[Op]:
    """Return the two passes around FlashAttention's backward kernel: before it the dot product of every output with its
    gradient, after it the conversion of the queries' gradient from FP32 to BF16 [FlashAttention]."""
    per_head = 2 * work.mla.v_head_dim * BF16 + FP32 + (FP32 + BF16) * work.mla.qk_head_dim
    bytes_ = work.tokens * work.heads * per_head
    return [Elementwise(name="around attention's gradient", pass_="dgrad", bytes=bytes_, part=PART)]


def _output_back(work: AttentionWork) -> list[Op]:
    """Return the conversion of attention's output, kept as o_proj's input, for its backward pass [V3 §3.3.3]."""
    precision = site_precision(work.recipe, "attention_out")
    if precision is None:
        return []
    width = work.heads * work.mla.v_head_dim
    per_token = coded_bytes(width, precision.saved_input or precision.input) + BF16 * width
    return [
        Elementwise(
            name="attention output back to BF16",
            pass_="dgrad",
            bytes=work.tokens * per_token,
            part=PART,
            kind="quantise",
        )
    ]


def _remade_latents(work: AttentionWork) -> list[Op]:
    if site_precision(work.recipe, "attention_up") is not None:
        return []
    return [_norm("latent norms", "dgrad", work.own_tokens, work.latent_dims, recomputed=True)]


def _remade_norm(work: AttentionWork) -> list[Op]:
    if site_precision(work.recipe, "attention_down") is not None:
        return []
    return [_norm("attention norm", "dgrad", work.own_tokens, work.spec.hidden_size, recomputed=True)]


def _norm(name: str, pass_: Pass, tokens: float, width: int, reads: int = 1, recomputed: bool = False) -> Elementwise:
    bytes_ = tokens * width * BF16 * (reads + 1)
    kind: ElementwiseKind = "norm" if pass_ == "forward" or recomputed else "norm gradient"
    return Elementwise(name=name, pass_=pass_, bytes=bytes_, part=PART, recomputed=recomputed, kind=kind)


def _gather(work: AttentionWork, pass_: Pass, width: int) -> list[Op]:
    """Return the gathering of all tensor-parallel ranks' tokens on each of them; nothing for one rank."""
    if work.tp == 1:
        return []
    bytes_ = work.tokens * width * BF16
    return [Collective(name="all_gather", pass_=pass_, bytes=bytes_, ranks=work.tp, part=PART)]


def _scatter(work: AttentionWork, pass_: Pass, width: int) -> list[Op]:
    """Return the sum over the tensor-parallel ranks, of which each gets its share of the tokens."""
    if work.tp == 1:
        return []
    bytes_ = work.tokens * width * BF16
    return [Collective(name="reduce_scatter", pass_=pass_, bytes=bytes_, ranks=work.tp, part=PART)]
