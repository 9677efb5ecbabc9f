"""What one rank says for all."""

from __future__ import annotations

import importlib
import sys
from typing import Any

import pytest

from dovetail.train.layout.peers import OPERATIONS, is_late, is_lost, message, operation, outward

LOST = {"doing": "sum of gradients", "lost": True}


@pytest.mark.parametrize(("reports", "deadline", "said"), [
    ({0: LOST, 2: LOST}, None, "sum of gradients: rank 1 is gone; the same"),
    ({0: LOST}, None, "sum of gradients: ranks 1, 2 are gone; the same"),
    ({0: LOST, 1: LOST, 2: LOST}, None, "sum of gradients: a connection between ranks broke; the same"),
    ({0: LOST, 1: LOST}, 600.0, "sum of gradients: rank 2 did not answer within 600 s; look at its machine, or"),
    ({0: LOST, 1: LOST, 2: {"doing": "checkpoint"}}, 0.5,
     "sum of gradients: a rank did not answer within 0.5 s (rank 2 was at: checkpoint); look"),
])  # fmt: skip
def test_who_is_lost_is_named(reports: dict[int, dict[str, object]], deadline: float | None, said: str) -> None:
    found = message(reports, 0, 3, deadline)
    assert found is not None and found.startswith(said)


def test_nothing_is_added_to_what_a_rank_says_of_its_own_error() -> None:
    assert message({0: LOST, 2: {"own": True}}, 0, 3, None) is None


def test_functions_that_name_an_operation_are_there() -> None:
    for path in OPERATIONS:
        module, names = f"dovetail.{path}", list[str]()
        while True:
            module, _, name = module.rpartition(".")
            names.insert(0, name)
            if module.rpartition(".")[2].islower():
                break
        found: object = importlib.import_module(module)
        for name in names:
            found = getattr(found, name)


def test_an_operation_is_named_by_the_innermost_function_that_has_a_name() -> None:
    assert operation(outward(sys._getframe())) == "work of its own"
    found = list[str]()
    scope: dict[str, Any] = {"__name__": "dovetail.train.layout.ranks"}
    exec("def any_rank(look):\n    look()\n", scope)
    scope["any_rank"](lambda: found.append(operation(outward(sys._getframe()))))
    assert found == ["vote on whether to stop"]


def test_errors_of_gloo_are_told_from_others() -> None:
    closed = RuntimeError("[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer")
    late = RuntimeError("[/gloo/transport/tcp/unbound_buffer.cc:81] Timed out waiting 3000ms for recv operation")
    assert is_lost(closed) and not is_late(closed)
    assert is_lost(late) and is_late(late)
    assert not is_lost(ValueError("train.steps"))
