"""The picture of a comparison, of every kind."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import matplotlib.image
import pytest

from dovetail.train.compare.pairs import HeldOutPair, Record
from dovetail.train.compare.picture import draw
from dovetail.train.compare.sides import Comparison
from dovetail.train.compare.summary import summarize

Compared = Callable[..., Comparison]
RecordsOf = Callable[..., list[Record]]
Curves = Sequence[Sequence[float]]


@pytest.mark.parametrize("curves", [[[0.01]], [[0.001, -0.002, 0.003]] * 3, [[math.nan] * 3, [0.0, 0.1, math.nan]]])
@pytest.mark.parametrize(
    ("b", "height"),  # losses, differences, MTP; other batches: losses, held-out text
    [({"precision": "deepseek-v3"}, 1386), ({"seed": 3}, 990)],
)
def test_the_picture_is_whole(
    curves: Curves, b: dict[str, object], height: int, compared: Compared, records_of: RecordsOf, tmp_path: Path
) -> None:
    what = compared(b=b, steps=len(curves[0]))
    records = []
    for seed in range(len(curves)):
        records += [each for each in records_of(curves, curves) if each.seed == seed]
        records += [HeldOutPair(seed=seed, text=text, a=2.0, b=2.1) for text in what.held_out]
    draw(summarize(what, records), records, tmp_path / "new" / "compare.png")
    assert matplotlib.image.imread(tmp_path / "new" / "compare.png").shape == (height, 1350, 4)
    assert [each.name for each in (tmp_path / "new").iterdir()] == ["compare.png"]
