"""Demands of a question, by name."""

from pathlib import Path

import numpy as np
import pytest

from dovetail.catalog.fabrics import load_fabric
from dovetail.network.ask.jobs import amounts_of, check_task, num_flows, task_of
from dovetail.network.ask.question import BESIDE, EXPERTS, KNOWN, RINGS, Question
from dovetail.network.fabric.topology import build

FABRIC = build(load_fabric("h800-2048", 64))


def question(**changes: object) -> Question:
    return Question(**({"fabrics": ("mpft",)} | changes))  # type: ignore[arg-type]


def asked_for(name: str, **changes: object) -> Question:
    """With what `name` cannot do without."""
    needed = {"stages": 4} if name == "pipeline" else {}
    beside = {"beside": f"{name}:1MiB"} if name not in KNOWN else {"collective": name}
    return question(**needed, **beside, **changes)


@pytest.mark.parametrize("name", BESIDE)
def test_each_name_is_a_demand_of_no_more_flows_than_were_expected(name: str) -> None:
    asked = asked_for(name)
    demand = task_of(asked, name, FABRIC, 16, 64.0).demand
    assert demand.name == name and demand.ranks in (16, 2)
    flows = sum(len(step.flows) for step in demand.steps)
    assert 0 < flows <= num_flows(asked, name, FABRIC, 16)
    check_task(asked, name, FABRIC, 16)


@pytest.mark.parametrize("name", EXPERTS)
def test_low_latency_has_a_flow_for_each_pair(name: str) -> None:
    asked = question(collective=name, mode="low-latency")
    task = task_of(asked, name, FABRIC, 16, 64)
    assert task.copies and task.copies.mode == "low-latency"
    assert 16 * 8 < len(task.demand.steps[0].flows) <= num_flows(asked, name, FABRIC, 16)


@pytest.mark.parametrize("name", RINGS)
def test_rings_have_channels(name: str) -> None:
    two, eight = (task_of(asked_for(name, channels=each), name, FABRIC, 16, 1e6).demand for each in (2, None))
    assert (len(two.steps[0].flows), len(eight.steps[0].flows)) == (2 * 16, 8 * 16)


def test_options_reach_the_demand() -> None:
    one, both = (task_of(asked_for("pipeline", both_ways=way), "pipeline", FABRIC, 16, 1.0) for way in (False, True))
    assert len(both.demand.steps[0].flows) == 2 * len(one.demand.steps[0].flows) == 24
    for senders, expected in ((4, 4), (None, 8)):
        task = task_of(asked_for("kv-transfer", prefill_gpus=senders), "kv-transfer", FABRIC, 16, 1.0)
        assert len(np.unique(task.demand.steps[0].flows.source)) == expected


def test_amounts(tmp_path: Path) -> None:
    assert amounts_of(question()) == (2.0**30,)
    assert amounts_of(question(sizes=(1.0, 2.0))) == (1.0, 2.0)
    assert amounts_of(question(collective="dispatch")) == (4096,)
    assert amounts_of(question(collective="dispatch", tokens=(5, 6))) == (5, 6)
    np.save(tmp_path / "chosen.npy", np.zeros((16, 7, 8), int))
    assert amounts_of(question(collective="combine", recorded=str(tmp_path / "chosen.npy"))) == (7,)
