"""The matrix products, attention and launches that `dovetail calibrate` times.

Each is one of the operations that a plan lists, and is run by the function that the model calls.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from dovetail.catalog.precision import load_recipe
from dovetail.catalog.presets import load_model
from dovetail.cost.ops.layer import head_ops, layer_ops
from dovetail.cost.ops.ops import Attention, Elementwise, Gemm, Op
from dovetail.model.attention.causal import causal_attention, masked_attention
from dovetail.model.attention.mla import Context
from dovetail.model.attention.rope import tables
from dovetail.model.block import Block
from dovetail.model.experts.moe import LocalDispatcher
from dovetail.model.norm import RmsNorm
from dovetail.numerics.operands.operands import quantize_blocks, quantize_columns, quantize_rows
from dovetail.numerics.products import grouped, scaled
from dovetail.spec.layout import Layout
from dovetail.spec.measurements import ElementwiseKind
from dovetail.spec.model import Mla
from dovetail.spec.precision import BLOCK, COLUMN, ROW

# The model, the tokens of a micro-batch and the recipe whose products are measured.
CPU_SHAPES = (
    ("quickstart", 1024, "bf16"),
    ("quickstart", 256, "bf16"),
    ("quickstart", 1024, "deepseek-v3"),
    ("20m", 1024, "bf16"),
)
GPU_SHAPES = (("1b", 8192, "bf16"), ("1b", 1024, "bf16"), ("deepseek-v3", 4096, "bf16"), ("20m", 1024, "bf16"))
LARGE = 2048  # side of the large square products in BF16 and FP32
SEQUENCE = 256  # tokens per sequence in training
CONTEXT, BATCH = 2048, 4  # tokens and sequences in the cache, for absorbed attention
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
# In a model other tensors are used between two runs of one operation. So an operation here takes its operands in turn
# from so many copies that a core's own caches do not hold them.
CYCLED_BYTES = 8 << 20
MOST_COPIES = 16
NARROW = 32  # channels of a layer that has next to no work

Operation = Callable[[], Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """One operation to time: `prepare` makes its tensors and returns the function that is run."""

    name: str
    kind: Literal["product", "attention", "elementwise", "copy", "launch"]
    prepare: Callable[[], Operation]
    flop: float = 0.0
    bytes: float = 0.0
    product: Gemm | None = None
    other_bytes: float = 0.0  # bytes that it moves too, but that plans list as memory-bound operations of their own
    weight: int = 1  # about how often a training step of the first listed model runs it
    elementwise: ElementwiseKind = "other"  # the kind that it measures, if it is memory-bound


def product_work(device: torch.device) -> list[Work]:
    """Return the matrix products, each distinct shape once."""
    found: dict[tuple[Any, ...], Gemm] = {}
    for op in (*_listed(device), *_large()):
        if isinstance(op, Gemm):
            found.setdefault((op.pass_, math.ceil(op.m), op.n, math.ceil(op.k), op.groups, op.format), op)
    works = []
    for key, op in found.items():
        pass_, m, n, k, groups, format = key
        name = f"{format} {pass_} {groups} x [{m} x {k} x {n}]"

        def prepare(op: Gemm = op) -> Operation:
            return in_turn(lambda: _product(op, device), op.bytes)

        works.append(Work(name=name, kind="product", prepare=prepare, product=op))
    return works


def in_turn(make: Callable[[], Operation], num_bytes: float) -> Operation:
    """Return an operation that runs those that `make` returns in turn, so that its operands change each time."""
    copies = min(math.ceil(CYCLED_BYTES / num_bytes), MOST_COPIES)
    turns = itertools.cycle([make() for _ in range(copies)])
    return lambda: next(turns)()


def random_rows(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return random values; on a CPU one random row many times, which is quick to make.

    Only a GPU's clock rate depends on the values.
    """
    if device.type == "cuda":
        return torch.randn(shape, device=device, dtype=dtype)
    return torch.randn(shape[-1]).to(dtype).expand(shape).contiguous()


def _listed(device: torch.device) -> Iterator[Op]:
    for model, tokens, recipe in GPU_SHAPES if device.type == "cuda" else CPU_SHAPES:
        spec = load_model(model)
        layout = Layout() if spec.num_hidden_layers < 32 else Layout(dp=64, ep=64)  # one GPU's share of the experts
        for layer in {0, spec.num_hidden_layers - 1}:
            sequences = max(1, tokens // SEQUENCE)
            yield from layer_ops(spec, layer, layout, load_recipe(recipe), tokens, "training", SEQUENCE, sequences)
        yield from head_ops(spec, layout, tokens, "training")


def _large() -> list[Gemm]:
    return [
        Gemm(name="large", pass_="forward", m=LARGE, n=LARGE, k=LARGE, format="bf16"),
        Gemm(name="large", pass_="forward", m=LARGE, n=LARGE, k=LARGE, format="fp32"),
    ]


def _product(op: Gemm, device: torch.device) -> Operation:
    """Return the product [m, k] x [k, n] of each group, with its operands in the layout that the pass has."""
    m, n, k, groups = math.ceil(op.m), op.n, math.ceil(op.k), op.groups
    if op.format == "fp8":
        return _scaled_product(op.pass_, (m, n, k), groups, device)

    def random(*shape: int) -> Tensor:
        return random_rows(shape, DTYPES[op.format], device)

    if op.pass_ == "wgrad":  # gradient [tokens, m], input [tokens, n]
        left, right = random(groups * k, m), random(groups * k, n)
        if groups == 1:
            return lambda: left.t() @ right
        return lambda: grouped.wgrad(left, right, _offsets(groups, k))
    rows = random(groups * m, k)
    if op.pass_ == "forward":
        weights = random(groups, n, k)
        if groups == 1:
            return lambda: F.linear(rows, weights[0])
        return lambda: grouped.fprop(rows, weights, _offsets(groups, m))
    weights = random(groups, k, n)  # as the forward pass has them: outputs by inputs
    if groups == 1:
        return lambda: rows @ weights[0]
    return lambda: grouped.dgrad(rows, weights, _offsets(groups, m))


def _scaled_product(pass_: str, shape: tuple[int, int, int], groups: int, device: torch.device) -> Operation:
    """Return a product in a recipe's precision, of operands that are quantised already."""
    m, n, k = shape

    def random(*sides: int) -> Tensor:
        return random_rows(sides, torch.bfloat16, device)

    if pass_ == "wgrad":
        offsets = _offsets(groups, k)
        left, right = (quantize_columns(random(groups * k, side), offsets, COLUMN) for side in (m, n))
        return lambda: scaled.wgrad(left, right, offsets)
    offsets, rows = _offsets(groups, m), quantize_rows(random(groups * m, k), ROW)
    if pass_ == "forward":
        outputs = quantize_blocks(random(groups, n, k), BLOCK)
        return lambda: scaled.fprop(rows, outputs, offsets)
    inputs = quantize_blocks(random(groups, k, n), BLOCK)
    return lambda: scaled.dgrad(rows, inputs, offsets)


def _offsets(groups: int, rows: int) -> Sequence[int]:
    return range(0, groups * rows + 1, rows)


def attention_work(device: torch.device) -> list[Work]:
    """Return the attention core of the first listed model: forward, backward, and absorbed."""
    model, tokens, recipe = (GPU_SHAPES if device.type == "cuda" else CPU_SHAPES)[0]
    spec, sequences = load_model(model), tokens // SEQUENCE
    training = layer_ops(spec, 0, Layout(), load_recipe(recipe), tokens, "training", SEQUENCE, sequences)
    decode = layer_ops(spec, 0, Layout(), load_recipe(recipe), BATCH, "decode", CONTEXT, BATCH)
    cores = [op for op in (*training, *decode) if isinstance(op, Attention)]
    forward, backward, absorbed = cores
    around = sum(op.bytes for op in training if isinstance(op, Elementwise) and op.name.startswith("around attention"))

    def heads(op: Attention, width: int) -> Tensor:
        shape = (int(op.sequences), op.heads, int(op.tokens // op.sequences), width)
        return torch.randn(shape, device=device).bfloat16().requires_grad_()

    def run_forward() -> Operation:
        q, k, v = (heads(forward, width) for width in (forward.qk_dim, forward.qk_dim, forward.v_dim))
        return lambda: causal_attention(q, k, v, 0.1)

    def run_backward() -> Operation:
        q, k, v = (heads(backward, width) for width in (backward.qk_dim, backward.qk_dim, backward.v_dim))
        output = causal_attention(q, k, v, 0.1)
        grad = torch.randn_like(output)
        return lambda: torch.autograd.grad(output, (q, k, v), grad, retain_graph=True)

    def run_absorbed() -> Operation:
        keys = torch.randn(BATCH, 1, CONTEXT, absorbed.qk_dim, device=device).bfloat16()
        visible = torch.ones(BATCH, 1, 1, CONTEXT, dtype=torch.bool, device=device)
        query = heads(absorbed, absorbed.qk_dim).detach()
        return lambda: masked_attention(query, keys, keys[..., : absorbed.v_dim], 0.1, visible)

    runs = (
        ("forward", forward, run_forward, 0.0),
        ("backward", backward, run_backward, around),
        ("absorbed", absorbed, run_absorbed, 0.0),
    )
    return [
        Work(name=f"attention {name}", kind="attention", prepare=run, flop=op.flop, bytes=op.bytes, other_bytes=other)
        for name, op, run, other in runs
    ]


def launch_work(device: torch.device) -> list[Work]:
    """Return what measures a launch: one call, and on a CPU also a whole layer of next to no work.

    The layer has what autograd and Python do between the calls, which a GPU's queue hides.
    """

    def prepare() -> Operation:
        layer, x = RmsNorm(64, 1e-6).to(device), torch.randn(1, 64, device=device).bfloat16()
        return lambda: layer(x)

    bare = Work(name="launch", kind="launch", prepare=prepare)
    return [bare] if device.type == "cuda" else [bare, _layer_work()]


def _layer_work() -> Work:
    """Return a layer so narrow that its forward and backward pass on one token is `weight` launches and little else."""
    spec = load_model(CPU_SHAPES[0][0])
    mla, moe = spec.attention, spec.moe
    assert isinstance(mla, Mla) and moe is not None
    narrow = {"hidden_size": NARROW, "moe": moe.model_copy(update={"moe_intermediate_size": NARROW})}
    spec, layer = spec.model_copy(update=narrow), spec.num_hidden_layers - 1
    listed = layer_ops(spec, layer, Layout(), load_recipe("bf16"), 1, "training", 1)
    launches = [op for op in listed if isinstance(op, Gemm | Attention | Elementwise) and not _is_recomputed(op)]

    def prepare() -> Operation:
        block, dispatcher = Block(spec, layer, torch.bfloat16), LocalDispatcher()
        for parameter in block.parameters():
            torch.nn.init.normal_(parameter, std=0.02)
        positions = torch.zeros(1, 1, dtype=torch.int64)
        cos, sin = tables(spec, mla.qk_rope_head_dim, positions)
        context = Context(positions=positions, cos=cos, sin=sin)
        x = torch.randn(1, 1, NARROW).bfloat16().requires_grad_()
        inputs = [x, *block.parameters()]

        def run() -> object:
            output, _ = block(x, context, dispatcher)
            return torch.autograd.grad(output, inputs, torch.ones_like(output), allow_unused=True)

        return run

    return Work(name="layer of launches", kind="launch", prepare=prepare, weight=len(launches))


def _is_recomputed(op: Op) -> bool:
    return isinstance(op, Gemm | Elementwise) and op.recomputed
