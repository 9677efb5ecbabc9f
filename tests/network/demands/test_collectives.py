"""Collectives as flows: what each rank ends with, bytes, and orders."""

import numpy as np
import pytest

from dovetail.network.demands.collectives import (
    COLLECTIVES,
    all_to_all,
    collective,
    in_rings,
    point_to_point,
    ring_orders,
    tree_all_reduce,
)


def test_all_to_all_is_every_pair_once() -> None:
    demand = all_to_all([3, 5, 9], 12.0)
    flows = demand.steps[0].flows
    pairs = set(zip(flows.source.tolist(), flows.destination.tolist(), strict=True))
    assert pairs == {(3, 5), (3, 9), (5, 3), (5, 9), (9, 3), (9, 5)}
    assert flows.bytes.tolist() == [4.0] * 6
    assert demand.bus_factor == pytest.approx(2 / 3)


@pytest.mark.parametrize("channels", [1, 3, 8])
def test_rings_visit_each_gpu_once_and_a_node_without_a_break(channels: int) -> None:
    rings = ring_orders(range(32), 8, channels)
    for channel, ring in enumerate(rings):
        assert sorted(ring) == list(range(32))
        assert [gpu // 8 for gpu in ring] == sorted(gpu // 8 for gpu in ring)
        assert ring[0] == channel


@pytest.mark.parametrize(("name", "rounds"), [("all-gather", 1), ("reduce-scatter", 1), ("all-reduce", 2)])
def test_bytes_in_rings_are_those_of_the_bus_factor(name: str, rounds: int) -> None:
    """[nccl-tests, PERFORMANCE]: each rank sends the size times the bus factor."""
    demand = in_rings(name, ring_orders(range(16), 8, 4), 1e6)
    assert demand.bus_factor == pytest.approx(rounds * 15 / 16)
    assert demand.bytes_sent == pytest.approx(16 * 1e6 * demand.bus_factor)
    assert demand.steps[0].times == rounds * 15


@pytest.mark.parametrize("count", [2, 3, 4, 7, 8, 16, 31, 64])
def test_trees_reach_all_ranks_from_one_root_and_burden_each_alike(count: int) -> None:
    demand = tree_all_reduce(range(count), 2.0)
    flows = demand.steps[0].flows
    edges = 2 * (count - 1)
    assert len(flows) == 2 * edges
    for first in (0, edges):  # up, down of each tree
        child, parent = (ends[first : first + count - 1].tolist() for ends in (flows.source, flows.destination))
        above = dict(zip(child, parent, strict=True))
        assert len(above) == count - 1
        depths = []
        for rank in above:
            depth = 0
            while rank in above:
                rank, depth = above[rank], depth + 1
            depths.append(depth)
        assert max(depths) <= np.ceil(np.log2(count)) + 1 and 2 * max(depths) <= demand.steps[0].hops + 2
        assert np.bincount(parent).max() <= 2
    sent = np.bincount(flows.source, flows.bytes)
    assert sent.max() <= 2 * 2.0 * (1 + 1 / 4)  # at most three edges of a tree and one of the other, half the size each


@pytest.mark.parametrize("name", COLLECTIVES)
def test_all_names_are_known(name: str) -> None:
    demand = collective(name, range(16), 1e6, gpus_per_node=8, channels=2)
    assert demand.name == name and demand.bytes_sent > 0


def test_mistakes() -> None:
    with pytest.raises(ValueError, match="no collective 'allreduce'; did you mean all-reduce"):
        collective("allreduce", range(4), 1.0)
    with pytest.raises(ValueError, match="size = -1"):
        all_to_all(range(4), -1.0)
    with pytest.raises(ValueError, match="size = nan"):
        point_to_point([(0, 1)], float("nan"))
    with pytest.raises(ValueError, match="4 GPUs, 3 of them different"):
        all_to_all([0, 1, 1, 2], 1.0)
    with pytest.raises(ValueError, match="1 GPUs"):
        collective("all-gather", [0], 1.0)
    with pytest.raises(ValueError, match="channels = 0"):
        ring_orders(range(4), 1, 0)
    with pytest.raises(ValueError, match="no pairs"):
        point_to_point([], 1.0)
