"""Lists the keys of all figures of plans, so that `--explain` is checked before there is a plan."""

from __future__ import annotations

from dovetail.config import near_matches

STEP = ("step_time", "forward", "input_backward", "weight_backward", "pair", "bubble", "optimizer")
RATES = ("tokens_per_day", "tflops", "mfu", "tflops_causal", "mfu_causal", "memory", "days", "gpu_hours", "dollars")
EXCHANGES = ("dispatch", "dispatch_backward", "combine", "combine_backward")
MULTIPLIED = ("attention", "gate", "experts", "shared", "mlp", "head")  # in the forward pass and twice in the backward
BOTH_POOLS = (
    *("step_seconds", "experts", "shared_experts", "waiting_for_exchanges", "dense_layers", "embedding_and_head"),
    *("MTP", "weights"),
)
PREFILL = ("attention_and_gate", "computed", "computed_node", "input", "input_node", "ttft", "activations")
DECODE = (
    *("attention_projections", "attention_core_o_proj_gate", "kernels_of_exchanges", "communication", "buffers"),
    *("tpot", "speed", "tokens", "tokens_node", "requests", "requests_that_fit", "cache"),
)
SERVING = ("limit.tpot", "limit.tpot_latency", "limit.speed", "pools", "dollars_input", "dollars_output")

KEYS: dict[str, tuple[str, ...]] = {  # by goal; a plan has those that its model and its goal have
    "train": (
        *(*STEP, *RATES, *EXCHANGES),
        *(name + suffix for name in MULTIPLIED for suffix in ("", "_backward", "_weights")),
    ),
    "serve": (
        *(f"prefill.{name}" for name in (*BOTH_POOLS, *PREFILL)),
        *(f"decode.{name}" for name in (*BOTH_POOLS, *DECODE)),
        *SERVING,
    ),
}


def check_key(key: str, goal: str) -> None:
    """Raise ValueError with near matches, or all keys, for one that no plan of this goal has a figure of."""
    if key not in KEYS[goal]:
        known = near_matches(key, KEYS[goal]) or f"known: {', '.join(KEYS[goal])}"
        raise ValueError(f"no figure {key!r} to explain; {known}")
