"""How the sum of a product is kept, as data: what references, kernels and recipes name it by.

`accumulate` says what each does, and does it.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from dovetail.numerics.formats.floats import float_format

GROUP = 32  # products that the Tensor Core adds at once [V3 §3.5.2]
FRACTION_BITS = 13  # kept below the largest exponent, and in FP22 [ISCA §3.1.1]
PROMOTION = 128  # N_C, elements of K between promotions to FP32 [V3 §3.3.2]


@dataclass(frozen=True, slots=True)
class Fp32Accumulator:
    """FP32 throughout. Of each pair of k the odd one is added first, as VDPBF16PS does, so that a CPU kernel made of
    it can be held to the bits; a scale applies to the sum over its tile."""


@dataclass(frozen=True, slots=True)
class HopperAccumulator:
    """Hopper's FP8 Tensor Core; its sum is added to FP32 and starts anew every `promotion` of K, or never if None."""

    promotion: int | None = PROMOTION

    def __post_init__(self) -> None:
        if self.promotion is not None and (self.promotion < GROUP or self.promotion % GROUP):
            raise ValueError(
                f"promotion = {self.promotion} is no multiple of the {GROUP} products that are added at once"
            )


Accumulator = Fp32Accumulator | HopperAccumulator
FP32, HOPPER = Fp32Accumulator(), HopperAccumulator()


@dataclass(frozen=True, slots=True, kw_only=True)
class Scales:
    """What the values of a [M, K] and b [N, K] are multiplied by: one number per row and `width` elements of K."""

    a: Tensor  # FP32 [M, ceil(K / width)]
    b: Tensor  # FP32 [N, ceil(K / width)]
    width: int


def least_exponents(formats: tuple[str, str]) -> tuple[int, int]:
    """Of the smallest normal numbers, from which on the Tensor Core aligns their products."""
    return 1 - float_format(formats[0]).bias, 1 - float_format(formats[1]).bias
