"""Plans whose exchanges are simulated: the same as closed forms where the network has room, slower where it has not."""

from __future__ import annotations

import json

import pytest

from dovetail.planner.on_network import networks_of, simulated
from dovetail.planner.report.html import page
from dovetail.planner.report.plain import as_json
from dovetail.planner.report.tables import tables
from dovetail.planner.request import Answer, Request, answer
from dovetail.planner.serving.plan import ServingPlan
from dovetail.planner.training.plan import TrainingPlan

FIXED = {"pp": 16, "ep": 64, "tp": 1, "schedule": "dualpipe", "microbatch_size": 1}


def training(**options: object) -> Answer:
    plain = {"model": "deepseek-v3", "clusters": ["h800-2048"], "goal": "train", "batch": "7680", "gpus": 1024}
    return answer(Request(**{**plain, **FIXED, **options}))  # type: ignore[arg-type]


def plan_of(found: Answer) -> TrainingPlan:
    plan = found.choices[0].plan
    assert isinstance(plan, TrainingPlan)
    return plan


@pytest.fixture(scope="module")
def closed() -> TrainingPlan:
    return plan_of(training())


def test_planes_with_room_take_what_closed_forms_say(closed: TrainingPlan) -> None:
    plan = plan_of(training(network="simulate"))
    assert [str(each) for each in networks_of(plan)] == ["mpft, adaptive"] and not networks_of(closed)
    # Some send to another leaf, the first does not: 0.9 us more of a send's 738.
    assert plan.step_seconds.value == pytest.approx(closed.step_seconds.value, rel=1e-5)
    assert [each.seconds.slowdown for each in simulated(plan)] == pytest.approx([1.0] * len(simulated(plan)), rel=1e-2)


def test_a_plane_that_is_down_costs_time_in_every_exchange_between_nodes(closed: TrainingPlan) -> None:
    plan = plan_of(training(network="simulate", fail=["plane:3"]))
    assert plan.step_seconds.value > 1.01 * closed.step_seconds.value
    for each in simulated(plan):
        assert each.seconds.slowdown > 1.01, each
        if each.name.startswith(("dispatch", "combine")):  # seven NICs do the work of eight
            assert each.seconds.slowdown == pytest.approx(8 / 7, rel=0.01)
    assert plan.parts.optimizer.value > closed.parts.optimizer.value
    assert plan.parts.pair.value > closed.parts.pair.value


def test_finalists_are_ordered_by_what_they_take_on_the_network() -> None:
    found = training(pp=None, schedule=None, network="simulate", fabric="ft2", routing="ecmp").choices[0]
    steps = [found.plan.step_seconds.value, *(each.step_seconds.value for each in found.others)]  # type: ignore[union-attr]
    assert len(steps) > 4 and steps == sorted(steps)
    by_closed_forms = [each.seconds for each in found.front]
    assert by_closed_forms[0] < steps[0]


def test_report_and_json_say_what_was_simulated() -> None:
    found = training(network="simulate", fail=["plane:3"])
    head, *rest = tables(found)
    (about,) = (row[1] for row in head.rows if row[0] == "network")
    assert about.startswith("simulated on mpft, adaptive, without plane:3; by closed forms the step would take")
    table = rest[-1]
    assert [row[1] for row in table.rows][:2] == ["dispatch, forward", "combine, forward"]
    network = json.loads(json.dumps(as_json(found)))["plans"][0]["network"]
    assert network["failures"] == ["plane:3"] and len(network["exchanges"]) == len(table.rows)
    assert table.title in page(found) and table.title not in page(training())
    assert "network" not in as_json(training())["plans"][0]


def test_serving_keeps_its_speed_with_fewer_requests() -> None:
    plain = {
        "model": "deepseek-v3",
        "clusters": ["h800-2048"],
        "gpus": 288,
        "goal": "serve",
        "context": "4989",
        "output_speed": "20",
    }
    pools = {"ep": 144, "prefill_ep": 32}
    closed, lost = (
        answer(Request(**plain, **pools, **more)).choices[0].plan  # type: ignore[arg-type]
        for more in ({}, {"network": "simulate", "fail": ["plane:0", "plane:1", "plane:2", "plane:3"]})
    )
    assert isinstance(closed, ServingPlan) and isinstance(lost, ServingPlan)
    assert lost.decode.speed.value >= 20 and lost.decode.requests < closed.decode.requests
    assert lost.prefill.step_seconds.value > closed.prefill.step_seconds.value
    assert {each.part for each in simulated(lost)} == {"prompts", "outputs"}


def test_clusters_side_by_side_say_on_what_and_what_was_varied() -> None:
    found = training(
        clusters=["h800-2048", "gb300-nvl72"],
        model="deepseek-v2-lite",
        batch="1536",
        gpus=64,
        pp=8,
        ep=8,
        vary=["precision=bf16"],
        network="simulate",
    )
    (table,) = tables(found)
    rows = {name: texts for name, *texts in table.rows}
    assert rows["simulated on"] == ["mpft, adaptive", "ft2, adaptive"]
    assert all("bf16" in text for text in rows["layout"])


def test_pools_on_two_clusters_are_on_two_networks() -> None:
    plain = {"model": "deepseek-v3", "clusters": ["h800-2048"], "goal": "serve", "context": "4989"}
    pools = {"decode_cluster": "gb200-nvl72", "ep": 64, "prefill_ep": 32}
    found = answer(Request(**plain, **pools, network="simulate"))  # type: ignore[arg-type]
    head, *rest = tables(found)
    assert ("network", "simulated on mpft, adaptive and ft2, adaptive") in head.rows
    assert rest[-1].title == "exchanges simulated on mpft, adaptive and ft2, adaptive (links only, no kernels)"
    assert as_json(found)["plans"][0]["network"]["fabrics"] == ["mpft", "ft2"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"network": "simulated"}, "--network simulated: did you mean simulate"),
        ({"fail": ["plane:3"]}, "--fail is for --network simulate"),
        ({"routing": "ecmp"}, "--routing is for --network simulate"),
        ({"network": "simulate", "clusters": ["template.toml"]}, "template.toml"),
    ],
)
def test_options_that_do_not_fit(options: dict[str, object], message: str) -> None:
    with pytest.raises((ValueError, OSError), match=message):
        training(**options)
