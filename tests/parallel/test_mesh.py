"""Groups of ranks, and the message for each layout that the ranks cannot run."""

import pytest
from experts_on_ranks import hang, sent_and_gathered, try_mesh
from rank_processes import Ranks

from dovetail.parallel.mesh import check_ranks, neighbours, partitions
from dovetail.spec.layout import Layout

PRETRAINING = Layout(pp=16, ep=64, dp=128, microbatches=120, schedule="dualpipe")  # [V3 §3.2]


@pytest.mark.parametrize(
    ("layout", "ranks_per_node"),
    [
        (PRETRAINING, 8),
        (Layout(pp=3, dp=4, ep=2), 4),
        (Layout(pp=4, dp=2), 8),
        (Layout(dp=8, ep=4), 2),
        (Layout(dp=8, ep=2), 4),
        (Layout(dp=4), 4),
        (Layout(dp=4, ep=4), 1),
    ],
)
def test_every_rank_is_once_in_each_kind_of_group(layout: Layout, ranks_per_node: int) -> None:
    found = partitions(layout, ranks_per_node)
    for ranks in found.values():
        assert sorted(ranks.flatten()) == list(range(layout.gpus))
    assert (found["node"] // ranks_per_node == found["node"][:, :1] // ranks_per_node).all()
    for group in found["ep"]:  # its blocks of experts are in the order of node, then index
        assert list(group) == list(range(group[0], group[0] + layout.ep))
    for copies in found["edp"]:
        assert len(set(copies % layout.ep)) == 1


def test_deepseek_v3_as_it_was_trained() -> None:
    found = partitions(PRETRAINING, 8)
    sizes = {name: ranks.shape for name, ranks in found.items()}
    assert sizes.pop("pp") == (128, 16)
    assert sizes == {"dp": (16, 128), "ep": (32, 64), "edp": (1024, 2), "node": (256, 8), "rail": (256, 8)}
    assert list(found["rail"][1]) == list(range(1, 64, 8))
    assert list(found["edp"][0]) == [0, 64]
    assert list(found["pp"][5]) == list(range(5, 2048, 128))


def test_ranks_of_a_pipeline_have_the_same_place_in_their_stages() -> None:
    layout = Layout(pp=2, dp=4, ep=2)
    found = partitions(layout, 4)
    assert found["pp"].tolist() == [[0, 4], [1, 5], [2, 6], [3, 7]]
    for stage in (0, 1):
        for copy in (0, 1):
            for member in (0, 1):
                rank = (stage * layout.expert_replicas + copy) * layout.ep + member
                assert found["pp"][copy * layout.ep + member][stage] == rank
                assert found["ep"][stage * layout.expert_replicas + copy][member] == rank


@pytest.mark.parametrize(
    ("layout", "links"),
    [
        (Layout(dp=4), set()),
        (Layout(pp=2), {(0, 1), (1, 0)}),
        (Layout(pp=3), {(0, 1), (1, 0), (1, 2), (2, 1), (2, 0), (0, 2)}),
        (Layout(pp=2, dp=2), {(0, 2), (2, 0), (1, 3), (3, 1)}),
    ],
)
def test_neighbours_have_a_link_each_way(layout: Layout, links: set[tuple[int, int]]) -> None:
    found = list(neighbours(partitions(layout, 1)["pp"]))
    assert set(found) == links and len(found) == len(links)


@pytest.mark.parametrize(
    ("layout", "world", "ranks_per_node", "message"),
    [
        (Layout(pp=2, dp=3), 4, 2, "dp = 3 x pp = 2 needs 6 ranks, and 4 were started: set dp = 2, or start 6"),
        (Layout(pp=3, dp=2), 4, 2, "dp = 2 x pp = 3 needs 6 ranks, and 4 were started: start 6"),
        (Layout(pp=2, dp=3, ep=2), 6, 2, "ep = 2 does not divide the 3 ranks of a stage; nearest: ep = 1"),
        (Layout(tp=2, dp=2), 4, 2, "tp = 2 is planned but does not run yet: set tp = 1, and dp = 4"),
        (Layout(dp=8), 4, 2, "dp = 8 needs 8 ranks, and 4 were started: set dp = 4, or start 8"),
        (Layout(dp=6, ep=4), 6, 2, "ep = 4 does not divide the 6 ranks of a stage; nearest: ep = 3"),
        (Layout(dp=6), 6, 4, "ranks_per_node = 4 does not divide the 6 ranks; nearest: 3"),
        (Layout(dp=6), 6, 0, "ranks_per_node = 0 does not divide the 6 ranks; nearest: 1"),
        (Layout(dp=12, ep=4), 12, 6, "ep = 4 on nodes of 6 ranks: .* nearest: ep = 3"),
        (Layout(dp=12, ep=3), 12, 2, "ep = 3 on nodes of 2 ranks: .* nearest: ep = 2"),
    ],
)
def test_ranks_that_do_not_fit_are_refused(layout: Layout, world: int, ranks_per_node: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_ranks(layout, world, ranks_per_node)


def test_all_ranks_refuse_alike(ranks: Ranks) -> None:
    good, other = Layout(dp=4, ep=4), Layout(dp=4, ep=2)
    for layouts, counts, wanted in (
        ([good] * 4, [3] * 4, "ranks_per_node = 3 does not divide the 4 ranks; nearest: 2"),
        ([Layout(dp=3)] * 4, [2] * 4, "dp = 3 needs 3 ranks, and 4 were started"),
        ([good, good, other, good], [2] * 4, "rank 0 has the layout .* ep=4 .* rank 2 has .* ep=2 .*: give all ranks"),
        ([good] * 4, [2, 2, 1, 1], "the node of rank 0 has 2 ranks, that of rank 2 has 1: start as many on each"),
    ):
        (message,) = set(ranks.run(try_mesh, layouts, counts))
        with pytest.raises(ValueError, match=wanted):
            raise ValueError(message)


def test_groups_exchange_among_their_ranks(ranks: Ranks) -> None:
    assert ranks.run(sent_and_gathered) == [[True] * 7] * 4


def test_ranks_that_hang_are_killed(ranks: Ranks) -> None:
    with pytest.raises(AssertionError, match=r"hang: ranks \[0, 1, 2, 3\] hang, after"):
        ranks.run(hang, seconds=1.0)
    assert ranks.run(sent_and_gathered) == [[True] * 7] * 4  # others take their place
