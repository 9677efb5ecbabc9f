"""Stages and overlapped pairs: every operation is timed once, in the piece that its place among the exchanges says."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace

import pytest

from dovetail.catalog.hardware import load_cluster
from dovetail.catalog.precision import load_recipe
from dovetail.catalog.presets import load_model
from dovetail.cost.memory.stages import stages
from dovetail.cost.ops.layer import embedding_ops, head_ops, layer_ops, mtp_ops
from dovetail.cost.ops.ops import Collective, Exchange, Op
from dovetail.cost.roofline import op_time
from dovetail.network.demands.closed_forms import collective_time, exchange_time
from dovetail.planner.training.chunks import (
    NOTHING,
    Costs,
    LayerSeconds,
    StageSeconds,
    Workload,
    operations,
    pair_seconds,
)
from dovetail.planner.training.figures import layer_figures
from dovetail.spec.band import Band, sum_bands
from dovetail.spec.layout import Layout

ARITHMETIC = ("attn_f", "mlp_b", "mlp_w", "mlp_f", "attn_b", "attn_w")  # in the order of the stream
EXCHANGES = ("dispatch_b", "dispatch_f", "combine_b", "combine_f")
NEEDS = {  # piece: the one it waits for; + : of the turn before
    "dispatch_b": "+attn_b",
    "attn_f": "+combine_f",
    "mlp_b": "dispatch_b",
    "dispatch_f": "attn_f",
    "combine_b": "mlp_b",
    "mlp_f": "dispatch_f",
    "attn_b": "combine_b",
    "combine_f": "mlp_f",
}

V3 = Workload(
    spec=load_model("deepseek-v3"),
    cluster=load_cluster("h800-2048"),
    layout=Layout(pp=16, ep=64, dp=128, microbatches=120, schedule="dualpipe"),
    recipe=load_recipe("deepseek-v3"),
    sequence_length=4096,
)


def stage_of(layers: list[LayerSeconds]) -> StageSeconds:
    return StageSeconds(forward=NOTHING, input_backward=NOTHING, weight_backward=NOTHING, layers=tuple(layers))


def random_layer(draw: random.Random, exchanges: float = 1.0) -> LayerSeconds:
    seconds = {name: Band.exact(draw.uniform(0.1, 1.0)) for name in ARITHMETIC}
    sent = {name: Band.exact(exchanges * draw.choice([0.0, draw.uniform(0.1, 2.0)])) for name in EXCHANGES}
    return LayerSeconds(**seconds, **sent)


def graph_seconds(forward: StageSeconds, backward: StageSeconds) -> float:
    """The longest path through everything that waits for something, by relaxing it until nothing moves."""
    turns = max(len(forward.layers), len(backward.layers))
    seconds: dict[tuple[int, str], float] = {}
    for turn in range(turns):
        for name in (*ARITHMETIC, *EXCHANGES):
            layers = forward.layers if name.endswith("_f") else tuple(reversed(backward.layers))
            seconds[turn, name] = getattr(layers[turn], name).value if turn < len(layers) else 0.0
    edges: list[tuple[tuple[int, str], tuple[int, str]]] = []
    for names in (ARITHMETIC, EXCHANGES):
        queue = [(turn, name) for turn in range(turns) for name in names]
        queue = [node for node in queue if node[1] not in EXCHANGES or seconds[node] > 0]
        edges += zip(queue, queue[1:], strict=False)
    for (turn, name), needed in ((node, NEEDS[node[1]]) for node in seconds if node[1] in NEEDS):
        source = (turn - 1, needed[1:]) if needed.startswith("+") else (turn, needed)
        if source in seconds:
            edges.append((source, (turn, name)))
    start = dict.fromkeys(seconds, 0.0)
    for _ in seconds:
        for before, after in edges:
            start[after] = max(start[after], start[before] + seconds[before])
    return max(start[node] + seconds[node] for node in seconds)


@pytest.mark.parametrize("seed", range(20))
def test_a_pair_is_the_longest_path_through_both_streams(seed: int) -> None:
    draw = random.Random(seed)
    front, back = (stage_of([random_layer(draw) for _ in range(draw.randint(1, 5))]) for _ in range(2))
    assert pair_seconds(front, back).value == pytest.approx(graph_seconds(front, back))


@pytest.mark.parametrize("seed", range(20))
def test_a_pair_takes_no_less_than_either_stream_and_no_more_than_both(seed: int) -> None:
    draw = random.Random(seed)
    front, back = (stage_of([random_layer(draw) for _ in range(4)]) for _ in range(2))
    busy = {}
    for names in (ARITHMETIC, EXCHANGES):
        sides = ((front if name.endswith("_f") else back, name) for name in names)
        busy[names] = sum(getattr(layer, name).value for side, name in sides for layer in side.layers)
    pair = pair_seconds(front, back).value
    assert max(busy.values()) - 1e-9 <= pair <= sum(busy.values()) + 1e-9


def test_without_exchanges_a_pair_is_its_arithmetic() -> None:
    draw = random.Random(0)
    front, back = (stage_of([random_layer(draw, exchanges=0.0) for _ in range(3)]) for _ in range(2))
    sides = ((front if name.endswith("_f") else back, name) for name in ARITHMETIC)
    expected = sum(getattr(layer, name).value for side, name in sides for layer in side.layers)
    assert pair_seconds(front, back).value == pytest.approx(expected)
    assert exchange_seconds(front) == 0


def exchange_seconds(stage: StageSeconds) -> float:
    return sum_bands(getattr(layer, name) for layer in stage.layers for name in EXCHANGES).value


def seconds_of(work: Workload, op: Op) -> float:
    if isinstance(op, Exchange):
        return exchange_time(op, work.cluster).seconds.value
    if isinstance(op, Collective):
        return collective_time(op, work.cluster).seconds.value
    return op_time(op, work.cluster.gpu, work.multiprocessors).seconds.value


def stage_ops(work: Workload, index: int) -> Iterator[Op]:
    spec, layout, recipe, tokens = work.spec, work.layout, work.recipe, work.tokens
    stage = stages(spec, layout, work.sequence_length)[index]
    sizes = (work.sequence_length, layout.microbatch_size)
    for layer in stage.layers:
        yield from layer_ops(spec, layer, layout, recipe, tokens, "training", *sizes)
    if stage.has_embedding:
        yield from embedding_ops(spec, layout, tokens, "training")
    if stage.has_head:
        yield from head_ops(spec, layout, tokens, "training")
        for _ in range(spec.num_nextn_predict_layers):
            yield from mtp_ops(spec, layout, recipe, tokens, "training", *sizes)


@pytest.mark.parametrize("index", [0, 5, 15])
@pytest.mark.parametrize("tp", [1, 2])
def test_a_stage_is_the_sum_of_its_operations(index: int, tp: int) -> None:
    work = replace(V3, layout=V3.layout.model_copy(update={"tp": tp, "dp": 128 // tp}))
    stage = Costs().stages(work)[index]
    parts = {"forward": stage.forward, "dgrad": stage.input_backward, "wgrad": stage.weight_backward}
    for pass_, band in parts.items():
        assert band.value == pytest.approx(
            sum(seconds_of(work, op) for op in stage_ops(work, index) if op.pass_ == pass_)
        )
    ops = list(stage_ops(work, index))
    assert stage.collectives.value == pytest.approx(
        sum(seconds_of(work, op) for op in ops if isinstance(op, Collective))
    )
    together = stage.arithmetic.value + stage.collectives.value + exchange_seconds(stage)
    assert together == pytest.approx(sum(seconds_of(work, op) for op in ops))


def test_pieces_lie_between_the_exchanges_as_their_operations_do() -> None:
    """In the order in which a layer lists them; shared experts, which need no exchange, go with the others. What is
    quantised to be dispatched backward is made by the layer above: of the same kind, with its attention."""
    layer = Costs().stages(V3)[5].layers[0]
    between: dict[str, float] = {}
    outside: dict[str, float] = {}
    for pass_ in ("forward", "dgrad"):
        is_between = False
        for op in layer_ops(V3.spec, 30, V3.layout, V3.recipe, V3.tokens, "training", V3.sequence_length):
            if op.pass_ != pass_:
                continue
            if isinstance(op, Exchange):
                is_between = op.name == "dispatch"
                continue
            found = between if is_between or op.part == "shared" else outside
            found[pass_] = found.get(pass_, 0.0) + seconds_of(V3, op)
    assert layer.mlp_f.value == pytest.approx(between["forward"])
    assert layer.attn_f.value == pytest.approx(outside["forward"])
    assert layer.mlp_b.value == pytest.approx(between["dgrad"])
    assert layer.attn_b.value == pytest.approx(outside["dgrad"])


def test_heads_stand_after_the_last_layer_and_wait_for_no_exchange() -> None:
    """DeepSeek-V3's last stage has one layer, the MTP module and two heads."""
    layer, mtp, heads = Costs().stages(V3)[15].layers
    assert layer == Costs().stages(V3)[5].layers[0]
    ops = head_ops(V3.spec, V3.layout, V3.tokens, "training")
    one = {pass_: sum(seconds_of(V3, op) for op in ops if op.pass_ == pass_) for pass_ in ("forward", "dgrad", "wgrad")}
    assert [heads.mlp_f.value, heads.mlp_b.value, heads.mlp_w.value] == pytest.approx(
        [2 * each for each in one.values()]
    )
    names = ("attn_f", "attn_b", "attn_w", *EXCHANGES)
    assert all(getattr(heads, name) == NOTHING for name in names)
    assert mtp.attn_f.value > layer.attn_f.value and mtp.mlp_f == layer.mlp_f


@pytest.mark.parametrize("schedule", ["dualpipe", "dualpipev"])
def test_pairs_are_of_mirrored_stages(schedule: str) -> None:
    layout = V3.layout.model_copy(update={"schedule": schedule, "pp": 4, "dp": 512, "microbatches": 30})
    costs, work = Costs(), replace(V3, layout=layout)
    each = costs.stages(work)
    assert len(each) == (4 if schedule == "dualpipe" else 8)
    for index, pair in enumerate(costs.pairs(work)):
        assert pair == pair_seconds(each[index], each[-1 - index])


def test_exchanges_take_multiprocessors_only_where_there_are_any() -> None:
    alone = replace(V3, layout=Layout(pp=16, dp=128))
    assert V3.multiprocessors == 112 and alone.multiprocessors == 132
    assert exchange_seconds(Costs().stages(alone)[5]) == 0


def test_costs_are_of_one_model_and_recipe() -> None:
    costs = Costs()
    costs.stages(V3)
    with pytest.raises(AssertionError):
        costs.stages(replace(V3, recipe=load_recipe("bf16")))
    with pytest.raises(AssertionError, match="sequence length"):
        costs.stages(replace(V3, sequence_length=8192))


def test_what_is_kept_is_not_made_again() -> None:
    made, kept = (Costs().stages(replace(V3, recompute=recompute))[5] for recompute in (True, False))
    assert kept.input_backward.value < made.input_backward.value
    assert (kept.forward, kept.weight_backward) == (made.forward, made.weight_backward)


@pytest.mark.parametrize("microbatches", [1, 2])  # one: nothing is added to its gradients
@pytest.mark.parametrize("recompute", [True, False])
def test_what_explains_a_layer_is_what_the_plan_runs(microbatches: int, recompute: bool) -> None:
    work = replace(V3, layout=Layout(microbatches=microbatches), recompute=recompute)
    spec = work.spec.model_copy(update={"num_hidden_layers": 1, "num_nextn_predict_layers": 0})
    lone = replace(work, spec=spec.model_copy(update={"moe": spec.moe.model_copy(update={"first_k_dense_replace": 0})}))
    (stage,) = Costs().stages(lone)
    embedding = sum_bands(op_time(op, lone.cluster.gpu).seconds for op in operations(lone, "embedding"))
    explained = sum_bands(figure.band for figure in layer_figures(lone)) / 1e3
    assert explained.value == pytest.approx((stage.forward + stage.backward - embedding).value)
