"""The memory-bound operations that `dovetail calibrate` times.

They are a copy larger than all caches, and those that a training step of the first listed model runs. The functions
are those that the model calls, and the bytes are those of the plan's own operations.

On a CPU these operations are often not bound by memory: exponentials, roundings to a narrow format and sorts take
longer. So each kind has its own share of the bandwidth.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from dovetail.calibrate.work import CPU_SHAPES, GPU_SHAPES, SEQUENCE, Operation, Work, in_turn, random_rows
from dovetail.catalog.precision import load_recipe
from dovetail.catalog.presets import load_model
from dovetail.cost.ops.layer import head_ops, layer_ops
from dovetail.cost.ops.ops import BF16, Elementwise, Op
from dovetail.cost.ops.step import adam_bytes
from dovetail.model.attention.heads import split_heads
from dovetail.model.block import Block
from dovetail.model.experts.gate import Routing, route
from dovetail.model.experts.moe import LocalDispatcher
from dovetail.model.experts.swiglu import swiglu, swiglu_backward
from dovetail.model.norm import RmsNorm
from dovetail.numerics import capability
from dovetail.numerics.operands.operands import quantize_and_keep, quantize_blocks, quantize_columns, retile
from dovetail.spec.layout import Layout
from dovetail.spec.measurements import ElementwiseKind
from dovetail.spec.model import Mla, ModelSpec, Moe
from dovetail.spec.precision import BLOCK, COLUMN, ROW
from dovetail.train.step.loss_numba import losses_and_gradient
from dovetail.train.step.optim import AdamW, AdamWConfig

COPIED_BYTES = {"cpu": 256 << 20, "cuda": 2 << 30}
QUANTISED = "deepseek-v3"  # the recipe whose roundings are measured


def memory_work(device: torch.device) -> list[Work]:
    """Return all memory-bound operations, the copy first."""
    model, tokens, _ = (GPU_SHAPES if device.type == "cuda" else CPU_SHAPES)[0]
    spec = load_model(model)

    def copy() -> Operation:
        source = torch.ones(COPIED_BYTES[device.type] // 8, device=device)
        target = torch.empty_like(source)
        return lambda: target.copy_(source)

    listed = {op.name: op for op in _listed(spec, tokens) if isinstance(op, Elementwise)}
    works = [Work(name="copy", kind="copy", prepare=copy, bytes=COPIED_BYTES[device.type])]
    for name, weight, prepare in (
        *_norms_and_swiglu(spec, tokens, device),
        *_around_experts(spec, tokens, device),
        *_around_attention(spec, tokens, device),
        *_roundings(spec, tokens, device),
    ):
        works.append(_work(name, weight, listed[name].bytes, listed[name].kind, prepare))
    logits = listed["loss"].bytes + listed["loss's gradient"].bytes
    weights, step, gradient_norm = _step(spec, device)
    return [
        *works,
        _work("loss", 2, logits, "loss", _loss(spec, tokens, device)),
        _work("AdamW", 1, adam_bytes(BF16) * weights, "optimizer", step),
        _work("gradient norm", 1, BF16 * weights, "square sum", gradient_norm),
    ]


Prepared = tuple[str, int, Callable[[], Operation]]  # its name in a plan, its weight, and what prepares it


def _listed(spec: ModelSpec, tokens: int) -> tuple[Op, ...]:
    layer = layer_ops(
        spec,
        spec.num_hidden_layers - 1,
        Layout(),
        load_recipe(QUANTISED),
        tokens,
        "training",
        SEQUENCE,
        max(1, tokens // SEQUENCE),
    )
    return (*layer, *head_ops(spec, Layout(), tokens, "training"))


def _work(name: str, weight: int, num_bytes: float, kind: ElementwiseKind, prepare: Callable[[], Operation]) -> Work:
    return Work(
        name=name,
        kind="elementwise",
        prepare=lambda: in_turn(prepare, num_bytes),
        bytes=num_bytes,
        weight=weight,
        elementwise=kind,
    )


def _gradient_of(outputs: tuple[Tensor, ...], inputs: tuple[Tensor, ...]) -> Operation:
    grads = tuple(torch.ones_like(each) for each in outputs)
    return lambda: torch.autograd.grad(outputs, inputs, grads, retain_graph=True)


def _norms_and_swiglu(spec: ModelSpec, tokens: int, device: torch.device) -> list[Prepared]:
    dim = spec.hidden_size
    moe = _moe(spec)
    rows, width = tokens * moe.num_experts_per_tok, moe.moe_intermediate_size

    def random(*shape: int) -> Tensor:
        return random_rows(shape, torch.bfloat16, device)

    def norm() -> Operation:
        layer, x = RmsNorm(dim, 1e-6).to(device), random(tokens, dim)
        return lambda: layer(x)

    def norm_gradient() -> Operation:
        """The gradient of the norm, to which the residual's is added."""
        layer, x, residual = RmsNorm(dim, 1e-6).to(device), random(tokens, dim).requires_grad_(), random(tokens, dim)
        gradient = _gradient_of((layer(x),), (x, layer.weight))
        return lambda: gradient()[0] + residual

    def forward() -> Operation:
        gate_up = random(rows, 2 * width)
        return lambda: swiglu(gate_up)

    def backward() -> Operation:
        gate_up, grad = random(rows, 2 * width), random(rows, width)
        return lambda: swiglu_backward(grad, gate_up)

    return [
        ("attention norm", 30, norm),
        ("attention norm's gradient", 24, norm_gradient),
        ("experts SwiGLU", 6, forward),
        ("experts SwiGLU's gradient", 6, backward),
    ]


def _around_experts(spec: ModelSpec, tokens: int, device: torch.device) -> list[Prepared]:
    dim, moe = spec.hidden_size, _moe(spec)
    dispatcher = LocalDispatcher()

    def logits() -> Tensor:
        return torch.randn(tokens, moe.n_routed_experts, device=device).requires_grad_()

    def routing() -> Routing:
        return route(logits().detach(), None, moe)

    def choice() -> Operation:
        scores, bias = logits(), torch.zeros(moe.n_routed_experts, device=device)
        return lambda: route(scores, bias, moe)

    def choice_gradient() -> Operation:
        scores = logits()
        return _gradient_of((route(scores, None, moe).weights,), (scores,))

    def expand() -> Operation:
        x, choices = random_rows((tokens, dim), torch.bfloat16, device), routing()
        return lambda: dispatcher.dispatch(x, choices)

    def reduce() -> Operation:
        choices = routing()
        dispatched = dispatcher.dispatch(random_rows((tokens, dim), torch.bfloat16, device), choices)
        return lambda: dispatcher.combine(dispatched.rows, dispatched, choices)

    return [
        ("choose experts", 4, choice),
        ("choice's gradient", 4, choice_gradient),
        ("expand to experts", 8, expand),
        ("reduce from experts", 8, reduce),
    ]


def _around_attention(spec: ModelSpec, tokens: int, device: torch.device) -> list[Prepared]:
    mla = spec.attention
    assert isinstance(mla, Mla)
    sequences, heads, rope = max(1, tokens // SEQUENCE), mla.num_attention_heads, mla.qk_rope_head_dim

    def operands(*widths: int) -> list[Tensor]:
        shapes = [(sequences, tokens // sequences, heads, width) for width in widths]
        return [random_rows(shape, torch.bfloat16, device).requires_grad_() for shape in shapes]

    def parts() -> tuple[Tensor, ...]:
        q, kv = operands(mla.qk_head_dim, mla.qk_nope_head_dim + mla.v_head_dim)
        length = tokens // sequences
        key = random_rows((sequences, length, rope), torch.bfloat16, device).requires_grad_()
        angles = torch.rand(sequences, length, rope // 2, device=device)
        return q, kv, key, angles.cos(), angles.sin()

    def forward() -> Operation:
        given = parts()
        return lambda: split_heads(*given)

    def backward() -> Operation:
        given = parts()
        return _gradient_of(split_heads(*given), given[:3])

    return [("head layout", 5, forward), ("head layout's gradient", 5, backward)]


def _roundings(spec: ModelSpec, tokens: int, device: torch.device) -> list[Prepared]:
    """Return the roundings of an input, of experts' weights, and of both operands of their weight gradient."""
    dim, moe = spec.hidden_size, _moe(spec)
    experts, rows = moe.n_routed_experts, tokens * moe.num_experts_per_tok

    def random(*shape: int) -> Tensor:
        return random_rows(shape, torch.bfloat16, device)

    def quantise() -> Operation:
        x = random(tokens, dim)
        return lambda: quantize_and_keep(x, ROW)

    def quantise_weight() -> Operation:
        weight = random(experts, 2 * moe.moe_intermediate_size, dim)
        return lambda: quantize_blocks(weight, BLOCK)

    offsets = range(0, rows + 1, rows // experts)

    def requantise_input() -> Operation:
        _, kept = quantize_and_keep(random(rows, dim), ROW)
        return lambda: retile(kept, offsets, COLUMN)

    def requantise_gradient() -> Operation:
        grad = random(rows, 2 * moe.moe_intermediate_size)
        return lambda: quantize_columns(grad, offsets, COLUMN)

    return [
        ("quantise input of q_a and kv_a", 1, quantise),
        ("quantise weight of experts gate and up", 1, quantise_weight),
        ("requantise input of experts gate and up", 1, requantise_input),
        ("requantise gradient of experts gate and up", 1, requantise_gradient),
    ]


def _loss(spec: ModelSpec, tokens: int, device: torch.device) -> Callable[[], Operation]:
    def loss() -> Operation:
        logits = random_rows((tokens, spec.vocab_size), torch.bfloat16, device)
        targets = torch.zeros(tokens, dtype=torch.int64, device=device)
        if capability.on_cpu(logits):
            return lambda: losses_and_gradient(logits, targets, 0.0)
        return lambda: F.cross_entropy(logits, targets, reduction="none")

    return loss


def _step(spec: ModelSpec, device: torch.device) -> tuple[int, Callable[[], Operation], Callable[[], Operation]]:
    """Return a number of weights, and AdamW and the sum of squares over them, tensor by tensor.

    The weights are those of so many layers that no cache holds them, since a step runs once, after everything else.
    """
    layer = spec.num_hidden_layers - 1
    block = sum(each.numel() for each in Block(spec, layer, torch.bfloat16).parameters())
    count = math.ceil(COPIED_BYTES[device.type] / 4 / adam_bytes(BF16) / block)

    def made() -> tuple[AdamW, dict[str, Tensor]]:
        blocks = [Block(spec, layer, torch.bfloat16).to(device) for _ in range(count)]
        weights = {f"{index} {name}": each for index, it in enumerate(blocks) for name, each in it.named_parameters()}
        for each in weights.values():
            torch.nn.init.normal_(each, std=0.02)
        gradients = {name: 1e-3 * torch.randn_like(each.detach()) for name, each in weights.items()}
        return AdamW(weights.items(), AdamWConfig()), gradients

    def step() -> Operation:
        optimizer, gradients = made()
        return lambda: optimizer.step(gradients, 1e-4, 1.0)

    def gradient_norm() -> Operation:
        optimizer, gradients = made()
        return lambda: optimizer.grad_norm(gradients)

    return count * block, step, gradient_norm


def _moe(spec: ModelSpec) -> Moe:
    assert spec.moe is not None
    return spec.moe
