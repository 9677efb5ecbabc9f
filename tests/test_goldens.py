"""Figures that no change may alter unseen: `goldens.json` has them, `python tests/test_goldens.py` writes it anew.

Plans, networks and counts are arithmetic in FP64 and the same on every machine. Losses of a few training steps are the
same up to the rounding of FP32. To compare two checkouts bit by bit on one machine, run benchmarks/same_bits.py.
"""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from dovetail.catalog.presets import model_names
from dovetail.cost.inspect import as_json, inspect
from dovetail.model.transformer import Transformer, initialize
from dovetail.network.ask.ask import ask
from dovetail.network.ask.question import Question
from dovetail.network.ask.report import as_json as answer_as_json
from dovetail.numerics.formats.errors import network_terms, tolerance
from dovetail.planner.request import Request, answer
from dovetail.spec.family import Dial, dovetail_spec
from dovetail.text.corpus import Batch
from dovetail.train.step.optim import AdamW, AdamWConfig
from dovetail.train.step.schedule import Position, load_schedule, values
from dovetail.train.step.step import Objective, train_step

GOLDENS = Path(__file__).with_name("goldens.json")
STEPS, LENGTH = 3, 32
SPEC = dovetail_spec(Dial(width=128, layers=3, experts=8, vocab_size=320))
V3 = {"model": "deepseek-v3", "clusters": ["h800-2048"]}
PLANS = {
    "train": {"goal": "train", "batch": "15360", "pp": 16, "ep": 64, "tp": 1, "schedule": "dualpipe"},
    "train, searched": {"goal": "train", "batch": "1024", "gpus": 256},
    "serve": {"goal": "serve", "context": "4989", "output_speed": "20"},
}

Flat = dict[str, float | str]


def flat(value: object, name: str = "") -> Flat:
    """Numbers and texts of nested plain data by their path."""
    if isinstance(value, dict):
        return {key: leaf for part in value for key, leaf in flat(value[part], f"{name}/{part}").items()}
    if isinstance(value, list | tuple):
        return {key: leaf for i, each in enumerate(value) for key, leaf in flat(each, f"{name}/{i}").items()}
    return {name: value} if isinstance(value, int | float | str) else {}


def counts() -> Flat:
    return {key: leaf for name in model_names() for key, leaf in flat(as_json(inspect(name, 4096)), name).items()}


def plans() -> Flat:
    found: Flat = {}
    for name, changes in PLANS.items():
        (choice,) = answer(Request(**V3, **changes)).choices
        found |= {f"{name}/{figure.key}": figure.band.value for figure in choice.figures()}
    return found


def networks() -> Flat:
    question = Question(fabrics=("mpft", "ft3"), gpu_counts=(64,), sizes=(1e6, 1e9), failures=("nic:3",))
    return flat(answer_as_json(ask(question)))


def losses() -> Flat:
    model = Transformer(SPEC, torch.float32)
    initialize(model, seed=0)
    optimizer = AdamW(model.named_parameters(), AdamWConfig())
    found: Flat = {}
    for step in range(1, STEPS + 1):
        numbers = torch.arange(4 * (LENGTH + 1)).view(4, -1)
        tokens = (numbers * numbers + step * numbers) % SPEC.vocab_size
        now = values(load_schedule("short"), Position(step=step, fraction=step / STEPS))
        batch = Batch(tokens=tokens, document_ids=torch.zeros_like(tokens, dtype=torch.int32))
        result = train_step(model, optimizer, [batch], now, Objective())
        found |= {f"{step}/{name}": getattr(result, name) for name in ("loss", "mtp_loss", "grad_norm")}
    return found


FINDERS: dict[str, tuple[Callable[[], Flat], float]] = {
    "counts": (counts, 1e-12),
    "plans": (plans, 1e-9),
    "networks": (networks, 1e-9),
    "losses": (losses, tolerance(torch.float32, roundings=STEPS, terms=STEPS * network_terms(SPEC, LENGTH))),
}


@pytest.mark.parametrize("kind", FINDERS)
def test_nothing_has_changed(kind: str) -> None:
    find, error = FINDERS[kind]
    found, golden = find(), json.loads(GOLDENS.read_text())[kind]
    assert found.keys() == golden.keys()
    for name, value in found.items():
        expected = golden[name]
        assert value == (expected if isinstance(expected, str) else pytest.approx(expected, rel=error)), name


def test_a_small_change_is_found() -> None:
    """The limit on losses lies below what an idea changes: a thousandth."""
    golden, error = json.loads(GOLDENS.read_text())["losses"], FINDERS["losses"][1]
    assert all(value * (1 + 1e-3) != pytest.approx(value, rel=error) for value in golden.values())


if __name__ == "__main__":
    GOLDENS.write_text(json.dumps({kind: find() for kind, (find, _) in FINDERS.items()}, indent=0) + "\n")
