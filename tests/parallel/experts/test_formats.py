"""Rows in FP8, E5M6 and LogFMT between four ranks, against one process that rounds as wires do: every bit and byte."""

import dataclasses

import numpy as np
import pytest
import torch
from experts_on_ranks import CHOICES, EXPERTS, Case, Result, case, counts_of, joined, on_one, on_ranks
from formats_on_ranks import flipped, formats_named, on_one_in_formats, with_faults
from rank_processes import Ranks

from dovetail.catalog.precision import load_recipe, recipe_names
from dovetail.cost.ops.ffn import returned_bytes
from dovetail.cost.ops.product import coded_bytes
from dovetail.network.demands.experts import Experts, combine, dispatch
from dovetail.parallel.experts.formats import BACK, check_back
from dovetail.parallel.traffic import CHECKSUM, opened, sealed

FIELDS = ("output", "x", "weights", "gate_up", "down")
RECIPES = [
    ("deepseek-v3", "bf16"),
    ("deepseek-v3", "logfmt-10"),
    ("deepseek-v3", "e5m6"),
    ("bf16", "logfmt-10"),
    ("bf16", "e5m6"),
    ("v3-e5m2-gradients", "bf16"),
]


def wide(seed: int, hops: str, mesh: tuple[int, int], dim: int = 136, **changes: object) -> Case:
    """Rows of a whole tile and a part of one, whose sizes differ by powers of ten."""
    made = case(seed, hops, mesh, torch.bfloat16, **changes)
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    tokens = len(made.x)
    sizes = 10 ** (2 * normal(tokens, 1)) * torch.where(torch.arange(dim) < 128, 1.0, 30.0)
    return dataclasses.replace(
        made,
        x=(normal(tokens, dim) * sizes).bfloat16(),
        grad=(normal(tokens, dim) * sizes.flip(1)).bfloat16(),
        gate_up=(0.3 * normal(EXPERTS, 32, dim)).bfloat16(),
        down=(0.3 * normal(EXPERTS, dim, 16)).bfloat16(),
    )


def one_token(hops: str, dim: int) -> Case:
    base = wide(3, hops, (4, 2), dim, recipe="deepseek-v3", back="logfmt-10")
    one = {key: getattr(base, key)[:1] for key in ("x", "ids", "weights", "grad")}
    return dataclasses.replace(base, tokens=(0, 0, 0, 1), **one)


@pytest.mark.parametrize("hops", ["one", "two"])
def test_ranks_compute_what_one_process_does(hops: str, ranks: Ranks) -> None:
    cases = [
        wide(seed, hops, mesh, recipe=recipe, back=back)
        for seed, (recipe, back) in enumerate(RECIPES)
        for mesh in ((4, 2), (4, 1), (2, 2), (4, 4))
    ]
    cases += [one_token(hops, dim) for dim in (131, 256)]  # the first with numbers at odd bytes
    cases += [wide(1, hops, (4, 2), recipe="deepseek-v3", back="e5m6", is_checked=True)]
    alone = ranks.run(on_one_in_formats, cases, seconds=90)[0]  # first, so that one rank compiles for all
    for index, results in enumerate(zip(*ranks.run(on_ranks, cases), strict=True)):
        each = cases[index]
        for first, one in zip(range(0, 4, each.ep), alone[index], strict=True):
            for name in FIELDS:
                ours = joined(results[first : first + each.ep], name)
                assert torch.equal(ours, getattr(one, name)), (each.recipe, each.back, each.ep, name)


def test_one_hop_is_the_recipe_bit_for_bit(ranks: Ranks) -> None:
    """Quantised before it is sent or after, a row is the same, and so is a gradient to the product that takes it. Only
    the weights' gradient of the last product takes it as it was before."""
    each = wide(0, "one", (4, 2), recipe="deepseek-v3")
    ((one,),) = ranks.run(on_one, [each])[0]
    (results,) = zip(*ranks.run(on_ranks, [each]), strict=True)
    for name in FIELDS:
        assert torch.equal(joined(results, name), getattr(one.result, name)) == (name != "down"), name


@pytest.mark.parametrize(
    "fault", ["scales lost", "scales of the next tile", "scales of the next row", "quantised on the way"]
)
def test_wrong_scales_are_seen(fault: str, ranks: Ranks) -> None:
    each = wide(0, "two", (4, 2), recipe="deepseek-v3", back="e5m6")
    (right,), (wrong,) = (zip(*ranks.run(with_faults, [each], name), strict=True) for name in ("none", fault))
    for name in FIELDS:
        assert not torch.equal(joined(right, name), joined(wrong, name)), name


def test_what_goes_out_is_what_the_recipe_says(ranks: Ranks) -> None:
    found = formats_named(list(recipe_names()))
    fp8 = "e4m3", "e4m3"
    assert found["deepseek-v3"] == found["deepseek-v3.1"] == found["v3-hopper"] == fp8
    assert found["bf16"] == found["combine-e4m3"] == ("plain", "plain")
    assert found["v3-e5m2-gradients"] == ("e4m3", "e5m2")
    assert found["v3-block-gradients"] == ("e4m3", "plain")  # blocks reach over rows that other ranks have
    assert found["v3-per-tensor"] == ("plain", "plain")


def test_formats_that_cannot_be_are_refused() -> None:
    check_back("bf16", load_recipe("combine-e4m3"), torch.float32)
    check_back("e5m6", load_recipe("deepseek-v3"), torch.bfloat16)
    with pytest.raises(ValueError, match=r"layout\.back = 'e5m6' rounds BF16 rows.*float32: set train\.dtype"):
        check_back("e5m6", load_recipe("bf16"), torch.float32)
    with pytest.raises(ValueError, match=r"layout\.back = 'logfmt-10' beside the recipe 'combine-e4m3'.*leave one"):
        check_back("logfmt-10", load_recipe("combine-e4m3"), torch.bfloat16)


@pytest.mark.parametrize("name", ["e5m6", "logfmt-10"])
def test_zeros_are_zeros_and_nothing_finite_comes_of_nan(name: str) -> None:
    format, rows = BACK[name], torch.randn(3, 200, generator=torch.Generator().manual_seed(0)).bfloat16()
    rows[1], rows[2, 150] = 0, torch.nan
    bytes_ = format.encode(rows)
    there = format.decode(bytes_, 200, torch.bfloat16)
    assert torch.equal(there[1], rows[1]) and there[2, 128:].isnan().all() and there[2, :128].isfinite().all()
    assert torch.equal(format.decode(torch.zeros_like(bytes_), 200, torch.bfloat16), torch.zeros_like(rows))


# ---- Bytes ----


def predicted(each: Case) -> list[tuple[int, int]]:
    """Bytes that each rank sends over the NIC and inside its node: the planner's flows, in the planner's formats."""
    recipe = load_recipe(each.recipe)
    dim, up, down = each.x.shape[1], recipe.sites.get("expert_up"), recipe.sites.get("expert_down")
    back = None if each.back == "bf16" else each.back
    rides, comes = (0, 0) if each.hops == "one" else (8 * CHOICES, 4 * CHOICES)
    ways = [
        (dispatch, coded_bytes(dim, up.input if up else None) + rides),
        (combine, returned_bytes(dim, recipe.model_copy(update={"expert_output": back}))),
        (dispatch, coded_bytes(dim, down.grad if down else None)),
        (combine, returned_bytes(dim, load_recipe("bf16")) + comes),
    ]
    chosen = np.full((4, max(each.tokens), CHOICES), -1, dtype=np.int64)
    for rank in range(4):
        chosen[rank, : each.tokens[rank]] = each.part(rank, rank + 1).ids
    experts = Experts(gpus=np.arange(4), gpus_per_node=each.ranks_per_node, experts=EXPERTS, chosen=chosen)
    near = each.ranks_per_node - 1
    sent = np.zeros((4, 2))
    for way, size in ways:
        flows = way(experts, size, "low-latency" if each.hops == "one" else "normal").steps[0].flows
        is_near = (flows.source // each.ranks_per_node == flows.destination // each.ranks_per_node).astype(int)
        np.add.at(sent, (flows.source, is_near), flows.bytes)
    sent += [counts_of(each.hops, 3 - near), counts_of(each.hops, near)]
    if each.is_checked:  # counts, two ways out and two home, and in two hops the weights' gradients, by each wire
        far = 5 * (3 - near) if each.hops == "one" else 3 - near + 5 * (4 // each.ranks_per_node - 1)
        sent += [CHECKSUM * far, CHECKSUM * (5 if each.hops == "one" else 6) * near]
    return [(int(nic), int(node)) for nic, node in sent]


@pytest.mark.parametrize("hops", ["one", "two"])
def test_bytes_are_those_that_the_planner_counts(hops: str, ranks: Ranks) -> None:
    cases = [
        wide(seed, hops, (4, ranks_per_node), recipe=recipe, back=back, is_checked=seed % 2 == 1)
        for seed, (recipe, back) in enumerate(RECIPES)
        for ranks_per_node in (1, 2, 4)
    ]
    for each, results in zip(cases, zip(*ranks.run(on_ranks, cases), strict=True), strict=True):
        assert [(result.nic, result.node) for result in results] == predicted(each), (each.recipe, each.back)


def test_fp8_out_and_logfmt_back_spare_the_wire(ranks: Ranks) -> None:
    wide_rows, narrow = (
        wide(0, "two", (4, 2), 1024, recipe=recipe, back=back)
        for recipe, back in (("bf16", "bf16"), ("deepseek-v3", "logfmt-10"))
    )
    much, little = (sum(each.nic for each in _results(ranks, one)) for one in (wide_rows, narrow))
    assert 0.65 < little / much < 0.70  # (1.03 + 1.28 + 1.03 + 2) / 8, and choices


def _results(ranks: Ranks, each: Case) -> list[Result]:
    return [own for (own,) in ranks.run(on_ranks, [each])]


# ---- Checksums ----


@pytest.mark.parametrize(("hops", "exchanges"), [("one", 5), ("two", 11)])
def test_a_bit_that_flips_is_found(hops: str, exchanges: int, ranks: Ranks) -> None:
    """In every exchange of a step, on every rank; both ranks and the operation are named."""
    each, operations = wide(0, hops, (4, 2), recipe="deepseek-v3", is_checked=True), set()
    for exchange in range(exchanges):
        for rank, (source, message, is_reached) in enumerate(ranks.run(flipped, each, exchange, exchange)):
            assert is_reached
            operation, _, rest = message.partition(": ")
            assert f"bytes from rank {source} came to rank {rank} with another checksum" in rest
            operations.add(operation)
    rows = {"dispatch", "combine", "gradients of combine", "gradients of dispatch"}
    assert operations == {"numbers of rows", *rows}
    assert not any(is_reached for *_, is_reached in ranks.run(flipped, each, exchanges, 0))  # those were all


def test_without_checksums_nobody_sees_it(ranks: Ranks) -> None:
    each = wide(0, "one", (4, 2), recipe="deepseek-v3")
    assert [message for _, message, _ in ranks.run(flipped, each, 2, 0)] == [""] * 4


def test_every_flip_and_every_swap_of_rows_changes_the_checksum() -> None:
    message = sealed(torch.randn(5, 7, generator=torch.Generator().manual_seed(0)).bfloat16())
    assert len(message) == 5 * 7 * 2 + CHECKSUM
    assert torch.equal(
        opened(message, 0, 1, "x").view(torch.bfloat16).view(5, 7).view(torch.uint8).flatten(), message[:-CHECKSUM]
    )
    for bit in range(8 * len(message)):
        damaged = message.clone()
        damaged[bit // 8] ^= 1 << bit % 8
        with pytest.raises(RuntimeError, match="x: 70 bytes from rank 0 came to rank 1"):
            opened(damaged, 0, 1, "x")
    swapped = torch.cat((message[14:28], message[:14], message[28:]))
    with pytest.raises(RuntimeError):
        opened(swapped, 0, 1, "x")
    assert len(opened(sealed(torch.empty(0, 3)), 0, 1, "x")) == 0
