"""Who holds which weights, against the models of all ranks, built one by one."""

import math
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dovetail.catalog.presets import find_model
from dovetail.cost.memory.stages import stages
from dovetail.model.transformer import Transformer
from dovetail.parallel.weights.holders import blocks_of, rank_sets, weights_of
from dovetail.spec.layout import Layout, ScheduleName, check_layout, divisors
from dovetail.spec.model import ModelSpec

PRETRAINING: dict[str, Any] = {"pp": 16, "ep": 64, "dp": 128, "microbatches": 120}  # [V3 §3.2]
Elements = tuple[str, int, int]  # of a weight, from the first to the last


@st.composite
def layouts(draw: st.DrawFn) -> Layout:
    """Legal ones for four layers and eight experts."""
    schedule: ScheduleName = draw(st.sampled_from(["1f1b", "interleaved", "zb1p", "dualpipe", "dualpipev"]))
    pp = draw(st.sampled_from([2, 4] if schedule == "dualpipe" else [1, 2] if schedule != "1f1b" else [1, 2, 3, 4]))
    dp = draw(st.sampled_from([1, 2, 3, 4, 6]))
    ep = draw(st.sampled_from([each for each in divisors(dp) if 8 % each == 0]))
    layout = Layout(pp=pp, dp=dp, ep=ep, schedule=schedule, microbatches=8 * pp)
    cuts = draw(
        st.lists(st.integers(1, 3), min_size=layout.num_stages - 1, max_size=layout.num_stages - 1, unique=True)
    )
    ends = [0, *sorted(cuts), 4]
    layers = tuple(last - first for first, last in zip(ends, ends[1:], strict=False))
    return layout.model_copy(update={"stage_layers": draw(st.sampled_from([None, layers]))})


def held(spec: ModelSpec, layout: Layout, rank: int) -> set[Elements]:
    """By the model that the rank has, with its block of every tensor [experts, ...]."""
    found, everything = set(), stages(spec, layout)
    for number in layout.stages_of(rank // layout.dp):
        with torch.device("meta"):
            model = Transformer(spec, stage=everything[number])
        for name, weight in model.named_parameters():
            parts = layout.ep if name.endswith(("experts.gate_up_proj", "experts.down_proj")) else 1
            length = weight.numel() // parts
            start = rank % layout.ep % parts * length
            found.add((name, start, start + length - 1))
    return found


@given(layout=layouts(), depths=st.integers(0, 2), is_tied=st.booleans())
@settings(max_examples=40, deadline=None, derandomize=True)
def test_every_rank_holds_what_its_model_has(
    layout: Layout, depths: int, is_tied: bool, tiny_spec: Callable[..., ModelSpec]
) -> None:
    spec = tiny_spec(num_hidden_layers=4, num_nextn_predict_layers=depths or None, tie_word_embeddings=is_tied)
    check_layout(layout, spec)
    holders = defaultdict[Elements, list[int]](list)
    for rank in range(layout.gpus):
        for elements in held(spec, layout, rank):
            holders[elements].append(rank)
    weights = weights_of(spec, layout)
    shapes = {name: tuple(each.shape) for name, each in Transformer(spec).named_parameters()}
    assert {name: weight.shape for name, weight in weights.items()} == shapes
    assert list(weights) == list(shapes)
    for rank in range(layout.gpus):
        blocks = blocks_of(weights, layout, rank)
        found = {(name, each.start, each.start + each.length - 1): list(each.ranks) for name, each in blocks.items()}
        assert found == {elements: ranks for elements, ranks in holders.items() if rank in ranks}
    for name, shape in shapes.items():  # blocks are disjoint, and nothing is left out
        parts = sorted((first, last) for each, first, last in holders if each == name)
        ends = [-1, *(last for _, last in parts)]
        assert [first for first, _ in parts] == [last + 1 for last in ends[:-1]]
        assert ends[-1] == math.prod(shape) - 1
    assert sorted(rank_sets(weights, layout)) == sorted({tuple(ranks) for ranks in holders.values()})


@pytest.mark.parametrize(("schedule", "sizes"), [("dualpipe", {256: 8, 4: 512}), ("1f1b", {256: 1, 128: 16, 2: 1024})])
def test_deepseek_v3_as_it_was_trained(schedule: ScheduleName, sizes: dict[int, int]) -> None:
    layout = Layout(schedule=schedule, **PRETRAINING)
    weights = weights_of(find_model("deepseek-v3").spec, layout)
    sets = rank_sets(weights, layout)
    assert {size: sum(len(ranks) == size for ranks in sets) for size in sizes} == sizes
    assert len(sets) == sum(sizes.values())
    last = blocks_of(weights, layout, layout.gpus - 1)
    embedding, experts = last["embed_tokens.weight"], last["mtp.0.block.mlp.experts.down_proj"]
    assert embedding.ranks == (*range(128), *range(15 * 128, 16 * 128))
    copies = (15 * 128 + 63, 15 * 128 + 127)
    assert experts.ranks == (copies if schedule == "1f1b" else (63, 127, *copies))
    assert (experts.start, experts.length) == (63 * 4 * 7168 * 2048, 4 * 7168 * 2048)
