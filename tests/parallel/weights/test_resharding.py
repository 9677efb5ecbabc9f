"""Who writes which elements: each once, by one who holds it, and gaps and differences named."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from dovetail.parallel.weights.pieces import Piece, Span
from dovetail.parallel.weights.resharding import Held, cut, gap, held, holders_of, share

SHAPES = {"scalar": (), "vector": (7,), "matrix": (3, 5), "empty": (0, 2)}
SIZES = {"scalar": 1, "vector": 7, "matrix": 15, "empty": 0}
RANKS = 4
SPANS = st.tuples(st.integers(0, 15), st.integers(0, 15))


def of(name: str, span: Span) -> Held:
    start, stop = sorted(min(each, SIZES[name]) for each in span)
    return Held(shape=SHAPES[name], dtype=torch.float32, span=(start, stop))


@given(st.lists(st.dictionaries(st.sampled_from(sorted(SHAPES)), SPANS), min_size=RANKS, max_size=RANKS))
def test_each_element_is_written_once_by_a_holder(drawn: list[dict[str, Span]]) -> None:
    by_rank = [{name: of(name, span) for name, span in tensors.items()} for tensors in drawn]
    holders = holders_of(by_rank)
    held_by = {name: [[] for _ in range(SIZES[name])] for name in holders}
    for rank, tensors in enumerate(by_rank):
        for name, each in tensors.items():
            for element in range(*each.span):
                held_by[name][element].append(rank)
    problem = gap(holders)
    lost = [(name, ranks.index([])) for name, ranks in held_by.items() if [] in ranks]
    if lost:
        name, element = lost[0]
        assert problem is not None and f"elements {element} to " in problem and f" of {name}, float32 " in problem
        return
    assert problem is None
    written = {name: [[] for _ in ranks] for name, ranks in held_by.items()}
    for rank, tensors in enumerate(share(holders, RANKS)):
        for name, span in tensors.items():
            for element in range(*span):
                written[name][element].append(rank)
    for name, ranks in written.items():
        assert all(len(each) == 1 and each[0] in there for each, there in zip(ranks, held_by[name], strict=True))
        assert ranks or sum(name in each for each in share(holders, RANKS)) == 1  # without elements: known all the same


def test_replicas_are_written_by_turns() -> None:
    whole = {f"weight {index}": Held(shape=(8,), dtype=torch.float32, span=(0, 8)) for index in range(8)}
    shares = share(holders_of([whole] * RANKS), RANKS)
    assert [len(each) for each in shares] == [2, 2, 2, 2]


def test_ranks_that_differ_are_named() -> None:
    one, other = held({"weight": torch.zeros(2, 3)}), held({"weight": torch.zeros(3, 2)})
    with pytest.raises(ValueError, match=r"^weight is float32 \[2, 3\] on rank 0 and float32 \[3, 2\] on rank 2$"):
        holders_of([one, {}, other])
    with pytest.raises(ValueError, match=r"bfloat16 \[2, 3\] on rank 1"):
        holders_of([one, held({"weight": torch.zeros(2, 3).bfloat16()})])


@pytest.mark.parametrize("leaf", [torch.arange(15).view(3, 5), torch.arange(15).view(5, 3).t()], ids=["rows", "turned"])
def test_a_part_of_a_tensor(leaf: Tensor) -> None:
    part = cut(leaf, (4, 6))
    assert {place: view.tolist() for place, view in part.views.items()} == {
        (0, 4): [[int(leaf[0, 4])]],
        (1, 0): [[int(leaf[1, 0])]],
    }
    assert cut(leaf).views[0, 0] is leaf
    assert cut(Piece(flat=leaf.flatten(), start=0, shape=(3, 5)), (4, 6)).views.keys() == part.views.keys()
