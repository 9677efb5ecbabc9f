"""Tables 1 and 2 of the ISCA paper, counted from the model descriptions [ISCA §2.1.2, §2.2.2]."""

from __future__ import annotations

from dovetail.catalog.presets import load_model
from dovetail.cost import count
from dovetail.reproduce.rows import Found
from dovetail.spec.band import Band
from dovetail.spec.model import ModelSpec

CONTEXT = 4096  # tokens [ISCA Table 2]
CACHED = ("deepseek-v3", "qwen2.5-72b", "llama-3.1-405b")  # models of Table 1
TRAINED = ("deepseek-v2", "deepseek-v3", "qwen2.5-72b", "llama-3.1-405b")  # of Table 2


def cache() -> Found:
    """Count the KV cache per token in BF16."""
    least = count.cache_bytes_per_token(load_model("deepseek-v3"))
    values = {}
    for name in CACHED:
        size = count.cache_bytes_per_token(load_model(name))
        values[name, "KB per token"] = Band.exact(size / 1000)
        values[name, "times DeepSeek-V3"] = Band.exact(size / least)
    return Found(values=values)


def compute() -> Found:
    """Count the parameters and the training FLOP per token."""
    values = {}
    for name in TRAINED:
        for quantity, value in _compute(load_model(name)).items():
            values[name, quantity] = Band.exact(value)
    return Found(values=values)


def _compute(spec: ModelSpec) -> dict[str, float]:
    parameters = count.parameters(spec)
    return {
        "parameters, B": parameters.total / 1e9,
        "active parameters, B": parameters.active / 1e9,
        "GFLOP per token": count.training_flop_per_token(spec, CONTEXT) / 1e9,
    }
