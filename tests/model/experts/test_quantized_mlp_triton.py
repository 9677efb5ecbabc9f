"""A quantised feed-forward on a GPU: every operand bit for bit a CPU's, every product within the bound of its sums.

A product's last bit moves what is quantised next over a border now and then, and the two ways part. So each product of
the GPU's is compared where it is made, and the CPU's handed on: the end is then the CPU's bit for bit.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from dovetail.model.experts.quantized_mlp import MlpPrecision, quantized_mlp
from dovetail.numerics import products
from dovetail.numerics.formats.errors import rowwise_error, tolerance
from dovetail.numerics.formats.quantized import Quantized
from dovetail.numerics.products import scaled
from dovetail.numerics.products.accumulators import HOPPER
from dovetail.spec.precision import GemmPrecision, Quantization

pytest.importorskip("triton", reason="Triton is published for Linux only")

from dovetail.numerics.products import scaled_triton  # noqa: E402

Draw = Callable[..., Tensor]
DIM, WIDTH = 136, 72
OFFSETS = [0, 131, 131, 140]  # an expert without tokens, ragged tiles
PRECISIONS = {
    "as V3": MlpPrecision(up=GemmPrecision(), down=GemmPrecision(), saved_swiglu=Quantization()),
    "powers of two": MlpPrecision(
        up=GemmPrecision(input=Quantization(power_of_two=True)), down=GemmPrecision(), saved_swiglu=None
    ),
}


def run(parts: Sequence[Tensor], precision: MlpPrecision) -> list[Tensor]:
    """Output, and the gradients of rows and both weights."""
    *leaves, grad = (part.detach() for part in parts)
    for leaf in leaves:
        leaf.requires_grad_()
    output = quantized_mlp(*leaves, OFFSETS, precision)
    output.backward(grad)
    gradients = [leaf.grad for leaf in leaves]
    assert all(gradient is not None for gradient in gradients)
    return [each.detach().cpu() for each in (output, *gradients) if each is not None]


@pytest.fixture
def parts(draw: Draw) -> list[Tensor]:
    """Rows with zero ones among them, as padding is; gate and up; down; the output's gradient."""
    rows = draw(OFFSETS[-1], DIM, dtype=torch.bfloat16)
    rows[5:8] = 0
    weights = draw(3, 2 * WIDTH, DIM, scale=0.1), draw(3, DIM, WIDTH, scale=0.1)
    return [rows, *(weight.bfloat16() for weight in weights), draw(OFFSETS[-1], DIM, dtype=torch.bfloat16, scale=1e-3)]


@pytest.mark.skipif(torch.cuda.is_available(), reason="SwiGLU's exponential differs on a GPU")
@pytest.mark.parametrize("precision", PRECISIONS.values(), ids=PRECISIONS)
def test_forward_and_backward(
    precision: MlpPrecision,
    parts: list[Tensor],
    monkeypatch: pytest.MonkeyPatch,
    with_triton: Callable[[], object],
) -> None:
    expected, compared = run(parts, precision), []

    def checked(product: Callable[..., Tensor], reference: Callable[..., Tensor], terms: int) -> Callable[..., Tensor]:
        def call(left: Quantized, right: Quantized, offsets: list[int], accumulator: object) -> Tensor:
            assert accumulator == HOPPER  # whatever a recipe names, sums within a tile are the Tensor Core's
            ours = product(left, right, offsets, accumulator)
            plain = [replace(each, data=each.data.bfloat16().contiguous()) for each in (left, right)]
            cpu = reference(*plain, offsets)
            assert ours.dtype == cpu.dtype and ours.shape == cpu.shape
            assert rowwise_error(ours.flatten(0, -2), cpu.flatten(0, -2)) < 2 * tolerance(torch.bfloat16, terms=terms)
            compared.append(ours)
            return cpu

        return call

    terms = {"fprop": max(DIM, 2 * WIDTH), "dgrad": max(DIM, 2 * WIDTH), "wgrad": 131}
    stand_in = {name: checked(getattr(scaled_triton, name), getattr(scaled, name), terms[name]) for name in terms}
    monkeypatch.setattr(products, "scaled_triton", SimpleNamespace(**stand_in))
    with with_triton():
        ours = run(parts, precision)
    assert len(compared) == 6
    assert all(torch.equal(mine, cpu) for mine, cpu in zip(ours, expected, strict=True))
    assert not ours[2][1].any() and not ours[3][1].any()  # gradients of the expert without tokens


def test_on_its_own_it_stays_near(parts: list[Tensor], with_triton: Callable[[], object]) -> None:
    """All products the GPU's: as near to a CPU's result as E4M3 is to the values it rounds."""
    precision = PRECISIONS["as V3"]
    expected = run(parts, precision)
    with with_triton() as device:
        ours = run([part.to(device) for part in parts], precision)
    for mine, cpu in zip(ours, expected, strict=True):
        assert rowwise_error(mine.flatten(0, -2), cpu.flatten(0, -2)) < 2.0**-4
