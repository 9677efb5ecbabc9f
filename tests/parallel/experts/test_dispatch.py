"""Experts on four ranks, by one hop and by two, against one process: every number, and every byte."""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from experts_on_ranks import (
    CHOICES,
    DIM,
    EXPERTS,
    Alone,
    Case,
    Result,
    case,
    counts_of,
    joined,
    layer_on_ranks,
    on_one,
    on_ranks,
)
from rank_processes import Ranks

from dovetail.network.demands.experts import Experts, dispatch
from dovetail.numerics.formats.errors import normwise_error, tolerance
from dovetail.spec.model import ModelSpec

SpecFactory = Callable[..., ModelSpec]
MESHES = [(4, 2), (2, 2), (2, 1), (4, 1), (4, 4), (1, 2)]  # ep, ranks per node
ROUNDINGS = {"one": 1, "two": 3}  # of a sum: as the result, and in two hops for the wire inside the node and the NIC's


def run(ranks: Ranks, cases: Sequence[Case]) -> list[tuple[list[Result], list[Alone]]]:
    """Of each case the results of all ranks, and those of one process for each ep group."""
    alone = ranks.run(on_one, cases)[0]  # first, so that one rank compiles the kernels for all
    by_rank = ranks.run(on_ranks, cases)
    return [([results[index] for results in by_rank], alone[index]) for index in range(len(cases))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("hops", ["one", "two"])
@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_ranks_compute_what_one_process_does(
    mesh: tuple[int, int], hops: str, dtype: torch.dtype, ranks: Ranks
) -> None:
    cases = [case(seed, hops, mesh, dtype) for seed in range(4)]
    for each, (results, alone) in zip(cases, run(ranks, cases), strict=True):
        groups = [results[first : first + each.ep] for first in range(0, 4, each.ep)]
        for group, one in zip(groups, alone, strict=True):
            # Experts see the same rows in the same order, and weights have one gradient each: bit for bit.
            for name in ("gate_up", "down", "weights"):
                assert torch.equal(joined(group, name), getattr(one.result, name)), name
            for name in ("output", "x"):
                ours = joined(group, name)
                if hops == "one":  # sums in the order of choices
                    assert torch.equal(ours, getattr(one.result, name)), name
                bound = tolerance(dtype, roundings=ROUNDINGS[hops], terms=CHOICES)
                assert getattr(one, name).error(ours) <= bound, name


def edge(name: str, hops: str, dtype: torch.dtype) -> Case:
    base = case(3, hops, (4, 2), dtype)
    if name == "no tokens at all":
        empty = {key: getattr(base, key)[:0] for key in ("x", "ids", "weights", "grad")}
        return dataclasses.replace(base, tokens=(0, 0, 0, 0), **empty)
    if name == "all to one rank":
        return dataclasses.replace(base, ids=torch.arange(4, 8).expand_as(base.ids).contiguous())
    if name == "no token leaves its rank":
        home = torch.arange(4).repeat_interleave(torch.tensor(base.tokens))
        return dataclasses.replace(base, ids=4 * home[:, None] + torch.arange(4))
    one = {key: getattr(base, key)[:1] for key in ("x", "ids", "weights", "grad")}
    return dataclasses.replace(base, tokens=(0, 0, 0, 1), **one)


@pytest.mark.parametrize("hops", ["one", "two"])
@pytest.mark.parametrize("name", ["no tokens at all", "one token", "all to one rank", "no token leaves its rank"])
def test_edges(name: str, hops: str, ranks: Ranks) -> None:
    each = edge(name, hops, torch.bfloat16)
    ((results, (one,)),) = run(ranks, [each])
    for field in ("gate_up", "down", "weights"):
        assert torch.equal(joined(results, field), getattr(one.result, field)), field
    bound = tolerance(torch.bfloat16, roundings=ROUNDINGS[hops], terms=CHOICES)
    assert one.output.error(joined(results, "output")) <= bound
    assert one.x.error(joined(results, "x")) <= bound
    if name == "no token leaves its rank":
        assert [each.nic for each in results] == [counts_of(hops, 2)] * 4


# ---- Bytes ----


def predicted(each: Case) -> list[tuple[int, int]]:
    """Bytes that each rank sends over the NIC and inside its node, from the planner's flows of copies."""
    chosen = np.full((4, max(each.tokens), CHOICES), -1, dtype=np.int64)
    for rank in range(4):
        chosen[rank, : each.tokens[rank]] = each.part(rank, rank + 1).ids
    row = DIM * each.x.element_size()
    # A way out with rows in the forward and in the backward pass, and a way home; in two hops with the choices.
    way_out, way_home = (2 * row, 2 * row) if each.hops == "one" else (2 * row + 8 * CHOICES, 2 * row + 4 * CHOICES)
    mode = "low-latency" if each.hops == "one" else "normal"
    experts = Experts(gpus=np.arange(4), gpus_per_node=each.ranks_per_node, experts=EXPERTS, chosen=chosen)
    flows = dispatch(experts, 1.0, mode).steps[0].flows
    sent = np.zeros((4, 2), dtype=np.int64)
    for source, target, copies in zip(flows.source, flows.destination, flows.bytes, strict=True):
        is_near = int(source // each.ranks_per_node == target // each.ranks_per_node)
        sent[source, is_near] += int(copies) * way_out
        sent[target, is_near] += int(copies) * way_home
    near = each.ranks_per_node - 1
    return [(int(nic) + counts_of(each.hops, 3 - near), int(node) + counts_of(each.hops, near)) for nic, node in sent]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("hops", ["one", "two"])
@pytest.mark.parametrize("ranks_per_node", [1, 2, 4])
def test_bytes_are_those_that_the_planner_counts(
    ranks_per_node: int, hops: str, dtype: torch.dtype, ranks: Ranks
) -> None:
    cases = [case(seed, hops, (4, ranks_per_node), dtype) for seed in range(4)]
    for each, results in zip(cases, zip(*ranks.run(on_ranks, cases), strict=True), strict=True):
        assert [(result.nic, result.node) for result in results] == predicted(each)


def test_two_hops_spare_the_nic(ranks: Ranks) -> None:
    one, two = (case(0, hops, (4, 2), torch.bfloat16) for hops in ("one", "two"))
    (once,), (twice,) = (zip(*ranks.run(on_ranks, [each]), strict=True) for each in (one, two))
    assert sum(each.nic for each in twice) < 0.7 * sum(each.nic for each in once)


def test_a_token_that_goes_to_a_node_twice_is_seen_by_its_bytes(ranks: Ranks) -> None:
    each = case(2, "two", (4, 2), torch.bfloat16, twin="sent twice")
    ((results, (one,)),) = run(ranks, [each])
    assert torch.equal(joined(results, "down"), one.result.down)  # nothing else tells
    assert all(result.nic > nic for result, (nic, _) in zip(results, predicted(each), strict=True))


def test_sums_in_bf16_are_seen_by_the_bound(ranks: Ranks) -> None:
    """A large term, and seven small ones of a token's experts, all on one rank, that BF16 rounds away one by one."""
    base = case(0, "two", (2, 1), torch.bfloat16)
    tokens, alike = len(base.x), torch.zeros(EXPERTS, dtype=torch.long)
    right = dataclasses.replace(
        base,
        ids=torch.arange(8).expand(tokens, 8).contiguous(),
        weights=torch.tensor([1.0] + 7 * [0.0035]).expand(tokens, 8).contiguous(),
        gate_up=base.gate_up[alike],
        down=base.down[alike],
    )
    bound = tolerance(torch.bfloat16, roundings=ROUNDINGS["two"], terms=8)
    errors = []
    for results, alone in run(ranks, [right, dataclasses.replace(right, twin="summed in BF16")]):
        pairs = zip((results[:2], results[2:]), alone, strict=True)
        errors.append(max(one.output.error(joined(group, "output")) for group, one in pairs))
    assert errors[0] <= bound < errors[1]


# ---- A whole layer ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("hops", ["one", "two"])
@pytest.mark.parametrize("mesh", [(4, 2), (2, 2), (2, 1)], ids=str)
def test_a_layer_on_ranks(
    mesh: tuple[int, int], hops: str, dtype: torch.dtype, ranks: Ranks, tiny_spec: SpecFactory
) -> None:
    """Gate and shared experts included; those are on every rank, whose gradients add up."""
    spec, tokens = tiny_spec(), (11, 0, 5, 8)
    answers = ranks.run(layer_on_ranks, spec, hops, mesh, tokens, dtype)
    alone, ours = answers[0][0], [own for _, own in answers]
    sums = 2 * 32 + 2 * 16 + sum(tokens)
    bound = tolerance(dtype, roundings=5 + ROUNDINGS[hops], terms=sums)
    assert alone.keys() == ours[0].keys()
    for name, expected in alone.items():
        parts = [each[name].double() for each in ours]
        if name in ("output", "x"):
            actual = torch.cat(parts)
        elif name.startswith("experts."):
            actual = sum(torch.cat(parts[first : first + mesh[0]]) for first in range(0, 4, mesh[0]))
        else:
            actual = sum(parts)
        assert normwise_error(actual.to(expected.dtype), expected) < bound, name
