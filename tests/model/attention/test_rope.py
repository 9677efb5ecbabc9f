"""Rotation and YaRN: published numbers, the interleaved layout, precision at far positions."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from dovetail.catalog.presets import load_model
from dovetail.model.attention.rope import attention_scale, frequencies, rotate, tables, yarn_mscale
from dovetail.numerics.formats.errors import elementwise_error, normwise_error, tolerance
from dovetail.spec.hf_config import read_hf, write_hf
from dovetail.spec.model import ModelSpec

Draw = Callable[..., Tensor]
SpecFactory = Callable[..., ModelSpec]
V3 = load_model("deepseek-v3")


def test_yarn_of_v3() -> None:
    """Range, temperature and softmax scale of the published model [V3 §4.3; V3repo model.py]."""
    yarn = V3.rope_scaling
    assert yarn is not None
    assert yarn.blended_pairs(64, 10000.0) == (10, 23)
    assert round(yarn_mscale(40, 1.0), 5) == 1.36889
    assert round(yarn_mscale(40, 1.0) ** 2, 6) == 1.873854
    assert round(attention_scale(V3, 192), 7) == 0.1352338


def test_yarn_of_v2_lite() -> None:
    lite = load_model("deepseek-v2-lite")
    assert round(yarn_mscale(40, 0.707), 5) == 1.26080
    assert round(attention_scale(lite, 192), 7) == 0.1147214


def test_yarn_frequencies_of_v3() -> None:
    """Pairs up to 10 as they were, from 23 on divided by 40, a straight blend between."""
    plain = 10000.0 ** (-torch.arange(0, 64, 2, dtype=torch.float64) / 64)
    ramp = ((torch.arange(32) - 10) / 13).clamp(0, 1).double()
    bound = tolerance(torch.float32, terms=4)
    assert elementwise_error(frequencies(V3, 64), plain * (1 - ramp) + plain / 40 * ramp) < bound
    off_by_one = ((torch.arange(32) - 11) / 13).clamp(0, 1).double()
    assert elementwise_error(frequencies(V3, 64), plain * (1 - off_by_one) + plain / 40 * off_by_one) > 100 * bound


def test_without_yarn(tiny_spec: SpecFactory) -> None:
    spec = tiny_spec(rope_theta=500.0)
    plain = 500.0 ** (-torch.arange(0, 8, 2, dtype=torch.float64) / 8)
    assert elementwise_error(frequencies(spec, 8), plain) < tolerance(torch.float32, terms=4)
    assert attention_scale(spec, 24) == 24**-0.5


@pytest.mark.parametrize(
    ("keys", "magnitude", "temperature"),
    [
        ({"mscale": 1.0, "mscale_all_dim": 1.0}, 1.0, 1.0),
        ({"mscale": 0.707, "mscale_all_dim": 0.707}, 1.0, 0.707),
        ({"mscale": 1.0, "mscale_all_dim": 0.0}, 1.0 + 0.1 * math.log(4), 0.0),
        ({}, 1.0 + 0.1 * math.log(4), 0.0),  # absent from a config.json they are 1 and 0
    ],
    ids=str,
)
def test_where_the_temperature_goes(
    keys: dict[str, float], magnitude: float, temperature: float, tiny_spec: SpecFactory
) -> None:
    """To the softmax scale by mscale_all_dim, and to cosine and sine by the ratio of the two."""
    scaling = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, **keys}
    spec = read_hf({**write_hf(tiny_spec()), "rope_scaling": scaling})
    cos, sin = tables(spec, 8, torch.arange(5)[None])
    assert normwise_error((cos**2 + sin**2).sqrt(), torch.full((1, 5, 4), magnitude)) < tolerance(torch.float32)
    expected = 24**-0.5 * (1 + 0.1 * temperature * math.log(4)) ** 2
    assert math.isclose(attention_scale(spec, 24), expected)


def test_pairs_are_interleaved(draw: Draw) -> None:
    """Dimensions (2i, 2i + 1) as one complex number times e^(i angle)."""
    x, angles = draw(2, 5, 8), draw(2, 5, 4, scale=5.0)
    rotated = rotate(x, angles.cos(), angles.sin())
    product = torch.view_as_complex(x.double().unflatten(-1, (4, 2))) * torch.exp(1j * angles.double())
    assert normwise_error(rotated, torch.view_as_real(product).flatten(-2)) < tolerance(torch.float32, terms=2)


def half_split(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, first * sin + second * cos), dim=-1)


def test_half_split_agrees_only_after_the_permutation(draw: Draw) -> None:
    q, k, angles = draw(6, 8), draw(6, 8), draw(6, 4, scale=5.0)
    cos, sin = angles.cos(), angles.sin()
    scores = rotate(q, cos, sin) @ rotate(k, cos, sin).t()
    permuted = [torch.cat((x[:, 0::2], x[:, 1::2]), dim=-1) for x in (q, k)]
    theirs = half_split(permuted[0], cos, sin) @ half_split(permuted[1], cos, sin).t()
    wrong = half_split(q, cos, sin) @ half_split(k, cos, sin).t()
    bound = tolerance(torch.float32, terms=16)
    assert normwise_error(scores, theirs) < bound < 1e-3 < normwise_error(scores, wrong)


def test_scores_depend_on_distance_alone(draw: Draw, tiny_spec: SpecFactory) -> None:
    spec, q, k = tiny_spec(), draw(1, 1, 8), draw(1, 1, 8)
    scores = []
    for shift in (0, 1000):
        at = [tables(spec, 8, torch.tensor([[place + shift]])) for place in (9, 4)]
        scores.append((rotate(q, *at[0]) * rotate(k, *at[1])).sum())
    # FP32 angles near 1000 are wrong by up to 1000 u
    assert abs(scores[0] - scores[1]) < (q.norm() * k.norm()) * tolerance(torch.float32, roundings=2 * 1009)


def test_bf16_is_rotated_in_fp32_and_rounded_once(draw: Draw) -> None:
    x = draw(3, 4, 64, dtype=torch.bfloat16)
    cos, sin = tables(V3, 64, torch.tensor([[4000, 4001, 100_000, 160_000]]))
    assert cos.dtype == sin.dtype == torch.float32
    rotated = rotate(x, cos, sin)
    assert torch.equal(rotated, rotate(x.float(), cos, sin).to(torch.bfloat16))
    low = rotate(x, cos.bfloat16().float(), sin.bfloat16().float())
    assert not torch.equal(rotated, low)


def test_no_positions_and_one(tiny_spec: SpecFactory, draw: Draw) -> None:
    cos, sin = tables(tiny_spec(), 8, torch.zeros(2, 0, dtype=torch.int64))
    assert rotate(draw(2, 0, 8), cos, sin).shape == (2, 0, 8)
    x = draw(1, 1, 8)
    assert torch.equal(rotate(x, *tables(tiny_spec(), 8, torch.zeros(1, 1, dtype=torch.int64))), x)
