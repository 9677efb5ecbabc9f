"""Serving: weights are the published checkpoint's bytes, buffers DeepEP's, and the rest holds the cache."""

import math

import pytest

from dovetail.catalog.presets import load_model
from dovetail.cost.count import cache_bytes_per_token
from dovetail.cost.memory.inference import inference_memory, low_latency_buffer
from dovetail.cost.memory.process import weight_bytes
from dovetail.spec.layout import Layout
from dovetail.spec.tensors import published_tensors, stored_tensors

V3 = load_model("deepseek-v3")
DECODE = Layout(dp=144, ep=144, redundant_experts=32)
SIZES = {"F8_E4M3": 1, "BF16": 2, "F32": 4}


def test_one_rank_holds_the_published_files() -> None:
    """Codes and scales, MTP included, but for the copies of embedding and head in the MTP layer."""
    copies = {tensor.name for tensor in stored_tensors(V3) if tensor.copy_of}
    published = sum(
        math.prod(shape) * SIZES[dtype] for name, shape, dtype in published_tensors(V3, fp8=True) if name not in copies
    )
    assert inference_memory(V3, Layout(), absorbed=False, mtp=True).weights == published
    assert inference_memory(V3, Layout(), fp8=False, mtp=True).weights == weight_bytes(V3)


def test_ranks_together_hold_redundant_experts_too() -> None:
    one = inference_memory(V3, Layout(), absorbed=False)
    each = inference_memory(V3, DECODE, absorbed=False)
    assert each.experts * 144 * 256 == one.experts * 288
    assert each.others == one.others


def test_absorbed_attention_keeps_kv_b_in_bf16() -> None:
    coded, absorbed = (inference_memory(V3, DECODE, absorbed=each).others for each in (False, True))
    assert absorbed - coded == 61 * 32768 * 512 * (1 - 4 / 128**2)


def test_tensor_parallel_ranks_share_heads_and_not_latents() -> None:
    whole, split = (inference_memory(V3, Layout(dp=8 // tp, tp=tp, ep=8)) for tp in (1, 4))
    heads = 61 * (24576 * 1536 * (1 + 4 / 128**2) + 2 * 32768 * 512 + 7168 * 16384 * (1 + 4 / 128**2))
    assert whole.others - split.others == 0.75 * heads
    assert whole.cache_per_token == split.cache_per_token == cache_bytes_per_token(V3)


def test_cache_of_mtp_of_eight_bits_and_of_a_stage() -> None:
    assert inference_memory(V3, DECODE, mtp=True).cache_per_token == 62 * 576 * 2
    assert inference_memory(V3, DECODE, cache_element_bytes=1).cache_per_token == 61 * 576
    stage = Layout(pp=61, ep=1)
    assert inference_memory(V3, stage, rank=7).cache_per_token == 576 * 2


def test_low_latency_buffers() -> None:
    """[DeepEP]: 1.78 GiB for 128 tokens per rank and 256 experts."""
    assert low_latency_buffer(7168, 128, 256) / 2**30 == pytest.approx(1.78, abs=0.005)
    assert low_latency_buffer(7168, 0, 256) == 0
    assert inference_memory(V3, DECODE, low_latency_tokens=128).buffers == low_latency_buffer(7168, 128, 288)


def test_production_requests_fit_with_room() -> None:
    """[day 6]: 14.8k tokens/s per node at 20 to 22 for each user are up to 92 requests per GPU of 4,989 tokens."""
    held = inference_memory(V3, DECODE, mtp=True, low_latency_tokens=128)
    tokens = held.tokens_that_fit(84.9e9, reserved=4e9)
    assert 92 * 4989 < tokens < 2 * 92 * 4989
    assert held.weights + held.buffers + tokens * held.cache_per_token <= 84.9e9 - 4e9


def test_a_node_of_h800_does_not_hold_the_model() -> None:
    held = inference_memory(V3, Layout(dp=8, ep=8))
    assert held.weights > 84.9e9
    assert held.tokens_that_fit(84.9e9) == 0
    assert held.tokens_that_fit(141e9) > 100_000  # eight H200
