"""Sends between parts of the GPUs: by hand, and what everyone must have in the end."""

from collections import defaultdict

import numpy as np
import pytest

from dovetail.catalog.fabrics import load_fabric
from dovetail.network.delivery.deliver import deliver
from dovetail.network.demands.collectives import Demand
from dovetail.network.demands.transfers import host_copy, kv_transfer, node_all_gather, pipeline
from dovetail.network.fabric.topology import build
from dovetail.network.routing.route import Adaptive


def sent(demand: Demand) -> dict[tuple[int, int], float]:
    """Bytes by source and destination, of all repetitions."""
    found: dict[tuple[int, int], float] = defaultdict(float)
    for step in demand.steps:
        for source, destination, each in zip(step.flows.source, step.flows.destination, step.flows.bytes, strict=True):
            found[int(source), int(destination)] += step.times * float(each)
    return found


def test_each_stage_sends_to_its_like_in_the_next() -> None:
    forward = {(0, 2): 7.0, (1, 3): 7.0, (2, 4): 7.0, (3, 5): 7.0}
    assert sent(pipeline(range(6), 7.0, 3)) == forward
    both = pipeline(range(6), 7.0, 3, both_ways=True)
    assert sent(both) == forward | {(other, one): 7.0 for one, other in forward}


@pytest.mark.parametrize(("stages", "times"), [(2, 1), (4, 2)])
def test_both_ways_share_the_nics_of_the_middle_stages(stages: int, times: int) -> None:
    fabric = build(load_fabric("mpft", 64))
    one, both = (deliver(fabric, pipeline(range(64), 1e9, stages, way), Adaptive()).seconds for way in (False, True))
    assert one == pytest.approx(1e9 / 40e9, rel=1e-3) and both == pytest.approx(times * one, rel=1e-3)


@pytest.mark.parametrize(
    ("senders", "receivers"), [(8, 8), (8, 24), (24, 8), (3, 5), (5, 3), (1, 7), (7, 1), (16, 24), (6, 4)]
)
def test_caches_are_cut_so_that_all_get_the_same(senders: int, receivers: int) -> None:
    flows = sent(kv_transfer(range(senders + receivers), 12.0, senders, 8))
    out, into = defaultdict(float), defaultdict(float)
    for (source, destination), each in flows.items():
        assert source < senders <= destination and each > 0
        out[source] += each
        into[destination] += each
    assert [out[gpu] for gpu in range(senders)] == pytest.approx([12.0] * senders)
    assert [into[senders + gpu] for gpu in range(receivers)] == pytest.approx([12.0 * senders / receivers] * receivers)
    assert len(flows) <= senders + receivers - np.gcd(senders, receivers)


def test_caches_keep_to_their_rail() -> None:
    """Between whole nodes every GPU sends to its own index."""
    assert all(source % 8 == destination % 8 for source, destination in sent(kv_transfer(range(32), 1.0, 8, 8)))


def test_nodes_gather_by_themselves() -> None:
    """Three GPUs of the second node take two steps, eight take seven, of their own parts."""
    fabric = build(load_fabric("mpft", 64))
    found = sent(node_all_gather(fabric, range(11), 24.0))
    assert {source // 8 == destination // 8 for source, destination in found} == {True}
    assert found[0, 1] == pytest.approx(24.0 * 7 / 8) and found[8, 9] == found[10, 8] == pytest.approx(24.0 * 2 / 3)
    whole = node_all_gather(fabric, range(16), 1.6e9)
    assert deliver(fabric, whole, Adaptive()).seconds == pytest.approx(1.6e9 * 7 / 8 / 160e9, rel=2e-2)


def test_hosts_copy_over_pcie() -> None:
    fabric = build(load_fabric("h800-2048", 64))
    delivery = deliver(fabric, host_copy(fabric, range(16), 5.5e9), Adaptive())
    assert delivery.seconds == pytest.approx(5.5e9 / 55e9, rel=1e-3)
    assert (delivery.link_bytes > 0).sum() == 2 * 16


def test_mistakes() -> None:
    mpft = build(load_fabric("mpft", 64))
    with pytest.raises(ValueError, match="64 GPUs do not make 5 equal stages: use --stages 4, or --gpus 65"):
        pipeline(range(64), 1.0, 5)
    with pytest.raises(ValueError, match="7 GPUs do not make 3 equal stages: use --stages 7, or --gpus 6"):
        pipeline(range(7), 1.0, 3)
    with pytest.raises(ValueError, match="a pipeline has 2 or more"):
        pipeline(range(64), 1.0, 1)
    with pytest.raises(ValueError, match="use --prefill-gpus 1 to 63"):
        kv_transfer(range(64), 1.0, 64)
    with pytest.raises(ValueError, match="mpft has no PCIe; use --fabric h800-2048"):
        host_copy(mpft, range(8), 1.0)
    with pytest.raises(ValueError, match="no two of these GPUs of mpft share a node"):
        node_all_gather(mpft, [0, 8], 1.0)
