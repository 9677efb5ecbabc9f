"""A model on the ranks of a pipeline has the losses and gradients of one process, under every schedule."""

from collections.abc import Callable, Sequence
from random import Random

import pytest
import torch
from pipelines_on_ranks import Case, Found, alone, joined, on_ranks, refusals
from rank_processes import Ranks

from dovetail.network.demands.transfers import pipeline
from dovetail.numerics.formats.errors import network_terms, normwise_error, tolerance
from dovetail.parallel.schedules.pipelines import SCHEDULES
from dovetail.spec.layout import Layout, check_layout, divisors
from dovetail.spec.model import ModelSpec

SpecFactory = Callable[..., ModelSpec]

# (layout, changes of the model, changes of the case) for four ranks
CASES = [
    (Layout(pp=4, microbatches=5), {"layers": 6, "mtp": 2}, {"separate_documents": True}),
    (
        Layout(pp=4, microbatches=6, schedule="zb1p", stage_layers=(2, 1, 1, 1)),
        {"layers": 5, "tied": True},
        {"recompute": True},
    ),
    (Layout(pp=4, microbatches=8, schedule="dualpipe"), {"mtp": 1}, {"dtype": torch.bfloat16}),
    (Layout(pp=4, microbatches=8, schedule="dualpipev"), {"layers": 8, "mtp": 1, "tied": True}, {}),
    (Layout(pp=4, microbatches=4, schedule="interleaved", chunks=2), {"layers": 9}, {"dtype": torch.bfloat16}),
    (Layout(pp=2, dp=2, microbatches=4, schedule="dualpipe"), {"layers": 3, "tied": True, "mtp": 2}, {}),
    (Layout(pp=2, dp=2, ep=2, microbatches=3), {"layers": 3, "mtp": 1}, {"hops": "two", "ranks_per_node": 1}),
    (Layout(pp=2, dp=2, ep=2, microbatches=5, schedule="dualpipev"), {"mtp": 1}, {"ranks_per_node": 4}),
    (
        Layout(pp=2, dp=2, ep=2, microbatches=6, schedule="dualpipe", microbatch_size=2),
        {"mtp": 1},
        {"separate_documents": True, "ranks_per_node": 2},
    ),
    (Layout(pp=2, dp=2, microbatches=3, schedule="zb1p"), {"shared": 0}, {"dtype": torch.bfloat16, "recompute": True}),
    (Layout(pp=1, dp=4, microbatches=2, schedule="dualpipev"), {"mtp": 2, "tied": True}, {}),
]


def case(spec: SpecFactory, layout: Layout, model: dict, changes: dict) -> Case:
    made = spec(
        num_hidden_layers=model.get("layers", max(layout.num_stages, 4)),
        num_nextn_predict_layers=model.get("mtp", 0),
        tie_word_embeddings=model.get("tied", False),
        n_shared_experts=model.get("shared", 1),
    )
    return Case(spec=made, layout=layout, **changes)


def check(each: Case, found: Sequence[Found]) -> None:
    expected, (ours, single) = alone(each), joined(each, found)
    layout = each.layout
    assert ours.losses.keys() == expected.losses.keys()
    terms = network_terms(each.spec, each.length) + len(each.batches()) * each.length * layout.microbatch_size
    bound = tolerance(torch.float32, terms=terms)
    for index, loss in expected.losses.items():
        if layout.ep == 1:  # experts on other ranks see more rows at once
            assert torch.equal(ours.losses[index], loss), index
        assert normwise_error(ours.losses[index], loss) < bound, index
    assert ours.balance == pytest.approx(expected.balance, rel=bound)
    assert ours.counts.keys() == expected.counts.keys()
    assert all(torch.equal(ours.counts[layer], count) for layer, count in expected.counts.items())
    assert ours.gradients.keys() == expected.gradients.keys()
    for name, gradient in expected.gradients.items():
        if name in single and name != "embed_tokens.weight":
            assert torch.equal(ours.gradients[name], gradient), name
        # The embedding's gradient of one micro-batch is rounded on both stages that look it up.
        limit = tolerance(each.dtype, roundings=2, terms=terms) if name == "embed_tokens.weight" else bound
        assert normwise_error(ours.gradients[name], gradient) < limit, name
    assert all(one.was_whole for one in found)
    if layout.pp > 1 and layout.schedule in ("1f1b", "interleaved"):  # whose last backward passes send their input's
        assert all(one.was_early for one in found[layout.dp :])
    limits = each.schedule.activation_limit
    assert all(one.peak <= limits[rank // layout.dp] for rank, one in enumerate(found))
    assert [(one.nic, one.node) for one in found] == predicted(each)


def predicted(each: Case) -> list[tuple[int, int]]:
    """Bytes over the NIC and inside the node that each rank sends: all its micro-batches' hidden states between
    neighbouring stages, and as many gradients back, as the planner's flows have them."""
    layout, schedule = each.layout, each.schedule
    size = layout.microbatch_size * each.length * each.spec.hidden_size * each.dtype.itemsize
    directions = len(schedule.placement)
    sent = [[0, 0] for _ in range(layout.gpus)]
    for holders in schedule.placement:
        for one, other in zip(holders, holders[1:], strict=False):
            if one == other:
                continue
            gpus = [stage * layout.dp + place for stage in (one, other) for place in range(layout.dp)]
            total = float(size * layout.microbatches // directions)
            flows = pipeline(gpus, total, 2, both_ways=True).steps[0].flows
            for source, target, count in zip(flows.source, flows.destination, flows.bytes, strict=True):
                sent[source][int(source // each.ranks_per_node == target // each.ranks_per_node)] += int(count)
    return [(nic, node) for nic, node in sent]


def check_all(cases: Sequence[Case], ranks: Ranks) -> None:
    for each, found in zip(cases, zip(*ranks.run(on_ranks, cases), strict=True), strict=True):
        check(each, found)


def test_ranks_have_what_one_process_has(ranks: Ranks, tiny_spec: SpecFactory) -> None:
    check_all([case(tiny_spec, *each) for each in CASES], ranks)


def drawn(spec: SpecFactory, world: int, seed: int) -> Case:
    """A legal layout and a model for it."""
    random = Random(seed)
    pp = random.choice([each for each in divisors(world) if each > 1] + [world])
    dp = world // pp
    ep = random.choice(divisors(dp))
    schedule = SCHEDULES[seed % len(SCHEDULES)]
    microbatches = {
        "interleaved": pp * random.randint(1, 3),
        "1f1b": random.randint(1, 6),
        "zb1p": random.randint(1, 6),
    }
    chunks = random.randint(1, 3)
    layout = Layout(
        pp=pp,
        dp=dp,
        ep=ep,
        schedule=schedule,
        chunks=chunks,
        microbatches=microbatches.get(schedule, 2 * pp + 2 * random.randint(0, 2)),
        microbatch_size=random.randint(1, 2),
    )
    layers = layout.num_stages + random.randint(0, 3)
    if random.random() < 0.5:  # ragged stages
        cuts = sorted(random.sample(range(1, layers), layout.num_stages - 1))
        counts = tuple(stop - start for start, stop in zip([0, *cuts], [*cuts, layers], strict=True))
        layout = layout.model_copy(update={"stage_layers": counts})
    made = spec(
        num_hidden_layers=layers,
        num_nextn_predict_layers=random.randint(0, 2),
        tie_word_embeddings=random.random() < 0.4,
        n_shared_experts=random.randint(0, 2),
        first_k_dense_replace=random.randint(0, layers),
        initializer_range=0.1,
    )
    check_layout(layout, made)
    return Case(
        spec=made,
        layout=layout,
        dtype=torch.float32 if ep > 1 or random.random() < 0.5 else torch.bfloat16,
        length=random.randint(4, 12),
        recompute=random.random() < 0.5,
        separate_documents=random.random() < 0.5,
        hops=random.choice(["one", "two"]),
        ranks_per_node=random.choice([each for each in divisors(world) if each % ep == 0 or ep % each == 0]),
    )


@pytest.mark.parametrize("first", range(0, 20, 10))
def test_random_layouts_on_four_ranks(first: int, ranks: Ranks, tiny_spec: SpecFactory) -> None:
    check_all([drawn(tiny_spec, 4, seed) for seed in range(first, first + 10)], ranks)


def test_random_layouts_on_two_ranks(two: Ranks, tiny_spec: SpecFactory) -> None:
    check_all([drawn(tiny_spec, 2, seed) for seed in range(100, 112)], two)


@pytest.mark.parametrize("schedule", ["dualpipe", "dualpipev"])
@pytest.mark.parametrize("hops", ["one", "two"])
def test_overlap_changes_no_bit(hops: str, schedule: str, ranks: Ranks, tiny_spec: SpecFactory) -> None:
    layout = Layout(pp=2, dp=2, ep=2, microbatches=6, schedule=schedule)
    settings = {"dtype": torch.bfloat16, "hops": hops, "recompute": True}
    cases = [case(tiny_spec, layout, {"mtp": 1}, {**settings, "is_overlapped": each}) for each in (True, False)]
    for overlapped, plain in ranks.run(on_ranks, cases):
        assert overlapped.gradients.keys() == plain.gradients.keys()
        assert all(torch.equal(overlapped.gradients[name], plain.gradients[name]) for name in plain.gradients)
        assert all(torch.equal(overlapped.losses[index], plain.losses[index]) for index in plain.losses)


def test_what_does_not_fit_together_is_refused(two: Ranks, tiny_spec: SpecFactory) -> None:
    for messages in two.run(refusals, tiny_spec()):
        assert messages == [
            "the schedule 1f1b has 3 ranks, the pipeline 2",
            "1 micro-batches for a schedule of 2: give one Batch for each",
        ]


TWINS = {
    "embedding twice": (Layout(pp=2, dp=2, microbatches=4, schedule="dualpipe"), {"tied": True}),
    "dropped": (Layout(pp=4, microbatches=4, schedule="zb1p"), {}),
    "swapped": (Layout(pp=4, microbatches=4), {}),
    "hasty": (Layout(pp=4, microbatches=4, schedule="zb1p"), {}),
}


@pytest.mark.parametrize("twin", TWINS)
def test_a_fault_is_seen(twin: str, ranks: Ranks, tiny_spec: SpecFactory) -> None:
    right = case(tiny_spec, *TWINS[twin], {})
    broken = case(tiny_spec, *TWINS[twin], {"twin": twin})
    found = ranks.run(on_ranks, [right, broken])
    check(right, [one[0] for one in found])
    with pytest.raises(AssertionError):
        check(broken, [one[1] for one in found])
