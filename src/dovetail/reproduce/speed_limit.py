"""The speed limit of decoding if only exchanges with experts take time [ISCA §2.3.2].

The paper's "7K" hidden size is 7000, which it does not say: with the model's 7168 none of its digits are met. The rows
with 7168, with the achieved bandwidth, and with the latency of every wait are for comparison.
"""

from __future__ import annotations

from dovetail.catalog.hardware import load_cluster
from dovetail.catalog.presets import load_model
from dovetail.planner.limits import PAPER_HIDDEN, SpeedLimit, speed_limit
from dovetail.reproduce.rows import Found
from dovetail.spec.band import Band

LINKS = {"400G InfiniBand": "h800-decode", "GB200 NVL72": "gb200-nvl72"}


def find() -> Found:
    spec = load_model("deepseek-v3")
    values: dict[tuple[str, str], Band] = {}
    for link, name in LINKS.items():
        cluster = load_cluster(name)
        for hidden in (PAPER_HIDDEN, spec.hidden_size):
            limit = speed_limit(spec, cluster, hidden=hidden)
            values |= {(f"{link}, hidden {hidden}", key): band for key, band in _figures(limit).items()}
        reached = speed_limit(spec, cluster, achieved=True)
        values[f"{link}, bandwidth reached", "token, with latency, ms"] = 1e3 * reached.token_with_latency
    return Found(values=values)


def _figures(limit: SpeedLimit) -> dict[str, Band]:
    return {
        "exchange, us": 1e6 * limit.exchange,
        "layer, us": 1e6 * limit.layer,
        "token, ms": 1e3 * limit.token,
        "tokens/s": limit.tokens_per_second,
    }
