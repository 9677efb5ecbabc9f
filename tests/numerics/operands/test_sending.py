"""Sent and received: the order of the formats, the gradient, the names."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from dovetail.numerics.operands.sending import check_sent_format, sent

Draw = Callable[..., Tensor]


def test_the_order_of_the_formats_on_gaussian_rows(draw: Draw) -> None:
    """As published for tiles of 128 [ISCA §3.2]: LogFMT-8 is more accurate than E4M3, which is than E5M2."""
    x = draw(40, 300, dtype=torch.bfloat16)
    errors = [
        float((sent(x, name).double() - x.double()).square().mean())
        for name in ("logfmt-10", "logfmt-8", "e4m3", "e5m2")
    ]
    assert 0 < errors[0] < errors[1] < errors[2] < errors[3]


@pytest.mark.parametrize("name", ["logfmt-8", "e4m3"])
def test_the_gradient_passes_as_it_is(name: str, draw: Draw) -> None:
    x, grad = draw(3, 130, dtype=torch.bfloat16).requires_grad_(), draw(3, 130, dtype=torch.bfloat16)
    received = sent(x, name)
    assert received.dtype == x.dtype
    assert torch.equal(torch.autograd.grad(received, x, grad)[0], grad)


def test_zeros_and_nothing_arrive() -> None:
    for name in ("logfmt-8", "e4m3"):
        assert torch.equal(sent(torch.zeros(2, 140).bfloat16(), name), torch.zeros(2, 140).bfloat16())
        assert sent(torch.zeros(0, 140).bfloat16(), name).shape == (0, 140)


def test_names() -> None:
    for name in ("logfmt-4", "logfmt-12", "e4m3", "e5m2", "e5m6"):
        check_sent_format(name)
    for name in ("logfmt-3", "logfmt-13", "logfmt8", "LOGFMT-8"):
        with pytest.raises(ValueError, match=f"expert_output '{name}': LogFMT has 4 to 12 bits, logfmt-8"):
            check_sent_format(name)
    for name, remedy in {"e4n3": "did you mean e4m3", "bf16": "known: e3m4, e4m3", "e5m10": "1 to 7 mantissa"}.items():
        with pytest.raises(ValueError, match=f"(?s)cannot be '{name}'.*{remedy}"):
            check_sent_format(name)
