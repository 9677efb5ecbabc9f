"""Tokens to experts and back in two hops and in one, on two nodes of two ranks joined by a link of limited rate.

Only the exchange: dispatch and combine, forward and backward, in turn on the same tokens; the experts hand back what
they get. 8 of 32 experts are chosen per token, in 2 of the 4 groups, of which each rank has one and each node two. So
a token has experts on 1.67 ranks, and mostly on both nodes: over the NIC goes a row for each choice in one hop (four on
average), and one row for each node in two.

The gain is predicted from bytes: the flows that the planner's network model (`network.demands.experts`) makes of the
very choices of the gate, each exchange as long as the busiest link needs for it. The choices and weights that go with a
row in two hops, and gradients of weights, are counted. It comes close where the link is the limit and not the cores,
so several rates are measured. "link ms" is what the bytes need at the rate that a plain exchange reaches on that link,
which is printed too. Needs root, for network namespaces.

Bar: the measured gain (time of one hop / time of two) is within 10 % of the predicted one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from typing import Annotated, Any

import numpy as np
import torch
import torch.distributed as dist
import typer
from _ranks import in_cluster, link_rate, timed_together
from _sides import Lap, Series, append_rows, in_rounds, print_table, ratio
from torch import Tensor

from dovetail.cluster.shape import Shape, parse_rate
from dovetail.model.experts.gate import Gate, Routing
from dovetail.network.demands.experts import Experts, combine, dispatch
from dovetail.numerics.formats.errors import normwise_error, tolerance
from dovetail.parallel.experts.dispatch import OneHop, TwoHop
from dovetail.parallel.mesh import form_mesh
from dovetail.spec.layout import Layout
from dovetail.spec.model import Moe

NODES, RANKS = 2, 2  # ranks of each node
MOE = Moe(n_routed_experts=32, num_experts_per_tok=8, moe_intermediate_size=64, n_group=4, topk_group=2)
CHOICES = MOE.num_experts_per_tok
ONE, TWO = "one hop", "two hops"
ROUNDINGS = 4  # to BF16 on a row's way: each rank's sum, the node's, the token's, and what came in
RATES = ["100Mbit", "200Mbit"]


def on_rank(tokens: int, dim: int, warmup: int, repeats: int) -> dict[str, Any]:
    """Laps of both sides; the choices of all ranks; the bytes that all NICs sent in one exchange there and back; the
    bytes per second that a link carries."""
    mesh = form_mesh(Layout(dp=NODES * RANKS, ep=NODES * RANKS))
    generator = torch.Generator().manual_seed(mesh.rank)
    x, grad = (torch.randn(tokens, dim, generator=generator).bfloat16() for _ in range(2))
    gate = Gate(dim, MOE)
    torch.nn.init.normal_(gate.weight, std=dim**-0.5, generator=torch.Generator().manual_seed(100))
    with torch.no_grad():
        routing = gate(x)
    sides = {ONE: OneHop(mesh), TWO: TwoHop(mesh)}
    results, sent = {}, {}
    for name, dispatcher in sides.items():
        results[name] = exchange(dispatcher, x, routing, grad)
        count = torch.tensor(dispatcher.traffic.nic)
        dist.all_reduce(count)
        sent[name] = int(count)
    _check(results)
    turns: dict[str, Callable[[], Lap]] = {}
    for name, dispatcher in sides.items():
        work = partial(exchange, dispatcher, x, routing, grad)
        turns[name] = partial(timed_together, lambda work=work: float(work()[0][0, 0]))
    found = in_rounds(turns, warmup, repeats, "" if mesh.rank else "exchange")
    chosen = [torch.empty_like(routing.expert_ids) for _ in range(mesh.ep.size)]
    dist.all_gather(chosen, routing.expert_ids)
    laps = {name: [asdict(lap) for lap in series.laps] for name, series in found.items()}
    return {"laps": laps, "chosen": torch.stack(chosen).tolist(), "sent": sent, "link": link_rate()}


def exchange(dispatcher: OneHop | TwoHop, x: Tensor, routing: Routing, grad: Tensor) -> tuple[Tensor, ...]:
    """Output, and the gradients of x and of the weights."""
    x, weights = x.detach().requires_grad_(), routing.weights.detach().requires_grad_()
    asked = Routing(expert_ids=routing.expert_ids, weights=weights, scores=routing.scores, counts=routing.counts)
    dispatched = dispatcher.dispatch(x, asked)
    output = dispatcher.combine(dispatched.rows, dispatched, asked)
    return output.detach(), *torch.autograd.grad(output, (x, weights), grad)


def _check(results: dict[str, tuple[Tensor, ...]]) -> None:
    """Raise ValueError where the two differ by more than rounding makes."""
    bound = tolerance(torch.bfloat16, roundings=ROUNDINGS)
    for name, one, two in zip(("output", "gradient of x", "gradient of weights"), *results.values(), strict=True):
        error = normwise_error(two.float(), one.float())
        if error > bound:
            raise ValueError(f"{name}: two hops differ from one by {error:.2e}, rounding explains {bound:.2e}")


def predicted(chosen: list[Any], dim: int, hops: str) -> tuple[float, float]:
    """Of one exchange there and back with its gradients: bytes that all NICs send, and the sum over exchanges of the
    bytes on the busiest link."""
    ranks = NODES * RANKS
    experts = Experts(
        gpus=np.arange(ranks, dtype=np.int32),
        gpus_per_node=RANKS,
        experts=MOE.n_routed_experts,
        chosen=np.array(chosen),
    )
    row, is_one = 2 * dim, hops == ONE
    mode = "low-latency" if is_one else "normal"
    there = [row if is_one else row + 8 * CHOICES, row]  # forward with ids and weights; then combine's backward
    back = [row, row] if is_one else [row, row, 4 * CHOICES]  # the last is the gradient of weights
    demands = [dispatch(experts, size, mode) for size in there] + [combine(experts, size, mode) for size in back]
    total = busiest = 0.0
    for demand in demands:
        (flows,) = (step.flows for step in demand.steps)
        source, target = flows.source // RANKS, flows.destination // RANKS
        over = np.zeros((NODES, NODES))
        np.add.at(over, (source, target), flows.bytes)
        np.fill_diagonal(over, 0.0)
        total += float(over.sum())
        busiest += float(max(over.sum(0).max(), over.sum(1).max()))
    return total, busiest


def main(
    rate: Annotated[list[str], typer.Option(help="Of each node's link; may be repeated.")] = RATES,
    tokens: Annotated[int, typer.Option(help="Of each rank.")] = 1024,
    dim: int = 1024,
    warmup: int = 1,
    repeats: int = 7,
    record: bool = True,
) -> None:
    settings = {"tokens": tokens, "dim": dim, "warmup": warmup, "repeats": repeats}
    answers = {}
    for each in rate:
        answers[each] = in_cluster(on_rank, settings, Shape(nodes=NODES, ranks=RANKS, nic=parse_rate(each)))
    print(f"{NODES} nodes x {RANKS} ranks, {tokens} tokens of {dim} each, BF16; forward and backward")
    report(answers, {"nodes": NODES, "ranks_per_node": RANKS, "tokens": tokens, "dim": dim}, record)


def report(answers: dict[str, dict[str, Any]], shape: dict[str, int], record: bool) -> None:
    lines, rows = [], []
    for rate, answer in answers.items():
        found = {name: Series(laps=[Lap(**lap) for lap in laps]) for name, laps in answer["laps"].items()}
        link, counted = answer["link"], answer["sent"]
        bytes_of = {name: predicted(answer["chosen"], shape["dim"], name) for name in found}
        gain, expected = ratio(found[ONE], found[TWO]), bytes_of[ONE][1] / bytes_of[TWO][1]
        for name, series in found.items():
            total, busiest = bytes_of[name]
            cells = [f"{total / 1e6:.2f}", f"{counted[name] / 1e6:.2f}", f"{link * 8 / 1e6:.0f}"]
            cells += [f"{busiest / link * 1e3:.0f}", f"{series.median * 1e3:.0f}"]
            cells += [f"{series.median * link / busiest - 1:+.1%}"]
            lines.append([f"{rate}, {name}", *cells, *(["", "", ""] if name == ONE else _gains(gain.median, expected))])
        row = {**shape, "nic_bytes_per_s": parse_rate(rate), "link_bytes_per_s": link, "moe": MOE.model_dump()}
        row |= {"sides": {name: series.summary() for name, series in found.items()}, "counted_nic_bytes": counted}
        row |= {"predicted_nic_bytes": {name: total for name, (total, _) in bytes_of.items()}}
        rows.append({**row, "gain": asdict(gain), "predicted_gain": expected})
    columns = ["", "MB over NICs", "counted", "link Mbit/s", "link ms", "measured ms", "more"]
    print_table([*columns, "gain", "predicted", "off by"], lines)
    if record:
        append_rows("two_hops", rows)


def _gains(gain: float, expected: float) -> list[str]:
    return [f"{gain:.2f}x", f"{expected:.2f}x", f"{gain / expected - 1:+.1%}"]


if __name__ == "__main__":
    typer.run(main)
