"""moe.svg: one token's way through the experts of DeepSeek-V3: scores, groups, choice, dispatch and combine.

The choice is made by the model's own gate from logits of a fixed seed; experts stand where a layout of 64
expert-parallel ranks puts them.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path

import torch
from canvas import BLUE, GREEN, GREY, INK, LINE, MARGIN, MUTED, ORANGE, PAPER, PURPLE, Canvas

from dovetail.catalog.precision import load_recipe
from dovetail.catalog.presets import load_model
from dovetail.cost.ops.ffn import FfnWork, experts_forward
from dovetail.cost.ops.ops import Exchange
from dovetail.model.experts.gate import route
from dovetail.network.demands.distinct import distinct_bins
from dovetail.spec.layout import Layout
from dovetail.spec.model import ModelSpec, Moe

WIDTH = 1000.0
LAYOUT = Layout(ep=64, dp=64)
GPUS_PER_NODE = 8
SEED, TOKEN_GPU = 5, 20
BARS, TALL = 122.0, 84.0  # where the scores stand, and how high a score of 1 is
NODES = 322.0  # where the nodes stand
NUM_NODES = LAYOUT.ep // GPUS_PER_NODE
ROOM = (WIDTH - 2 * MARGIN) / NUM_NODES  # of a node, and of a group above it


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """What the gate makes of one token."""

    biased: list[float]  # scores with bias, of all experts
    worth: list[float]  # of each group: the sum of its two best
    kept: list[int]  # groups
    weights: dict[int, float]  # of the chosen experts


def draw(directory: Path) -> Path:
    spec = load_model("deepseek-v3")
    moe = spec.moe
    assert moe is not None and moe.n_group == NUM_NODES
    choice = choose(moe)
    canvas = Canvas(
        WIDTH,
        588,
        "One token's way through the experts of DeepSeek-V3",
        f"A gate scores {moe.n_routed_experts} experts in {moe.n_group} groups, keeps the {moe.topk_group} best groups "
        f"and chooses the {moe.num_experts_per_tok} best experts in them. The token is sent once to each node that has "
        "one of these, the experts' outputs come back and are added with their weights, and the shared expert's output "
        "is added where the token is.",
    )
    _scores(canvas, moe, choice)
    per_gpu = LAYOUT.experts_per_rank(spec)
    nodes = {expert // per_gpu // GPUS_PER_NODE for expert in choice.weights}
    _nodes(canvas, choice, per_gpu, nodes)
    _ways(canvas, nodes)
    _sum(canvas, moe, choice)
    exchange = _exchange(spec, moe)
    free = distinct_bins(_exchange(spec, moe.model_copy(update={"n_group": 1, "topk_group": 1})), NUM_NODES)
    canvas.caption(
        f"Each group's experts are on one node, so a token goes to {moe.topk_group} of {NUM_NODES} nodes at most; a "
        f"free choice of {moe.num_experts_per_tok} experts would send it to {free:.1f} in the mean. A copy "
        f"that goes over the network has {exchange.bytes_per_copy:,.0f} bytes in FP8. The weights add up to "
        f"{moe.routed_scaling_factor:g}, the model's scaling factor."
    )
    return canvas.save(directory / "moe.svg")


def choose(moe: Moe) -> Choice:
    """By the gate, from logits and biases that look like those of a trained one."""
    source = random.Random(SEED)
    logits = [sum(source.random() for _ in range(6)) * 1.5 - 5.5 for _ in range(moe.n_routed_experts)]
    bias = [0.1 * source.random() for _ in range(moe.n_routed_experts)]
    routing = route(torch.tensor([logits]), torch.tensor(bias), moe)
    biased = [score + each for score, each in zip(routing.scores[0].tolist(), bias, strict=True)]
    size = moe.n_routed_experts // moe.n_group
    worth = [sum(sorted(biased[group * size : (group + 1) * size])[-2:]) for group in range(moe.n_group)]
    kept = sorted(sorted(range(moe.n_group), key=lambda group: -worth[group])[: moe.topk_group])
    weights = dict(zip(routing.expert_ids[0].tolist(), routing.weights[0].tolist(), strict=True))
    assert {expert // size for expert in weights} <= set(kept)
    return Choice(biased=biased, worth=worth, kept=kept, weights=weights)


def _exchange(spec: ModelSpec, moe: Moe) -> Exchange:
    work = FfnWork(spec=spec, layout=LAYOUT, recipe=load_recipe("deepseek-v3"), tokens=1, phase="training")
    return next(op for op in experts_forward(work, moe) if isinstance(op, Exchange) and op.name == "dispatch")


def _scores(canvas: Canvas, moe: Moe, choice: Choice) -> None:
    size = moe.n_routed_experts // moe.n_group
    steps = (
        f"1. Gate: each of {moe.n_routed_experts} experts gets a score, the sigmoid of a logit, and a bias that evens "
        "out the experts' loads (bars).",
        f"2. Groups: each is worth the sum of its two best bars. The best {moe.topk_group} of {moe.n_group} groups "
        "stay (blue), so that a token goes to few nodes.",
        f"3. Choice: the best {moe.num_experts_per_tok} experts of these groups (orange), weighted by their scores "
        "without the bias.",
    )
    canvas.paragraph(MARGIN, 66, steps)
    for group in range(moe.n_group):
        left, is_kept = MARGIN + group * ROOM, group in choice.kept
        tint = BLUE if is_kept else GREY
        canvas.rectangle(left + 3, BARS, ROOM - 6, TALL + 34, fill=tint.fill, stroke=tint.border, radius=5)
        for place in range(size):
            expert = group * size + place
            ink = ORANGE.border if expert in choice.weights else tint.border
            high = TALL * choice.biased[expert]
            width = (ROOM - 18) / size
            canvas.rectangle(left + 9 + place * width, BARS + TALL + 8 - high, width - 0.6, high, fill=ink)
        text = f"group {group}: {choice.worth[group]:.2f}"
        canvas.text(left + ROOM / 2, BARS + TALL + 25, text, size=12.5, bold=is_kept, fill=INK if is_kept else MUTED)


def _nodes(canvas: Canvas, choice: Choice, per_gpu: int, used: set[int]) -> None:
    """All nodes with their GPUs, the experts of each GPU as small squares."""
    lines = (
        "4. Dispatch: from its GPU (green) the token goes once over the network to each node of a chosen expert, and "
        "on over NVLink.",
        f"A node has {GPUS_PER_NODE} GPUs, and each of these {per_gpu} experts (squares).",
    )
    canvas.paragraph(MARGIN, NODES - 51, lines)
    for node in range(NUM_NODES):
        left, is_used = MARGIN + node * ROOM, node in used
        tint, ink = (BLUE, INK) if is_used else (GREY, MUTED)
        canvas.rectangle(left + 3, NODES, ROOM - 6, 92, fill=tint.fill, stroke=tint.border, radius=5)
        canvas.text(left + ROOM / 2, NODES + 84, f"node {node}", size=12.5, bold=is_used, fill=ink)
        for index in range(GPUS_PER_NODE):
            gpu = node * GPUS_PER_NODE + index
            x, y = left + 11 + index % 4 * 25, NODES + 9 + index // 4 * 30
            is_home = gpu == TOKEN_GPU
            canvas.rectangle(x, y, 22, 26, fill=GREEN.border if is_home else PAPER, stroke=LINE, radius=2)
            for expert in range(per_gpu):
                fill = ORANGE.border if gpu * per_gpu + expert in choice.weights else "#d5dae0"
                canvas.rectangle(x + 3.5 + expert % 2 * 8, y + 5 + expert // 2 * 9, 7, 7, fill=fill)


def _ways(canvas: Canvas, used: set[int]) -> None:
    """The token over the nodes to those of its experts, and the sums of outputs under them back."""
    home = TOKEN_GPU // GPUS_PER_NODE
    start = MARGIN + (home + 0.5) * ROOM
    for node in sorted(used - {home}):
        x = MARGIN + (node + 0.5) * ROOM
        there = [(start, NODES), (start, NODES - 16), (x, NODES - 16), (x, NODES)]
        canvas.arrow(*there, color=BLUE.ink, width=2)
        back = [(x, NODES + 92), (x, NODES + 112), (start, NODES + 112), (start, NODES + 136)]
        canvas.arrow(*back, color=GREEN.ink, width=2)


def _sum(canvas: Canvas, moe: Moe, choice: Choice) -> None:
    y = NODES + 136
    terms = " + ".join(f"{weight:.2f} E{expert}" for expert, weight in sorted(choice.weights.items()))
    canvas.box(MARGIN, y, 560, 48, GREEN, f"5. Combine: the sum of {moe.num_experts_per_tok} weighted outputs", terms)
    canvas.text(MARGIN + 580, y + 30, "+", size=18)
    canvas.box(MARGIN + 600, y, 170, 48, PURPLE, "shared expert", "of every token, where it is")
    canvas.text(MARGIN + 790, y + 30, "+", size=18)
    canvas.box(MARGIN + 810, y, 142, 48, GREY, "residual", "to the next layer")
