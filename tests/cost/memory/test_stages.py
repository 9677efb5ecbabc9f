"""Layers on stages: every layer once, in order, and as even as can be; against trying all ways."""

from itertools import combinations

import pytest

from dovetail.catalog.presets import load_model
from dovetail.cost.memory.stages import _balanced, stages
from dovetail.spec.layout import Layout

V3 = load_model("deepseek-v3")


def test_deepseek_v3_on_sixteen_stages() -> None:
    """Four layers each [profile-data], and the one that is left with MTP and head."""
    found = stages(V3, Layout(pp=16))
    assert [len(stage.layers) for stage in found] == [4] * 15 + [1]
    assert [stage.has_embedding for stage in found] == [True] + [False] * 15
    assert [stage.has_head for stage in found] == [False] * 15 + [True]
    assert [stage.mtp_modules(V3) for stage in found] == [0] * 15 + [1]


@pytest.mark.parametrize("layout", [Layout(), Layout(pp=61), Layout(pp=8, schedule="dualpipev"), Layout(pp=7)])
def test_every_layer_stands_on_one_stage(layout: Layout) -> None:
    found = stages(V3, layout)
    assert len(found) == layout.num_stages
    assert [layer for stage in found for layer in stage.layers] == list(range(61))
    assert all(stage.layers for stage in found)


def test_a_given_division_is_taken() -> None:
    found = stages(V3, Layout(pp=3, stage_layers=(20, 20, 21)))
    assert [len(stage.layers) for stage in found] == [20, 20, 21]


@pytest.mark.parametrize("end", [0.0, 2.5, 9.0])
@pytest.mark.parametrize("num_stages", [1, 2, 3, 4])
def test_nothing_is_more_even(end: float, num_stages: int) -> None:
    weights = (1.0, 1.0, 3.0, 1.0, 2.0, 1.0, 1.0)

    def cost(counts: tuple[int, ...]) -> tuple[float, float]:
        starts = [sum(counts[:index]) for index in range(num_stages)]
        sums = [sum(weights[start : start + count]) for start, count in zip(starts, counts, strict=True)]
        sums[-1] += end
        return max(sums), sum(each**2 for each in sums)

    cuts = [(0, *cut, len(weights)) for cut in combinations(range(1, len(weights)), num_stages - 1)]
    ways = [tuple(stop - start for start, stop in zip(cut, cut[1:], strict=False)) for cut in cuts]
    assert cost(_balanced(weights, end, num_stages)) == min(map(cost, ways))
