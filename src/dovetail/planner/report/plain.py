"""Turns plans into plain data for `--json`; every figure is in the unit that stands with it."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from dovetail.planner.figure import Figure, find_figure
from dovetail.planner.on_network import networks_of, simulated
from dovetail.planner.report.launch import launches
from dovetail.planner.request import Answer, Choice
from dovetail.planner.training.plan import TrainingPlan


def as_json(answer: Answer) -> dict[str, Any]:
    request = {name: value for name, value in asdict(answer.request).items() if value not in (None, (), [])}
    return {"request": request, "plans": [_choice_json(answer, choice) for choice in answer.choices]}


def explained_json(answer: Answer, key: str) -> list[dict[str, Any]]:
    """Return the figure `key` on every cluster, with formula, inputs and sources.

    Raises ValueError with near matches for an unknown key.
    """
    found = ((choice.cluster.name, find_figure(choice.figures(), key)) for choice in answer.choices)
    return [
        {"cluster": name, "key": key, **_figure_json(figure), "formula": figure.formula}
        | {"inputs": [asdict(each) for each in figure.inputs]}
        for name, figure in found
    ]


def _choice_json(answer: Answer, choice: Choice) -> dict[str, Any]:
    plan = choice.plan
    record: dict[str, Any] = {"cluster": choice.cluster.name, "gpu": choice.cluster.gpu.name}
    if isinstance(plan, TrainingPlan):
        record |= {"layout": plan.work.layout.model_dump(), "fits": plan.fits}
        record |= {"tried": choice.tried, "fitting": choice.fitting, "memory": [asdict(each) for each in plan.memory]}
        record["front"] = [
            {"layout": each.work.layout.model_dump(), "seconds": each.seconds, "memory": each.memory}
            | ({"varied": each.work.label} if each.work.label else {})
            for each in choice.front
        ]
    else:
        record |= {"prefill": plan.prefill.layout.model_dump(), "decode": plan.decode.layout.model_dump()}
        record["goal"] = plan.goal.model_dump()
    if networks := networks_of(plan):
        exchanges = [
            {"part": each.part, "name": each.name, **asdict(each.seconds), "slowdown": each.seconds.slowdown}
            for each in simulated(plan)
        ]
        record["network"] = {
            "fabrics": [each.fabric.name for each in networks],
            "routing": networks[0].routing,
            "failures": list(networks[0].failures),
            "exchanges": exchanges,
        }
    record["figures"] = {each.key: _figure_json(each) for each in choice.figures()}
    record["launch"] = [asdict(launch) for launch in launches(answer.request, choice)]
    return record


def _figure_json(figure: Figure) -> dict[str, Any]:
    return {"title": figure.title, **asdict(figure.band), "unit": figure.unit}
