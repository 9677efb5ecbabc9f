"""Copies of tokens: counted one by one, against the closed form, and the paper's numbers of nodes."""

import numpy as np
import pytest

from dovetail.catalog.fabrics import load_fabric
from dovetail.cost.ops.ops import Exchange
from dovetail.network.delivery.deliver import most_messages
from dovetail.network.demands.closed_forms import exchange_bytes
from dovetail.network.demands.experts import Experts, combine, counted_copies, dispatch, sample_choices
from dovetail.network.fabric.topology import build


def experts_of(ranks: int, chosen: np.ndarray, experts: int = 256, gpus_per_node: int = 8) -> Experts:
    gpus = np.arange(ranks, dtype=np.int32)
    return Experts(gpus=gpus, gpus_per_node=gpus_per_node, experts=experts, chosen=chosen)


def copies_one_by_one(experts: Experts) -> dict[tuple[int, int], float]:
    """Source, destination -> copies, as the docstring has it, token by token."""
    ranks = len(experts.gpus)
    per_rank, within = experts.experts // ranks, min(experts.gpus_per_node, ranks)
    copies: dict[tuple[int, int], float] = {}
    for source in range(ranks):
        for token in experts.chosen[source]:
            targets = {int(expert) // per_rank for expert in token if expert >= 0}
            for node in {rank // within for rank in targets}:
                via = node * within + source % within
                hops = {(source, via)} | {(via, rank) for rank in targets if rank // within == node}
                for hop in hops:
                    if hop[0] != hop[1]:
                        copies[hop] = copies.get(hop, 0) + 1
    return copies


@pytest.mark.parametrize(("ranks", "gpus_per_node"), [(8, 8), (16, 8), (16, 4), (4, 8)])
def test_dispatch_copies_once_per_node_and_once_per_rank(ranks: int, gpus_per_node: int) -> None:
    random = np.random.default_rng(ranks)
    chosen = random.integers(-1, 32, (ranks, 11, 4))
    experts = experts_of(ranks, chosen, 32, gpus_per_node)
    flows = dispatch(experts, 10.0).steps[0].flows
    found: dict[tuple[int, int], float] = {}
    for source, destination, bytes in zip(flows.source, flows.destination, flows.bytes, strict=True):
        key = int(source), int(destination)
        found[key] = found.get(key, 0) + bytes / 10
    assert found == copies_one_by_one(experts)


def test_low_latency_sends_one_message_per_expert() -> None:
    chosen = np.array([[[0, 1, 5]], [[7, 6, 4]]])  # four experts per rank
    flows = dispatch(experts_of(2, chosen, 8, 1), 10.0, "low-latency").steps[0].flows
    assert (flows.source.tolist(), flows.destination.tolist(), flows.bytes.tolist()) == ([0], [1], [10.0])
    chosen = np.array([[[4, 1, 5]], [[3, 2, 4]]])
    flows = dispatch(experts_of(2, chosen, 8, 1), 10.0, "low-latency").steps[0].flows
    assert flows.bytes.tolist() == [20.0, 20.0]


def test_messages_are_those_that_deepep_posts() -> None:
    """A token to eight experts on two nodes, one per rank; low latency: a message each, and one for each expert's
    count; normal: chunks of eight tokens to the other node."""
    chosen = np.tile(np.arange(0, 16, 2), (16, 20, 1))  # one expert per rank
    fabric = build(load_fabric("mpft", 16))
    for mode, to_each, ranks_reached in (("low-latency", 20 + 1, 4), ("normal", 3, 1)):
        for demand in (dispatch, combine):
            step = demand(experts_of(16, chosen, 16), 10.0, mode).steps[0]  # type: ignore[arg-type]
            assert step.posted_by == ("gpu" if mode == "low-latency" else "host")
            if demand is dispatch:
                assert most_messages(fabric, step) == to_each * ranks_reached


def test_groups_by_their_best_or_their_two_best() -> None:
    """With 2 groups of 2 and one kept, the best of all is among the chosen if groups go by their best alone."""
    for count, is_always in ((1, True), (2, False)):
        best = sample_choices(1, 2000, 1, 4, 1, 1, best_of_group=count)[0, :, 0]
        kept = sample_choices(1, 2000, 1, 4, 2, 1, best_of_group=count)[0, :, 0]
        assert (best == kept).all() == is_always


def test_combine_is_the_way_back() -> None:
    experts = experts_of(16, np.random.default_rng(0).integers(0, 256, (16, 5, 8)))
    there, back = dispatch(experts, 7.0).steps[0].flows, combine(experts, 14.0).steps[0].flows
    assert (there.source == back.destination).all() and (there.destination == back.source).all()
    assert back.bytes == pytest.approx(2 * there.bytes)


@pytest.mark.parametrize("mode", ["normal", "low-latency"])
@pytest.mark.parametrize("ranks", [8, 16, 64])
def test_a_sampled_gate_sends_what_the_closed_form_says(ranks: int, mode: str) -> None:
    chosen = sample_choices(ranks, 512, 8, 256)
    flows = dispatch(experts_of(ranks, chosen), 1.0, mode).steps[0].flows
    is_inside = flows.source // 8 == flows.destination // 8
    exchange = Exchange(
        name="dispatch", pass_="forward", tokens=512, bytes_per_copy=1, choices=8, experts=256, ranks=ranks
    )
    expected = exchange_bytes(exchange, 8, mode)
    assert flows.bytes[is_inside].sum() / ranks == pytest.approx(expected.scale_up, rel=0.02)
    assert flows.bytes[~is_inside].sum() / ranks == pytest.approx(expected.scale_out, rel=0.02)


@pytest.mark.parametrize(("ranks", "gpus_per_node", "bins"), [(16, 8, 2), (8, 8, 8), (4, 1, 4)])
def test_deepep_counts_the_own_node_too(ranks: int, gpus_per_node: int, bins: int) -> None:
    """One by one: sets of nodes, or of GPUs where there is one node; low-latency all choices."""
    chosen = np.random.default_rng(ranks).integers(-1, 32, (ranks, 7, 4))
    experts = experts_of(ranks, chosen, 32, gpus_per_node)
    tokens = [[int(expert) for expert in token if expert >= 0] for token in chosen.reshape(-1, 4)]
    counted = sum(len({expert // (32 // bins) for expert in token}) for token in tokens)
    assert counted_copies(experts) == pytest.approx(counted / ranks)
    assert counted_copies(experts, "low-latency") == pytest.approx(sum(map(len, tokens)) / ranks)


def test_group_limited_tokens_reach_four_nodes_and_others_5_29() -> None:
    """[V3 §3.2.2, ISCA §4.3]: M = 4 of 8 groups, a group per node; without, the mean is 5.29 of 8."""
    for groups, kept, expected in ((8, 4, 4.0), (1, 1, 5.29)):
        chosen = sample_choices(1, 20000, 8, 256, groups, kept)[0]
        nodes = np.sort(chosen // 32, axis=1)
        distinct = 1 + (np.diff(nodes, axis=1) != 0).sum(axis=1)
        assert distinct.max() <= (4 if kept == 4 else 8)
        assert distinct.mean() == pytest.approx(expected, abs=0.1 if kept == 4 else 0.02)
        assert all(len(set(token)) == 8 for token in chosen[:100].tolist())


def test_groups_are_worth_their_best_score_or_the_sum_of_two() -> None:
    """One of two groups is kept. V2's walk down the ranking keeps the group of the best expert, so that its two experts
    are the best and another; by the sum of two it is kept less often."""
    popularity = np.array([20.0, 0.01, 0.01, 0.01, 1.0, 1.0, 1.0, 1.0])
    share = [
        (sample_choices(1, 20000, 2, 8, 2, 1, popularity, best_of_group=best)[0] < 4).all(axis=1).mean()
        for best in (1, 2)
    ]
    assert share[0] == pytest.approx(20.03 / 24.03, abs=0.01)
    assert share[1] < share[0] - 0.05


def test_popular_experts_are_chosen_more_often() -> None:
    popularity = np.ones(16)
    popularity[3] = 15.0
    chosen = sample_choices(1, 20000, 1, 16, popularity=popularity)
    assert (chosen == 3).mean() == pytest.approx(0.5, abs=0.02)


def test_no_tokens_is_no_flows() -> None:
    assert len(dispatch(experts_of(16, np.zeros((16, 0, 8), int)), 1.0).steps[0].flows) == 0


def test_mistakes() -> None:
    with pytest.raises(ValueError, match="experts = 10 over 16 ranks: use a multiple of 16"):
        experts_of(16, np.zeros((16, 1, 8), int), 10)
    with pytest.raises(ValueError, match="chosen experts 0 to 256: there are 256"):
        experts_of(16, np.full((16, 1, 2), [0, 256]))
    with pytest.raises(ValueError, match="expected .16 ranks, tokens, choices"):
        experts_of(16, np.zeros((8, 1, 8), int))
    with pytest.raises(ValueError, match="12 ranks on nodes of 8"):
        experts_of(12, np.zeros((12, 1, 8), int), 24)
    with pytest.raises(ValueError, match="mode = 'fast'"):
        dispatch(experts_of(16, np.zeros((16, 1, 8), int)), 1.0, "fast")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="9 choices of 256 experts in 8 groups of which 9"):
        sample_choices(1, 1, 9, 256, 8, 9)
