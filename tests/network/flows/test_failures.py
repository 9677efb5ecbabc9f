"""Names of failures, and the links that they are."""

import numpy as np
import pytest

from dovetail.catalog.fabrics import load_fabric
from dovetail.network.fabric.topology import NIC, NVLINK, Fabric, build
from dovetail.network.flows.failures import parse_failure, random_links


@pytest.fixture(scope="module")
def fabric() -> Fabric:
    return build(load_fabric("mpft", 64))


def test_a_plane_is_its_switches_links(fabric: Fabric) -> None:
    change = parse_failure("plane:3", fabric)
    assert change.seconds == 0.0 and not change.is_up
    lost_ports = fabric.nic_link[np.isin(fabric.nic_link, change.links)]
    assert len(lost_ports) == 8 and (np.flatnonzero(np.isin(fabric.nic_link[:, 3], lost_ports)) % 8 == 3).all()
    assert len(change.links) == fabric.links / 8 - (fabric.kind == NVLINK).sum() / 8


def test_parts_and_times(fabric: Fabric) -> None:
    assert parse_failure("link:7@0.25", fabric).links.tolist() == [6, 7]
    assert parse_failure("link:7@0.25", fabric).seconds == 0.25
    nic = parse_failure("nic:17@1e-3", fabric)
    assert set(fabric.kind[nic.links]) == {NIC} and len(nic.links) == 2
    assert 17 in fabric.link_from[nic.links]
    switch = parse_failure("switch:0", fabric)
    first = fabric.first_switch
    assert ((fabric.link_from[switch.links] == first) | (fabric.link_to[switch.links] == first)).all()


def test_random_cables_fail_both_ways_and_nvlink_never(fabric: Fabric) -> None:
    lost = random_links(fabric, 0.25)
    cables = (fabric.kind != NVLINK).sum() / 2
    assert len(lost) == 2 * round(cables / 4)
    assert (lost[::2] ^ 1 == lost[1::2]).all()
    assert NVLINK not in fabric.kind[lost]
    assert (lost != random_links(fabric, 0.25, seed=1)).any()
    assert len(random_links(fabric, 0.0)) == 0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("plan:3", "--fail plan:3: unknown part 'plan'; did you mean plane?"),
        ("plane", "expected plane:NUMBER"),
        ("plane:x", "expected plane:NUMBER or plane:NUMBER@SECONDS"),
        ("plane:8", "plane:8: mpft has plane 0 to 7"),
        ("nic:64", "nic:64: mpft has nic 0 to 63"),
        ("link:-1", "link:-1: mpft has link 0"),
        ("plane:0@-1", "--fail plane:0@-1: fails at -1 s"),
        ("plane:0@nan", "--fail plane:0@nan: fails at nan s"),
        ("plane:0@inf", "--fail plane:0@inf: fails at inf s"),
        ("plane:0@soon", "expected plane:NUMBER"),
    ],
)
def test_mistakes(text: str, message: str, fabric: Fabric) -> None:
    with pytest.raises(ValueError, match=message.replace("?", r"\?")):
        parse_failure(text, fabric)


def test_a_share_that_is_none(fabric: Fabric) -> None:
    with pytest.raises(ValueError, match="1.5 of the cables"):
        random_links(fabric, 1.5)
