"""Groups of a layout at once: against every group written out, against closed forms, and with parts that fail."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from dovetail.catalog.hardware import load_cluster
from dovetail.cost.ops.ops import Collective, Exchange, Send
from dovetail.network.delivery.layout_traffic import (
    LayoutTraffic,
    Sent,
    _all_groups,
    _first_ranks,
    build_for,
    layout_traffic,
)
from dovetail.network.demands.closed_forms import collective_time, exchange_bytes
from dovetail.network.demands.distinct import distinct_bins
from dovetail.network.demands.experts import sample_choices
from dovetail.network.flows.flows import Flows
from dovetail.network.routing.route import Ecmp

CLUSTER = load_cluster("h800-2048").model_copy(update={"nodes": 32})


def exchange(ranks: int, tokens: int = 4096) -> Exchange:
    return Exchange(
        name="dispatch",
        pass_="forward",
        tokens=tokens,
        bytes_per_copy=7168.0,
        choices=8,
        experts=256,
        groups=8,
        kept_groups=4,
        ranks=ranks,
    )


def collective(ranks: int, stride: int = 1) -> Collective:
    return Collective(name="all_gather", pass_="wgrad", bytes=1e9, ranks=ranks, stride=stride)


def without_latency(traffic: LayoutTraffic) -> LayoutTraffic:
    fabric = traffic.fabric
    return replace(traffic, fabric=replace(fabric, latency=np.zeros_like(fabric.latency)), _known={})


def written_out(sent: Sent, gpus: int, mode: str, each: int = 8) -> Counter[tuple[int, int]]:
    """Bytes between pairs, group by group."""
    found: Counter[tuple[int, int]] = Counter()
    if isinstance(sent, Send):
        return Counter({(rank, rank + sent.distance): round(sent.bytes) for rank in range(gpus - sent.distance)})
    assert isinstance(sent, Exchange)
    carried = exchange_bytes(sent, each, "low-latency" if mode == "low-latency" else "normal")
    for first in range(0, gpus, sent.ranks):
        members = range(first, first + sent.ranks)
        for one in members:
            for other in members:
                is_near, nodes = one // each == other // each, sent.ranks // each
                if one == other:
                    continue
                if mode == "low-latency":
                    amount = (carried.scale_up + carried.scale_out) / (sent.ranks - 1)
                elif is_near:
                    amount = carried.scale_up / (min(each, sent.ranks) - 1)
                else:
                    amount = carried.scale_out / (nodes - 1) if one % each == other % each else 0
                if amount:
                    found[one, other] += round(amount)
    return found


@pytest.mark.parametrize("mode", ["normal", "low-latency"])
@pytest.mark.parametrize("sent", [exchange(4), exchange(8), exchange(32), Send(bytes=1e6, distance=16, gpus=64)])
def test_all_groups_are_those_written_out(sent: Sent, mode: str) -> None:
    flows = _all_groups(sent, mode, _first_ranks(sent, 64), 8).flows  # type: ignore[arg-type]
    found: Counter[tuple[int, int]] = Counter()
    for one, other, amount in zip(flows.source, flows.destination, flows.bytes, strict=True):
        found[int(one), int(other)] += round(amount)
    assert found == written_out(sent, 64, mode)


@pytest.mark.parametrize(("ranks", "stride"), [(2, 1), (8, 8), (4, 2), (16, 4), (32, 1), (6, 1)])
def test_rings_of_strided_groups(ranks: int, stride: int) -> None:
    """Each rank has one way in and out for each channel, and only within its group."""
    sent = collective(ranks, stride)
    flows = _all_groups(sent, "normal", _first_ranks(sent, 64), 8).flows
    block = ranks * stride
    group = (flows.source // block, flows.source % stride)
    assert np.array_equal(group[0], flows.destination // block) and np.array_equal(group[1], flows.destination % stride)
    for ends in (flows.source, flows.destination):
        taking_part, count = np.unique(ends, return_counts=True)
        assert len(set(count)) == 1
        assert len(taking_part) == 64 // block * block
    sent_by_all = flows.bytes.sum() * (ranks - 1)  # steps
    assert sent_by_all == pytest.approx(64 // block * stride * (ranks - 1) * 1e9)


def test_a_group_of_nodes_that_are_not_whole() -> None:
    """12 ranks on nodes of 8: the four of the second node get from two each."""
    flows = _all_groups(exchange(12), "normal", np.array([0]), 8).flows
    across = flows.source // 8 != flows.destination // 8
    got = np.bincount(flows.destination[across], minlength=12)
    assert got.tolist() == [1, 1, 1, 1, 0, 0, 0, 0, 2, 2, 2, 2]


@pytest.mark.parametrize(("first", "ranks"), [(0, 12), (12, 12), (6, 4), (4, 24)])
def test_copies_of_groups_that_do_not_fill_their_nodes(first: int, ranks: int) -> None:
    """Token by token: once to each other node of its experts, and once to each rank of them from the GPU there."""
    sent = replace(exchange(ranks, 2000), experts=48, choices=4, groups=1, kept_groups=1, bytes_per_copy=1.0)
    chosen = sample_choices(ranks, 2000, 4, 48) // (48 // ranks) + first
    members = np.arange(first, first + ranks)
    expected: Counter[tuple[int, int]] = Counter()
    for sender in members:
        place = [other for other in members if other // 8 == sender // 8].index(sender)
        for token in chosen[sender - first]:
            for node in set(token // 8):
                there = members[members // 8 == node]
                holder = sender if node == sender // 8 else there[place % len(there)]
                expected[sender, holder] += 1
                for rank in {rank for rank in token if rank // 8 == node}:
                    expected[holder, rank] += 1
    flows = _all_groups(sent, "normal", np.array([first]), 8).flows
    found = {(int(one), int(other)): amount for one, other, amount in flow_list(flows)}
    assert found.keys() == {pair for pair in expected if pair[0] != pair[1]}
    for pair, amount in found.items():
        assert amount == pytest.approx(expected[pair], abs=6 * expected[pair] ** 0.5), pair


def flow_list(flows: Flows) -> list[tuple[int, int, float]]:
    return list(zip(flows.source.tolist(), flows.destination.tolist(), flows.bytes.tolist(), strict=True))


def test_a_group_across_two_nodes_waits_for_nics() -> None:
    """On two racks of 6 the second four GPUs are on both, and half of their experts are over there."""
    racks = CLUSTER.model_copy(update={"gpus_per_node": 6, "nodes": 2})
    sent = exchange(4)
    found = without_latency(layout_traffic(racks, 12, "ft2")).at_once(sent)
    assert found.alone == pytest.approx(exchange_bytes(sent, 6).scale_up / 160e9, rel=1e-9)
    assert found.together == pytest.approx(4096 * distinct_bins(sent, 2) / 2 * 7168 / 40e9, rel=1e-9)
    assert found.slowdown > 1.5


def test_the_group_alone_leaves_its_node_where_the_closed_form_does() -> None:
    """The first of these does not: GPU 0 to 4, and 0, 3 and 6."""
    traffic = without_latency(layout_traffic(CLUSTER, 64))
    send = traffic.at_once(Send(bytes=1e8, distance=4, gpus=64))
    assert (send.alone, send.slowdown) == pytest.approx((1e8 / 40e9, 1.0), rel=1e-9)
    assert traffic.at_once(collective(3, 3)).alone > 1.5 * traffic.at_once(collective(3)).alone


@pytest.mark.parametrize(
    "sent", [exchange(64), exchange(8), collective(8, 8), collective(2), Send(bytes=1e6, distance=64, gpus=256)]
)
def test_planes_have_room_for_all_groups(sent: Sent) -> None:
    found = layout_traffic(CLUSTER, 256).at_once(sent)
    assert found.slowdown == pytest.approx(1, rel=1e-9)


def test_alone_is_the_closed_form_from_links() -> None:
    traffic = without_latency(layout_traffic(CLUSTER, 256))
    carried = exchange_bytes(exchange(64), 8)
    seconds = max(carried.scale_out / 40e9, carried.scale_up / 160e9)
    assert traffic.at_once(exchange(64)).alone == pytest.approx(seconds, rel=1e-9)
    strided = collective(8, 8)
    assert CLUSTER.scale_out is not None
    ring = collective_time(strided, CLUSTER).seconds.value - 7 * CLUSTER.scale_out.latency.value
    assert traffic.at_once(strided).alone == pytest.approx(ring, rel=1e-9)


def test_one_plane_of_two_lost_doubles_what_crosses_the_network(tmp_path: Path) -> None:
    path = tmp_path / "two.toml"
    path.write_text('like = "mpft"\nname = "two"\nsource = "test"\nplanes = 2\n')
    pair = CLUSTER.model_copy(update={"gpus_per_node": 2})
    lost = without_latency(layout_traffic(pair, 64, str(path), failures=["plane:1"]))
    assert lost.at_once(exchange(16)).slowdown == pytest.approx(2, rel=1e-9)
    assert lost.at_once(collective(2)).slowdown == pytest.approx(1, rel=1e-9)  # within a node


def test_hashed_paths_collide_where_few_nodes_of_a_leaf_send_far() -> None:
    whole = load_cluster("h800-2048")
    hashed = layout_traffic(whole, 2048, "ft2", "ecmp")
    assert isinstance(hashed.policy, Ecmp)
    found = hashed.at_once(collective(8, 256))
    assert found.slowdown > 2 and found.busiest == "leaf to spine"
    assert layout_traffic(whole, 2048, "ft2").at_once(collective(8, 256)).slowdown == pytest.approx(1, rel=1e-6)


def test_a_lone_node_needs_no_fabric() -> None:
    node = CLUSTER.model_copy(update={"nodes": 1, "gpus_per_node": 4, "fabric": None})
    assert build_for(node).endpoints == 4
    assert layout_traffic(node, 4).at_once(exchange(4)).slowdown == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"routing": "ecpm"}, "no routing 'ecpm'; did you mean ecmp"),
        ({"fabric": "mptf"}, "no fabric 'mptf'"),
        ({"failures": ["plane:8"]}, "plane:8: mpft has plane 0 to 7"),
        ({"failures": ["plane:3@2"]}, "write plane:3"),
    ],
)
def test_bad_networks(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        layout_traffic(CLUSTER, 256, **arguments)  # type: ignore[arg-type]


def test_a_cluster_without_a_fabric_says_how_to_name_one() -> None:
    with pytest.raises(ValueError, match="add fabric ="):
        layout_traffic(CLUSTER.model_copy(update={"fabric": None}), 256)


def test_what_is_cut_off_is_named() -> None:
    traffic = layout_traffic(CLUSTER, 256, "ft2", failures=["switch:0"])
    with pytest.raises(ValueError, match=r"--fail switch:0 on ft2: .* GPUs 0, 1, 2, 3, \.\.\. have no path left"):
        traffic.at_once(exchange(64))


def test_what_would_need_too_much_memory_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dovetail.network.delivery.layout_traffic.MOST_BYTES", 2**20)
    with pytest.raises(ValueError, match=r"65,280 flows at once .* more than .* fewer --gpus"):
        layout_traffic(CLUSTER, 256).at_once(exchange(256), "low-latency")
