"""Times and bytes of exchanges: DeepEP's own measurements come out as they went in, and bytes follow the routing."""

import math

import numpy as np
import pytest
import torch

from dovetail.catalog.hardware import load_cluster
from dovetail.catalog.presets import load_model
from dovetail.cost.ops.ops import Collective, Exchange
from dovetail.model.experts.gate import select
from dovetail.network.demands.closed_forms import (
    NOTHING,
    Mode,
    collective_time,
    exchange_bytes,
    exchange_time,
    send_time,
)
from dovetail.spec.hardware import Cluster

H800 = load_cluster("h800-2048")


def exchange(ranks: int, tokens: float = 4096, name: str = "dispatch", **changes: object) -> Exchange:
    given = {"pass_": "forward", "choices": 8, "experts": 256, "groups": 8, "kept_groups": 4, "ranks": ranks}
    size = 7392 if name == "dispatch" else 14336
    return Exchange(**{"name": name, "tokens": tokens, "bytes_per_copy": size, **given, **changes})


def without_points(cluster: Cluster) -> Cluster:
    efficiency = cluster.gpu.efficiency.model_copy(update={"exchanges": ()})
    gpu = cluster.gpu.model_copy(update={"efficiency": efficiency, "name": "unmeasured"})
    return cluster.model_copy(update={"gpu": gpu, "name": "unmeasured"})


@pytest.mark.parametrize(
    ("name", "ranks", "microseconds"),
    [
        ("dispatch", 8, 77),
        ("dispatch", 32, 155),
        ("dispatch", 128, 192),
        ("combine", 8, 114),
        ("combine", 32, 273),
        ("combine", 128, 369),
    ],
)
def test_low_latency_times_as_published(name: str, ranks: int, microseconds: float) -> None:
    """[DeepEP]: 128 tokens, top 8."""
    size = 7408 if name == "dispatch" else 14336
    found = exchange_time(exchange(ranks, 128, name, bytes_per_copy=size), H800, "low-latency")
    assert found.seconds.value == pytest.approx(microseconds * 1e-6)
    assert found.is_measured


@pytest.mark.parametrize(
    ("name", "ranks", "gbs"),
    [("dispatch", 16, 43.05), ("combine", 32, 56.96), ("dispatch", 64, 50.58), ("combine", 128, 41.60)],
)
def test_normal_exchanges_run_at_the_published_rate(name: str, ranks: int, gbs: float) -> None:
    """[ISCA Fig. 7]: bytes to every distinct node, its own included, over the time."""
    one = exchange(ranks, name=name)
    copies = exchange_bytes(one, 8).scale_out / (1 - 8 / ranks)
    found = exchange_time(one, H800)
    assert copies / found.seconds.value == pytest.approx(gbs * 1e9)
    assert found.is_measured and found.seconds.high / found.seconds.low < 1.15


def test_fewer_tokens_take_less_but_never_less_than_the_latency() -> None:
    times = [exchange_time(exchange(64, tokens), H800).seconds.value for tokens in (1, 128, 2048, 4096)]
    assert times == sorted(times)
    assert 3e-6 < times[0] < 6e-6  # [ISCA Table 5]: 3.7 us between leaves
    assert times[3] / times[2] == pytest.approx(2, rel=0.01)
    assert exchange_time(exchange(64, 0), H800) is NOTHING
    assert exchange_time(exchange(1), H800) is NOTHING


def test_other_rank_counts_are_told_and_wider() -> None:
    measured, between, beyond = (exchange_time(exchange(ranks, experts=512), H800) for ranks in (64, 96, 256))
    assert [each.is_measured for each in (measured, between, beyond)] == [True, False, False]
    widths = [each.seconds.high / each.seconds.low for each in (measured, between, beyond)]
    assert widths == sorted(widths)
    assert "256 ranks, from 16, 32, 64, 128 ranks" in beyond.formula


def test_a_rate_between_two_measured_ones_lies_between_them() -> None:
    times = [exchange_time(exchange(ranks, 128), H800, "low-latency").seconds.value for ranks in (32, 64, 128)]
    assert times[0] < times[1] < times[2]


def simulated_bytes(ranks: int, tokens: int = 1500) -> tuple[float, float]:
    """Messages of rank 0 by link: one per node that has an expert, passed on there once per rank; per token."""
    moe = load_model("deepseek-v3").moe
    assert moe
    scores = torch.from_numpy(np.random.default_rng(1).normal(size=(tokens, 256))).sigmoid()
    network = nvlink = 0
    rng = np.random.default_rng(2)
    for chosen in select(scores, moe).numpy():
        home = rng.integers(ranks)
        targets = {int(expert) // (256 // ranks) for expert in chosen}
        network += len({rank // 8 for rank in targets} - {home // 8})
        nvlink += sum(rank % 8 != home % 8 for rank in targets)  # it arrived at the GPU of the same index
    return nvlink / tokens, network / tokens


@pytest.mark.parametrize("ranks", [8, 16, 32, 64, 128])
def test_bytes_per_link_are_those_of_routed_tokens(ranks: int) -> None:
    found = exchange_bytes(exchange(ranks, 1, bytes_per_copy=1), 8)
    nvlink, network = simulated_bytes(ranks)
    assert found.scale_up == pytest.approx(nvlink, rel=0.02)
    assert found.scale_out == pytest.approx(network, rel=0.02)


def test_low_latency_messages_are_not_joined() -> None:
    found = exchange_bytes(exchange(128, 1, bytes_per_copy=1), 8, "low-latency")
    assert found.scale_up + found.scale_out == pytest.approx(8 * 127 / 128)
    assert found.scale_out == 8 * 120 / 128


@pytest.mark.parametrize("mode", ["normal", "low-latency"])
def test_unmeasured_gpus_are_bound_by_their_links(mode: Mode) -> None:
    """Within a quarter of what is measured, and it says that it is not."""
    one = exchange(64, 4096 if mode == "normal" else 128)
    measured, guessed = exchange_time(one, H800, mode), exchange_time(one, without_points(H800), mode)
    assert not guessed.is_measured and guessed.bound == "scale-out"
    assert guessed.seconds.value == pytest.approx(measured.seconds.value, rel=0.25)
    assert guessed.seconds.high / guessed.seconds.low > measured.seconds.high / measured.seconds.low


def test_the_speed_limit_of_the_paper() -> None:
    """[ISCA §2.3.2]: 9 copies of 7,000 values for 32 tokens at 50 GB/s; dispatch in 1 byte and combine in 2 are
    120.96 us. A link of that rate reaches it, without latency, where every message leaves the node."""
    sent = sum(
        exchange_bytes(exchange(256, 32, choices=9, bytes_per_copy=7000 * width), 1, "low-latency").scale_out
        for width in (1, 2)
    )
    assert sent * 256 / 255 / 50e9 == pytest.approx(120.96e-6)


def ring(name: str, bytes_: float, ranks: int, stride: int = 1) -> Collective:
    return Collective(name=name, pass_="wgrad", bytes=bytes_, ranks=ranks, stride=stride)


def test_rings() -> None:
    up, out = H800.scale_up, H800.scale_out
    assert out
    inside = collective_time(ring("all_gather", 8e9, 8), H800).seconds.value
    assert inside == pytest.approx(7e9 / up.bandwidth.value + 7 * up.latency.value)
    apart = collective_time(ring("reduce_scatter", 8e9, 4, stride=64), H800).seconds.value
    assert apart == pytest.approx(6e9 / out.bandwidth.value + 3 * out.latency.value)
    both = collective_time(ring("reduce_scatter", 8e9, 32), H800).seconds.value
    assert both == pytest.approx(inside + 0.75e9 / out.bandwidth.value + 3 * out.latency.value)
    assert collective_time(ring("all_reduce", 8e9, 32), H800).seconds.value == pytest.approx(2 * both)
    assert collective_time(ring("all_reduce", 8e9, 1), H800) is NOTHING


def test_sends_between_stages() -> None:
    out = H800.scale_out
    assert out
    found = send_time(4096 * 7168 * 2, H800)
    assert found.seconds.value == pytest.approx(4096 * 7168 * 2 / out.bandwidth.value + out.latency.value)
    assert send_time(4096 * 7168 * 2, H800, is_within_node=True).seconds.value < found.seconds.value / 3
    assert send_time(0, H800).seconds.value == 0


def test_ranks_that_there_are_not() -> None:
    with pytest.raises(ValueError, match="experts over 4096 ranks, but h800-2048 has 2048 GPUs"):
        exchange_time(exchange(4096, experts=4096), H800)
    alone = H800.model_copy(update={"nodes": 2, "scale_out": None, "name": "apart"})
    with pytest.raises(ValueError, match="apart has no .scale_out. link"):
        exchange_time(exchange(16), alone)
    assert math.isfinite(exchange_time(exchange(8), alone).seconds.value)


def test_rates_over_another_link_are_not_this_clusters() -> None:
    """DeepSeek's 400 Gb/s network says nothing about one of 800 or 200."""
    assert H800.scale_out
    for gbs in (100.0, 25.0):
        factor = gbs / 50
        reached = H800.scale_out.achieved_gbs.model_copy(
            update={"value": 40 * factor, "low": 38 * factor, "high": 45 * factor}
        )
        link = H800.scale_out.model_copy(update={"gbs": gbs, "achieved_gbs": reached})
        other = H800.model_copy(update={"scale_out": link, "name": f"{gbs:g} GB/s"})
        for mode, tokens in (("normal", 4096), ("low-latency", 4096)):
            here, there = (
                exchange_time(exchange(64, tokens), H800, mode),
                exchange_time(exchange(64, tokens), other, mode),
            )
            assert not there.is_measured
            assert there.seconds.value / here.seconds.value == pytest.approx(1 / factor, rel=0.25)
        within = exchange_time(exchange(8, 4096), other)
        assert within.is_measured and within.seconds == exchange_time(exchange(8, 4096), H800).seconds
