"""The operations of a layer, of the model's ends and of an MTP module on one rank, in order.

Tokens are those of one micro-batch (training), one batch of prompts (prefill) or one step (decode) on one data-parallel
rank. The lists hold each operation once, so a stage's time is the sum over its layers. Training lists hold the forward
pass, then the backward pass: "dgrad" (V3's 1B, recomputation included) and "wgrad" (1W).

Left out: dropped or padded rows (experts are balanced), masks, random numbers, the update of the gate's bias.
"""

from __future__ import annotations

from dovetail.cost.ops.attention import absorbed_forward, attention_work, expanded_backward, expanded_forward
from dovetail.cost.ops.ffn import (
    FfnWork,
    Phase,
    dense_backward,
    dense_forward,
    experts_backward,
    experts_forward,
)
from dovetail.cost.ops.ops import BF16, FP32, Elementwise, Op, Pass
from dovetail.cost.ops.product import Linear, site_precision
from dovetail.spec.layout import Layout
from dovetail.spec.measurements import ElementwiseKind
from dovetail.spec.model import ModelSpec
from dovetail.spec.precision import Recipe


def layer_ops(
    spec: ModelSpec,
    layer: int,
    layout: Layout,
    recipe: Recipe,
    tokens: float,
    phase: Phase,
    context: float,
    sequences: float = 1,
) -> tuple[Op, ...]:
    """Return the operations of layer `layer` on `tokens` tokens of `sequences` sequences with `context` keys each.

    The keys include the sequence's own tokens; in training they are its length. Numbers after the last layer mean the
    blocks of MTP modules. Raises ValueError if attention is not MLA.
    """
    is_training = phase == "training"
    attention = attention_work(spec, layout, recipe, tokens, context, sequences, is_training)
    ffn = FfnWork(spec=spec, layout=layout, recipe=recipe, tokens=tokens / layout.tp, phase=phase)
    moe = spec.moe if spec.is_moe_layer(layer) else None
    ops = absorbed_forward(attention) if phase == "decode" else expanded_forward(attention)
    ops += dense_forward(ffn) if moe is None else experts_forward(ffn, moe)
    if is_training:
        ops += dense_backward(ffn) if moe is None else experts_backward(ffn, moe)
        ops += expanded_backward(attention)
    return tuple(ops)


def embedding_ops(spec: ModelSpec, layout: Layout, tokens: float, phase: Phase) -> tuple[Op, ...]:
    """Return the look-up, and in training the addition of its gradient to one in FP32."""
    own, row = tokens / layout.tp, BF16 * spec.hidden_size
    ops: list[Op] = [_pass("look up embeddings", "forward", own * 2 * row, "embedding")]
    if phase == "training":
        ops += [_pass("embeddings' gradient", "wgrad", own * (row + 2 * FP32 * spec.hidden_size), "embedding")]
    return tuple(ops)


def head_ops(spec: ModelSpec, layout: Layout, tokens: float, phase: Phase) -> tuple[Op, ...]:
    """Return final norm, head and, in training, the loss.

    The loss is one kernel that reads the logits twice and puts their gradient in their place. In serving `tokens` are
    those that are sampled from, and choosing one reads the logits once.
    """
    own, row = tokens / layout.tp, BF16 * spec.hidden_size
    logits = own * BF16 * spec.vocab_size
    head = Linear(name="head", part="head", n_in=spec.hidden_size, n_out=spec.vocab_size, rows=own)
    ops: list[Op] = [_norms("final norm", "forward", own * 2 * row), head.forward()]
    if phase != "training":
        return (*ops, _pass("sample", "forward", logits))
    ops += [
        _pass("loss", "forward", logits, kind="loss"),
        _pass("loss's gradient", "dgrad", 2 * logits, kind="loss"),
        head.dgrad(),
    ]
    return (*ops, head.wgrad(), _norms("final norm's gradient", "dgrad", own * 3 * row))


def mtp_ops(
    spec: ModelSpec,
    layout: Layout,
    recipe: Recipe,
    tokens: float,
    phase: Phase,
    context: float,
    sequences: float = 1,
) -> tuple[Op, ...]:
    """Return one MTP module: embedding, both norms, the projection of their results to the hidden size, a whole layer,
    and final norm and head once more [V3 §2.2]."""
    own, row = tokens / layout.tp, BF16 * spec.hidden_size
    join = Linear(
        name="eh_proj",
        part="mtp",
        n_in=2 * spec.hidden_size,
        n_out=spec.hidden_size,
        rows=own,
        precision=site_precision(recipe, "mtp_join"),
    )
    is_training = phase == "training"
    ops: list[Op] = [*embedding_ops(spec, layout, tokens, phase)]
    ops += [_norms("norms of embedding and hidden", "forward", own * 4 * row, "mtp")]
    ops += [*join.cast_input(is_training), *(join.cast_weight("forward") if is_training else ()), join.forward()]
    ops += layer_ops(spec, spec.num_hidden_layers, layout, recipe, tokens, phase, context, sequences)
    ops += head_ops(spec, layout, tokens, phase)
    if is_training:
        remade = (
            [] if join.precision else [_norms("norms of embedding and hidden", "dgrad", own * 4 * row, "mtp", True)]
        )
        ops += [
            *join.cast_grad(),
            *join.cast_weight("dgrad"),
            join.dgrad(),
            *remade,
            *join.cast_for_wgrad(),
            join.wgrad(),
        ]
        ops += [_norms("norms' gradient", "dgrad", own * 6 * row, "mtp")]
    return tuple(ops)


def _pass(name: str, pass_: Pass, bytes_: float, part: str = "head", kind: ElementwiseKind = "other") -> Elementwise:
    return Elementwise(name=name, pass_=pass_, bytes=bytes_, part=part, kind=kind)


def _norms(name: str, pass_: Pass, bytes_: float, part: str = "head", recomputed: bool = False) -> Elementwise:
    kind: ElementwiseKind = "norm" if pass_ == "forward" or recomputed else "norm gradient"
    return Elementwise(name=name, pass_=pass_, bytes=bytes_, part=part, recomputed=recomputed, kind=kind)
