"""The cost of training and the size of the deployment, by arithmetic on published numbers.

The numbers are from [V3 Table 1] and [day 6; V3 §3.4]. A number that is printed with few digits has a band, which is
what its rounding leaves open.
"""

from __future__ import annotations

from dovetail.catalog.hardware import load_cluster
from dovetail.catalog.presets import load_model
from dovetail.cost.count import cache_bytes_per_token
from dovetail.planner.limits import DAY, nodes_for, rent
from dovetail.planner.serving import production
from dovetail.reproduce.rows import Found, rounded
from dovetail.spec.band import Band
from dovetail.spec.layout import Layout

GPU_HOURS = {"pre-training": 2664e3, "context extension": 119e3, "post-training": 5e3}  # H800 [V3 Table 1]
TOKENS = 14.8e12  # of pre-training [V3 §4]
STEP_SECONDS, STEP_TOKENS = 19.926, 15360 * 4096  # [ISCA Table 4; V3 §4.2]
MEAN_NODES = 226.75  # [day 6]
PRICES = {"hits": 0.14e-6, "misses": 0.55e-6, "outputs": 2.19e-6}  # dollars per token of R1 [day 6]
INCOME = 562027.0  # dollars a day, theoretical [day 6]
LONGEST = 131072  # tokens of a request [FlashMLA]
V3_DECODE = Layout(ep=320, dp=320, redundant_experts=64)  # 64 of 320 GPUs hold redundant and shared experts [V3 §3.4.2]
V3_PREFILL = Layout(ep=32, dp=32, redundant_experts=32)  # [V3 §3.4.1]


def cost() -> Found:
    """Compute the hours, dollars and days of training."""
    cluster = load_cluster("h800-2048")
    assert cluster.price is not None
    price, hours = cluster.price.value, sum(GPU_HOURS.values())
    per_trillion = GPU_HOURS["pre-training"] / (TOKENS / 1e12)
    by_steps = cluster.gpus / 3600 * rounded(STEP_SECONDS, 0.001) / STEP_TOKENS * 1e12
    values = {(phase, "million $"): Band.exact(price * each / 1e6) for phase, each in GPU_HOURS.items()}
    values |= {
        ("all of it", "thousand GPU hours"): Band.exact(hours / 1e3),
        ("all of it", "million $"): Band.exact(price * hours / 1e6),
        ("a trillion tokens", "thousand GPU hours"): Band.exact(per_trillion / 1e3),
        ("a trillion tokens, by the step's time", "thousand GPU hours"): by_steps / 1e3,
        ("a trillion tokens", "days on 2,048 GPUs"): Band.exact(per_trillion / cluster.gpus / 24),
        ("pre-training", "days on 2,048 GPUs"): Band.exact(GPU_HOURS["pre-training"] / cluster.gpus / 24),
    }
    return Found(values=values)


def deployment() -> Found:
    """Compute experts on GPUs, nodes, money and cache."""
    spec = load_model("deepseek-v3")
    assert spec.moe is not None
    values = {}
    units = {
        "prefill, EP32": production.PREFILL_LAYOUT,
        "decode, EP144": production.DECODE_LAYOUT,
        "V3's prefill, EP32": V3_PREFILL,
        "V3's decode, EP320": V3_DECODE,
    }
    for name, layout in units.items():
        values[name, "routed experts per GPU"] = Band.exact(layout.experts_per_rank(spec))
        values[name, "slots"] = Band.exact(spec.moe.n_routed_experts + layout.redundant_experts)
    per_token = cache_bytes_per_token(spec)
    gpus = load_cluster("h800-decode").gpus_per_node
    live = production.OUTPUT_PER_NODE / gpus / Band(21.0, *production.SPEEDS)
    values |= _day()
    values |= {
        ("a GPU that decodes", "requests, at 20 to 22 tokens/s"): live,
        ("a GPU that decodes", "GB of latents of these"): live * (production.CONTEXT * per_token / 1e9),
        ("a request of 128K tokens", "GiB of latents, MTP's too"): Band.exact(
            cache_bytes_per_token(spec, mtp=True) * LONGEST / 2**30
        ),
    }
    return Found(values=values)


def _day() -> dict[tuple[str, str], Band]:
    """Compute the nodes and the money of the published 24 hours."""
    cluster = load_cluster("h800-decode")
    assert cluster.price is not None
    read, hits = rounded(production.INPUT_TOKENS, 1e9), rounded(production.HIT_TOKENS, 1e9)
    written = rounded(production.OUTPUT_TOKENS, 1e9)
    prefill = nodes_for(read, DAY, rounded(production.INPUT_PER_NODE, 100))
    decode = nodes_for(written, DAY, rounded(production.OUTPUT_PER_NODE, 100))
    dollars = rent(MEAN_NODES, cluster.gpus_per_node, cluster.price.value)
    income = PRICES["hits"] * hits + PRICES["misses"] * (read - hits) + PRICES["outputs"] * written
    return {
        ("the day", "nodes that prefill"): prefill,
        ("the day", "nodes that decode"): decode,
        ("the day", "nodes, mean"): prefill + decode,
        ("the day", "$ for GPUs"): Band.exact(dollars),
        ("the day", "input found in the cache, %"): 100 * hits / read,
        ("the day", "$ of income"): income,
        ("the day", "income over cost, %"): Band.exact(100 * (INCOME / dollars - 1)),
    }
