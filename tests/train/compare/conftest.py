"""Comparisons of a tiny model's runs, and records as a log has them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from dovetail.train.compare.pairs import Pair, Record, SideStep
from dovetail.train.compare.sides import Comparison, comparison
from dovetail.train.run.run_file import RunConfig

Curves = Sequence[Sequence[float]]  # differences by seed and step


@pytest.fixture
def base(tmp_path: Path, text: Path, tiny_run: Callable[..., RunConfig]) -> Callable[..., RunConfig]:
    """`base(key=value)`: four steps of a tiny model in BF16; changes go into [train]."""
    return lambda **changes: tiny_run(tmp_path / "run", text, **{"steps": 4, "dtype": "bfloat16", **changes})


@pytest.fixture
def compared(base: Callable[..., RunConfig], tmp_path: Path) -> Callable[..., Comparison]:
    """`compared(b={"precision": "deepseek-v3"}, name="pairs", key=value)`: A has the values, B some others as well."""

    def build(b: dict[str, object] | None = None, name: str = "pairs", **changes: object) -> Comparison:
        other = b or {"precision": "deepseek-v3"}
        return comparison(base(**changes), base(**{**changes, **other}), out=tmp_path / name)

    return build


@pytest.fixture(scope="session")
def records_of() -> Callable[..., list[Record]]:
    """`records_of(curves)`: A's losses are 2, and B's differ by `curves`, of seeds and steps; so do those of one MTP
    depth by `mtp`, if that is given."""

    def build(curves: Curves, mtp: Curves = ()) -> list[Record]:
        records: list[Record] = []
        for seed, curve in enumerate(curves):
            for step, difference in enumerate(curve, start=1):
                depth = [2.0 * (1.0 + mtp[seed][step - 1])] if mtp else []
                a = SideStep(tokens=64 * step, loss=2.0, mtp=[2.0] * len(depth), skipped=False, seconds=0.1)
                loss = 2.0 * (1.0 + difference)
                b = SideStep(tokens=64 * step, loss=loss, mtp=depth, skipped=math.isnan(difference), seconds=0.15)
                records.append(Pair(seed=seed, step=step, a=a, b=b))
        return records

    return build
