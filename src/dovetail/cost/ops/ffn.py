"""The operations of a layer's feed-forward on one rank: dense, or gate and experts.

Experts are taken to be balanced: a rank computes tokens x K rows in its share of the experts. With few tokens some
experts get none, and their weights stay where they are. A rank's products read the weights of as many as are expected
to have rows (`touched_experts`), with the tokens of all ranks that send to it:

    touched = experts of the rank x (1 - (1 - K / experts)^tokens)

Rows arrive in FP8, once
per rank; they are ordered by expert, and summed to one row per token before they go back in BF16 [DeepEP; TileKernels:
expand_to_fused_with_sf, reduce_fused]. The gradient of the outputs is dispatched in FP8 too [V3 §3.3.3]. The gate's
weights are applied in the SwiGLU, whose backward pass computes their gradients, so that no expert's output is kept
[TileKernels: swiglu_backward_and_per_token_cast].

In decoding, rows arrive where the masked product reads them, and they are summed on the rank that the token came from
[DeepEP low latency].
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import partial
from typing import Literal

from dovetail.cost.ops.ops import BF16, FP32, Elementwise, Exchange, Op, Pass
from dovetail.cost.ops.product import Linear, coded_bytes, site_precision
from dovetail.spec.layout import Layout
from dovetail.spec.measurements import ElementwiseKind
from dovetail.spec.model import ModelSpec, Moe
from dovetail.spec.precision import Quantization, Recipe, Site

HEADER_BYTES = 16  # before each low-latency message [DeepEP]
CHOICE_BYTES = 8  # an expert's id and weight, sent with each choice by the normal kernels [DeepEP]; widths unverified

Phase = Literal["training", "prefill", "decode"]


@dataclass(frozen=True, slots=True, kw_only=True)
class FfnWork:
    """One layer's feed-forward for `tokens` tokens of this rank."""

    spec: ModelSpec
    layout: Layout
    recipe: Recipe
    tokens: float
    phase: Phase

    @property
    def is_training(self) -> bool:
        return self.phase == "training"

    def linears(self, part: str, width: int, up_site: Site, down_site: Site) -> tuple[Linear, Linear]:
        """Return both products of a SwiGLU on this rank's tokens: gate and up as one, and down."""
        hidden = self.spec.hidden_size
        up, down = site_precision(self.recipe, up_site), site_precision(self.recipe, down_site)
        return (
            Linear(name=f"{part} gate and up", part=part, n_in=hidden, n_out=2 * width, rows=self.tokens, precision=up),
            Linear(name=f"{part} down", part=part, n_in=width, n_out=hidden, rows=self.tokens, precision=down),
        )

    def experts(self, moe: Moe) -> tuple[Linear, Linear]:
        """Return the same products of the routed experts on this rank."""
        hidden, width = self.spec.hidden_size, moe.moe_intermediate_size
        groups = self.layout.experts_per_rank(self.spec)
        rows = self.tokens * moe.num_experts_per_tok / groups
        grouped = partial(
            Linear,
            part="experts",
            rows=rows,
            groups=groups,
            layout="masked" if self.phase == "decode" else "contiguous",
            filled=touched_experts(self.spec, self.layout, self.tokens) / groups if rows else 1.0,
        )
        up, down = site_precision(self.recipe, "expert_up"), site_precision(self.recipe, "expert_down")
        return (
            grouped(name="experts gate and up", n_in=hidden, n_out=2 * width, precision=up),
            grouped(name="experts down", n_in=width, n_out=hidden, precision=down),
        )


def touched_experts(spec: ModelSpec, layout: Layout, tokens: float) -> float:
    """Return how many of a rank's experts are expected to have rows when each rank has `tokens`.

    Every token chooses alike and alone. A gate that keeps to a few groups of experts changes which are chosen together,
    but not how often each is, so that the expectation is the same. Tokens that resemble each other, and experts of
    uneven load, touch fewer. It is a mean over ranks: the fullest rank of a step has more. Redundant slots count as
    experts, each with its part of the rows.
    """
    assert spec.moe is not None
    here = layout.experts_per_rank(spec)
    missed: float = (1 - spec.moe.num_experts_per_tok / (here * layout.ep)) ** (tokens * layout.ep)
    return here * (1 - missed)


def dense_forward(work: FfnWork) -> list[Op]:
    up, down = work.linears("mlp", work.spec.intermediate_size, "mlp_up", "mlp_down")
    return [
        _add_and_norm(work),
        *up.cast_input(work.is_training),
        *swiglu_forward(work, up, down),
        _add(work, "add mlp", addends=2),
    ]


def dense_backward(work: FfnWork) -> list[Op]:
    up, down = work.linears("mlp", work.spec.intermediate_size, "mlp_up", "mlp_down")
    return [
        *down.cast_grad(),
        *_swiglu_backward(work, up, down),
        *_remade_norm(work, up.precision is None),
        _norm_backward(work, gradients=1),
    ]


def experts_forward(work: FfnWork, moe: Moe) -> list[Op]:
    up, down = work.experts(moe)
    ops: list[Op] = [_add_and_norm(work), *_gate_forward(work, moe), *_cast_to_send(work, "forward", up)]
    sent = coded_bytes(work.spec.hidden_size, up.precision.input if up.precision else None)
    ids = HEADER_BYTES if work.phase == "decode" else CHOICE_BYTES * moe.num_experts_per_tok
    ops += [_exchange(work, moe, "dispatch", "forward", sent + ids)]
    ops += [*_expand(work, moe, "forward", sent), *swiglu_forward(work, up, down), *_reduce(work, moe, "forward")]
    ops += [_exchange(work, moe, "combine", "forward", returned_bytes(work.spec.hidden_size, work.recipe))]
    if moe.n_shared_experts:
        shared_up, shared_down = _shared_linears(work, moe)
        # If both are rounded alike, shared experts take the values that were quantised for sending.
        if shared_up.precision is None or up.precision is None or shared_up.precision.input != up.precision.input:
            ops += shared_up.cast_input(work.is_training)
        ops += swiglu_forward(work, shared_up, shared_down)
    if work.phase == "decode":
        received = moe.num_experts_per_tok * returned_bytes(work.spec.hidden_size, work.recipe)
        ops += [_elementwise("sum of expert outputs", "forward", work.tokens * (received + _row(work)), "experts")]
    return [*ops, _add(work, "add experts", addends=3 if moe.n_shared_experts else 2)]


def experts_backward(work: FfnWork, moe: Moe) -> list[Op]:
    up, down = work.experts(moe)
    sent = coded_bytes(work.spec.hidden_size, down.precision.grad if down.precision else None)
    ops: list[Op] = [*_cast_to_send(work, "dgrad", down), _exchange(work, moe, "dispatch", "dgrad", sent)]
    ops += _expand(work, moe, "dgrad", sent)
    ops += _swiglu_backward(work, up, down, grad_from=sent / work.spec.hidden_size)
    ops += _reduce(work, moe, "dgrad")
    weights = FP32 * moe.num_experts_per_tok  # the weights' gradients go back with the rows
    ops += [_exchange(work, moe, "combine", "dgrad", _row(work) + weights)]
    gradients = 2  # one from the experts and one from the gate
    if moe.n_shared_experts:
        shared_up, shared_down = _shared_linears(work, moe)
        ops += [*shared_down.cast_grad(), *_swiglu_backward(work, shared_up, shared_down)]
        gradients += 1
    return [*ops, *_remade_norm(work, True), *_gate_backward(work, moe), _norm_backward(work, gradients)]


def swiglu_forward(work: FfnWork, up: Linear, down: Linear) -> list[Op]:
    """Return both products and what is between them; the input of `up` is ready. SwiGLU writes the operand of `down`.
    Its own input is kept for the backward pass, in fewer bits if the recipe says so."""
    width = down.n_in
    ops: list[Op] = [*(up.cast_weight("forward") if work.is_training else ()), up.forward()]
    if work.is_training and up.precision is not None and work.recipe.saved_swiglu is not None:
        saved = 2 * BF16 * width + coded_bytes(2 * width, work.recipe.saved_swiglu)
        ops += [_elementwise(f"keep {up.part} SwiGLU input", "forward", up.all_rows * saved, up.part, "quantise")]
    through = 2 * BF16 * width + coded_bytes(width, down.precision.input if down.precision else None)
    ops += [_elementwise(f"{up.part} SwiGLU", "forward", up.all_rows * through, up.part, "swiglu")]
    return [*ops, *(down.cast_weight("forward") if work.is_training else ()), down.forward()]


def returned_bytes(hidden: int, recipe: Recipe) -> float:
    """Return the bytes of one expert output when it is sent: in BF16, or in the recipe's `expert_output`, which is
    logfmt-N with two BF16 limits for every 128 values, or eXmY with an FP32 scale [ISCA §3.2, DeepEP]."""
    if recipe.expert_output is None:
        return BF16 * hidden
    logfmt = re.fullmatch(r"logfmt-([0-9]+)", recipe.expert_output)
    if logfmt:
        return hidden * int(logfmt[1]) / 8 + 2 * BF16 * -(-hidden // 128)
    return coded_bytes(hidden, Quantization(format=recipe.expert_output))


def _swiglu_backward(work: FfnWork, up: Linear, down: Linear, grad_from: float = BF16) -> list[Op]:
    """Return the backward pass, which computes SwiGLU's output again; the gradient of the result is ready for dgrad.
    SwiGLU's kernel reads its kept input and its output's gradient. It writes the output and the input's gradient in
    BF16, and the latter quantised for `up` [TileKernels]. `grad_from` are bytes per value of the kept gradient."""
    width = down.n_in
    kept = coded_bytes(2 * width, work.recipe.saved_swiglu if up.precision else None)
    rounded = coded_bytes(2 * width, up.precision.grad) if up.precision else 0
    through = up.all_rows * (kept + 4 * BF16 * width + rounded)
    return [
        *down.cast_weight("dgrad"),
        down.dgrad(),
        _elementwise(f"{up.part} SwiGLU's gradient", "dgrad", through, up.part, "swiglu gradient"),
        *up.cast_weight("dgrad"),
        up.dgrad(),
        *down.cast_for_wgrad(input_from=BF16, grad_from=grad_from),
        down.wgrad(),
        *up.cast_for_wgrad(),
        up.wgrad(),
    ]


def _shared_linears(work: FfnWork, moe: Moe) -> tuple[Linear, Linear]:
    return work.linears("shared", moe.n_shared_experts * moe.moe_intermediate_size, "mlp_up", "mlp_down")


def _gate(work: FfnWork, moe: Moe) -> Linear:
    """Return the gate's product, which is in FP32 [ISCA Fig. 1]."""
    hidden, experts = work.spec.hidden_size, moe.n_routed_experts
    return Linear(name="gate", part="gate", n_in=hidden, n_out=experts, rows=work.tokens, plain="fp32")


def _gate_forward(work: FfnWork, moe: Moe) -> list[Op]:
    """Return the gate's product, and the choice: scores from logits, and the ids and weights of experts."""
    per_token = 2 * FP32 * moe.n_routed_experts + CHOICE_BYTES * moe.num_experts_per_tok
    return [
        _gate(work, moe).forward(),
        _elementwise("choose experts", "forward", work.tokens * per_token, "gate", "choice"),
    ]


def _gate_backward(work: FfnWork, moe: Moe) -> list[Op]:
    per_token = 2 * FP32 * moe.n_routed_experts + CHOICE_BYTES * moe.num_experts_per_tok
    gate = _gate(work, moe)
    through = _elementwise("choice's gradient", "dgrad", work.tokens * per_token, "gate", "choice gradient")
    return [through, gate.dgrad(), gate.wgrad()]


def _cast_to_send(work: FfnWork, pass_: Pass, taker: Linear) -> list[Op]:
    """Return the quantisation of each token's vector for sending, which the product then takes; once per token."""
    if taker.precision is None:
        return []
    kind = taker.precision.input if pass_ == "forward" else taker.precision.grad
    bytes_ = work.tokens * (_row(work) + coded_bytes(work.spec.hidden_size, kind))
    return [_elementwise("quantise to dispatch", pass_, bytes_, "experts", "quantise")]


def _exchange(
    work: FfnWork, moe: Moe, name: Literal["dispatch", "combine"], pass_: Pass, bytes_per_copy: float
) -> Exchange:
    return Exchange(
        name=name,
        pass_=pass_,
        tokens=work.tokens,
        bytes_per_copy=bytes_per_copy,
        choices=moe.num_experts_per_tok,
        experts=moe.n_routed_experts,
        groups=moe.n_group,
        kept_groups=moe.topk_group,
        ranks=work.layout.ep,
    )


def _expand(work: FfnWork, moe: Moe, pass_: Pass, row_bytes: float) -> list[Op]:
    """Return the copying of received vectors to one row per choice, in the order of experts."""
    if work.phase == "decode":
        return []
    bytes_ = work.tokens * moe.num_experts_per_tok * 2 * row_bytes
    return [_elementwise("expand to experts", pass_, bytes_, "experts", "expand")]


def _reduce(work: FfnWork, moe: Moe, pass_: Pass) -> list[Op]:
    """Return the summing of a token's rows on this rank to one, in BF16."""
    if work.phase == "decode":
        return []
    bytes_ = work.tokens * moe.num_experts_per_tok * 2 * _row(work)
    return [_elementwise("reduce from experts", pass_, bytes_, "experts", "reduce")]


def _add_and_norm(work: FfnWork) -> Elementwise:
    """Return the sum of residual and attention's output, and its norm: two vectors are read, two written."""
    return _elementwise("add attention, ffn norm", "forward", work.tokens * 4 * _row(work), "attention", "norm")


def _add(work: FfnWork, name: str, addends: int) -> Elementwise:
    return _elementwise(name, "forward", work.tokens * (addends + 1) * _row(work), "mlp")


def _remade_norm(work: FfnWork, is_needed: bool) -> list[Op]:
    """Return the norm computed again, for the weight gradients of what takes it in BF16, as the gate [V3 §3.2.3]."""
    if not is_needed:
        return []
    bytes_ = work.tokens * 2 * _row(work)
    return [Elementwise(name="ffn norm", pass_="dgrad", bytes=bytes_, part="attention", recomputed=True, kind="norm")]


def _norm_backward(work: FfnWork, gradients: int) -> Elementwise:
    """Return the norm's gradient: it reads the input, the residual's gradient and `gradients` more, and writes one."""
    return _elementwise(
        "ffn norm's gradient", "dgrad", work.tokens * (gradients + 3) * _row(work), "attention", "norm gradient"
    )


def _row(work: FfnWork) -> float:
    return BF16 * work.spec.hidden_size


def _elementwise(name: str, pass_: Pass, bytes_: float, part: str, kind: ElementwiseKind = "other") -> Elementwise:
    return Elementwise(name=name, pass_=pass_, bytes=bytes_, part=part, kind=kind)
