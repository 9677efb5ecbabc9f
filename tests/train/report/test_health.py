"""Health of operands: known tensors, and a real step watched."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from dovetail.catalog.precision import load_recipe
from dovetail.model.precision import apply_recipe
from dovetail.model.transformer import Transformer
from dovetail.numerics.operands.health import Health, measure_health
from dovetail.numerics.operands.operands import quantize_rows
from dovetail.spec.model import ModelSpec
from dovetail.spec.precision import Quantization
from dovetail.train.report.health import watch

Draw = Callable[..., Tensor]


def health_of(x: Tensor, quantization: Quantization) -> Health:
    return measure_health(x, quantize_rows(x, quantization))


def test_health_of_known_rows() -> None:
    x = torch.zeros(2, 128, dtype=torch.bfloat16)
    x[0, :4] = torch.tensor([448.0, 1.0, 2.0**-10, 2.0**-11])  # the last two lie at half a step and below
    x[1, 0] = 1.0
    health = health_of(x, Quantization())
    assert health.flushed == pytest.approx(2 / 5)
    assert health.clipped == 0.0
    assert (health.smallest_scale, health.largest_scale) == (pytest.approx(1 / 448), 1.0)
    noise = 2.0**-20 + 2.0**-22
    assert health.signal_to_noise == pytest.approx(10 * math.log10((448**2 + 2) / noise), rel=1e-3)


def test_nothing_lost_nothing_there() -> None:
    zeros = health_of(torch.zeros(3, 200, dtype=torch.bfloat16), Quantization())
    assert (zeros.flushed, zeros.clipped, zeros.signal_to_noise) == (0.0, 0.0, math.inf)


def test_e4m3_has_about_thirty_decibel_and_tiles_help(draw: Draw) -> None:
    """Errors of E4M3 are uniform within 2^-4 of the value: 31 to 32 dB; one scale for all flushes small rows."""
    x = (draw(256, 256) * torch.exp2(torch.linspace(-36, 0, 256))[:, None]).bfloat16()
    tiles, tensor = (health_of(x, Quantization(tile=tile)) for tile in ("row", "tensor"))
    assert 30 < tiles.signal_to_noise < 34
    assert tiles.flushed < 0.2 < 0.4 < tensor.flushed


def test_a_step_is_watched_without_changing_it(
    tiny_spec: Callable[..., ModelSpec], random_model: Callable[..., Transformer]
) -> None:
    tokens, results = torch.arange(48).view(2, 24) % 96, []
    for is_watched in (False, True):
        model = random_model(tiny_spec(), dtype=torch.bfloat16)
        apply_recipe(model, load_recipe("deepseek-v3"))
        if is_watched:
            with watch([model]) as layers:
                model(tokens).hidden.float().square().mean().backward()
        else:
            model(tokens).hidden.float().square().mean().backward()
        results.append({name: each.grad for name, each in model.named_parameters() if each.grad is not None})
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])
    ran = {name: each.health for name, each in layers.items() if not name.startswith("mtp")}
    assert set(ran["layers.0.self_attn.o_proj"]) == {"weight", "input", "grad"}
    assert set(ran["layers.1.mlp.experts"]) == {"up_weight", "down_weight", "input", "grad"}
    for name, health in ran.items():
        for operand, each in health.items():
            assert each.signal_to_noise > 20, (name, operand)
            assert each.clipped == 0.0, (name, operand)
