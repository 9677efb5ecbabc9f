"""Steps on the shares of four ranks against AdamW of one process: every bit, and every byte."""

from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from rank_processes import Ranks
from shares_on_ranks import RANKS_PER_NODE, STEPS, Case, Result, Whole, given_in_turns, on_one, on_ranks, weights_before

from dovetail.cost.ops.ops import Collective
from dovetail.network.demands.closed_forms import collective_bytes
from dovetail.network.demands.collectives import in_rings
from dovetail.numerics.formats.errors import tolerance
from dovetail.parallel.weights.holders import blocks_of, rank_sets, weights_of
from dovetail.parallel.weights.legs import cut_legs
from dovetail.spec.layout import Layout
from dovetail.spec.model import ModelSpec

SpecFactory = Callable[..., ModelSpec]
LAYOUTS = [
    Layout(dp=4),
    Layout(dp=4, ep=2),
    Layout(dp=4, ep=4),
    Layout(pp=2, dp=2, ep=2),
    Layout(pp=2, dp=2, schedule="interleaved", microbatches=2),
    Layout(pp=2, dp=2, ep=2, schedule="dualpipe", microbatches=4),
    Layout(pp=4, dp=1),
]
CUT = Layout(dp=4, ep=2)
PIPELINE = Layout(pp=2, dp=2, ep=2)


def without_zero(layout: Layout) -> Layout:
    return layout.model_copy(update={"zero": 0})


def spec_of(tiny_spec: SpecFactory) -> ModelSpec:
    return tiny_spec(num_hidden_layers=4)


def run(ranks: Ranks, spec: ModelSpec, cases: list[Case]) -> list[tuple[list[Result], Whole]]:
    alone = ranks.run(on_one, spec, [case.layout for case in cases])[0]  # first: one rank compiles the kernels for all
    by_rank = ranks.run(on_ranks, spec, cases)
    return [([results[index] for results in by_rank], alone[index]) for index in range(len(cases))]


def is_right(spec: ModelSpec, layout: Layout, results: list[Result], whole: Whole) -> bool:
    """Whether all ranks have the bits of one process, in weights and state."""
    weights = weights_of(spec, layout)
    for rank, result in enumerate(results):
        for name, block in blocks_of(weights, layout, rank).items():
            expected = whole.weights[name].flatten()[block.start : block.start + block.length]
            if not torch.equal(result.weights[name], expected):
                return False
    return all(
        torch.equal(piece.flat, whole.state[part][name].flatten()[piece.start : piece.start + len(piece.flat)])
        for result in results
        for part, pieces in result.state.items()
        for name, piece in pieces.items()
    )


def times_held(results: list[Result], part: str, whole: Whole) -> set[int]:
    """How many ranks have an element of the state."""
    found = set()
    for name, tensor in whole.state[part].items():
        counts = torch.zeros(tensor.numel(), dtype=torch.int64)
        for result in results:
            if name in result.state[part]:
                piece = result.state[part][name]
                assert piece.shape == tensor.shape
                counts[piece.start : piece.start + len(piece.flat)] += 1
        found.update(counts.tolist())
    return found


def test_ranks_step_as_one_process_does(ranks: Ranks, tiny_spec: SpecFactory) -> None:
    """Sums are in the order of a node's ranks and then of nodes, with and without ZeRO-1."""
    spec = spec_of(tiny_spec)
    cases = [Case(layout=each, bucket=40_000) for layout in LAYOUTS for each in (layout, without_zero(layout))]
    for case, (results, whole) in zip(cases, run(ranks, spec, cases), strict=True):
        layout = case.layout
        assert is_right(spec, layout, results, whole), layout
        assert (max(each.buckets for each in results) > 2) == (layout.dp > 1), layout
        (norms,) = {tuple(each.norms) for each in results}  # the same bits
        assert norms == pytest.approx(whole.norms, rel=tolerance(torch.float32, terms=4096)), layout
        for part in whole.state:
            held = times_held(results, part, whole)
            assert held == {1} if layout.zero else held <= {1, 2, 4}, (layout, part)


def predicted(spec: ModelSpec, layout: Layout) -> list[tuple[int, int]]:
    """Bytes that each rank sends over the NIC and inside its node: the closed form of the planner's collectives."""
    weights, sizes = (
        weights_of(spec, layout),
        {name: each.element_size() for name, each in weights_before(spec).items()},
    )
    sent = np.zeros((layout.gpus, 2))
    for ranks in rank_sets(weights, layout):
        blocks = {name: each for name, each in blocks_of(weights, layout, ranks[0]).items() if each.ranks == ranks}
        filled = {name: len(ranks) * -(-each.length // len(ranks)) for name, each in blocks.items()}
        if len(ranks) > 1:
            wide, narrow = 4 * sum(filled.values()), sum(sizes[name] * count for name, count in filled.items())
            names = {"reduce_scatter": wide, "all_gather": narrow} if layout.zero else {"all_reduce": wide}
            for name, size in names.items():
                op = Collective(
                    name=name, pass_="wgrad", bytes=size, ranks=len(ranks), stride=ranks[1] - ranks[0], part="step"
                )
                each = collective_bytes(op, RANKS_PER_NODE)
                sent[list(ranks)] += STEPS * np.array([each.scale_out, each.scale_up])
    [ring] = in_rings("all-gather", [np.arange(layout.gpus)], 8 * layout.gpus).steps  # of the norm
    is_near = ring.flows.source // RANKS_PER_NODE == ring.flows.destination // RANKS_PER_NODE
    np.add.at(sent, (ring.flows.source, is_near.astype(int)), STEPS * ring.times * ring.flows.bytes)
    return [(int(nic), int(node)) for nic, node in sent]


def test_bytes_are_those_of_the_closed_forms(ranks: Ranks, tiny_spec: SpecFactory) -> None:
    spec = spec_of(tiny_spec)
    cases = [Case(layout=each) for layout in LAYOUTS for each in (layout, without_zero(layout))]
    for case, results in zip(cases, zip(*ranks.run(on_ranks, spec, cases), strict=True), strict=True):
        assert [(each.nic, each.node) for each in results] == predicted(spec, case.layout), case.layout


def test_sums_start_while_gradients_come_and_wait_for_nobody(ranks: Ranks, tiny_spec: SpecFactory) -> None:
    for half, given, finished in ranks.run(given_in_turns, spec_of(tiny_spec), CUT):
        assert 0 < half < given == finished


@pytest.mark.parametrize("zero", [0, 1])
@pytest.mark.parametrize(
    ("layout", "twin"),
    [
        (CUT, "experts over dp"),
        (PIPELINE, "copies apart"),
        (CUT, "norm of one group"),
        (CUT, "node twice"),
        (CUT, "directly"),
    ],
    ids=["experts over dp", "copies apart", "norm of one group", "node twice", "directly"],
)
def test_what_is_broken_is_seen(layout: Layout, twin: str, zero: int, ranks: Ranks, tiny_spec: SpecFactory) -> None:
    spec, layout = spec_of(tiny_spec), layout.model_copy(update={"zero": zero})
    (results, whole), (broken, _) = run(ranks, spec, [Case(layout=layout), Case(layout=layout, twin=twin)])
    within = pytest.approx(whole.norms[0], rel=tolerance(torch.float32, terms=4096))
    assert is_right(spec, layout, results, whole)
    assert results[0].norms[0] == within
    assert is_right(spec, layout, broken, whole) == (twin == "norm of one group")
    assert all((each.norms[0] == within) == (twin == "directly") for each in broken)
    more = sum(each.nic for each in broken) - sum(each.nic for each in results)
    assert (more > 0) == (twin == "directly")


@pytest.mark.parametrize(
    ("ranks", "ranks_per_node", "expected"),
    [
        (range(4), 2, [[(0, 1), (2, 3)], [(0, 2), (1, 3)]]),
        (range(6), 3, [[(0, 1, 2), (3, 4, 5)], [(0, 3), (1, 4), (2, 5)]]),
        ((0, 2, 4, 6), 4, [[(0, 2), (4, 6)], [(0, 4), (2, 6)]]),  # the same experts
        (range(4), 4, [[(0, 1, 2, 3)]]),
        ((0, 2), 2, [[(0, 2)]]),
        ((3, 4, 5), 4, [[(3, 4, 5)]]),  # one on its node, two on theirs: directly
        ((1, 2, 3, 4, 5, 6), 4, [[(1, 2, 3), (4, 5, 6)], [(1, 4), (2, 5), (3, 6)]]),
    ],
)
def test_legs_are_nodes_and_rails(ranks: Sequence[int], ranks_per_node: int, expected: list[list[tuple[int]]]) -> None:
    assert [list(map(tuple, leg.tolist())) for leg in cut_legs(ranks, ranks_per_node)] == expected
