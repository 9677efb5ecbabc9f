"""The operations of one linear layer: its three products, and the casts of their operands to FP8.

The bytes of a cast follow DeepSeek's description. An activation is written in BF16 by the operation that computes it,
read again to be quantised in tiles of 1x128, written in FP8, and read once more by the product. For the weight gradient
the saved FP8 tensor is read, and written again in tiles of 128x1 [V3 §3.5.2]. Only SwiGLU and its gradient quantise
their own results [TileKernels: swiglu_forward_and_per_token_cast, swiglu_backward_and_per_token_cast,
per_channel_cast_fused].
"""

from __future__ import annotations

from dataclasses import dataclass

from dovetail.cost.memory.activations import TILE, code_bytes
from dovetail.cost.ops.ops import BF16, FP32, Elementwise, Gemm, GemmFormat, GemmLayout, Pass
from dovetail.spec.measurements import ElementwiseKind
from dovetail.spec.precision import GemmPrecision, Quantization, Recipe, Site


@dataclass(frozen=True, slots=True, kw_only=True)
class Linear:
    """A weight [n_out, n_in], or `groups` of them, that multiplies `rows` tokens (with groups: the mean of each)."""

    name: str
    part: str
    n_in: int
    n_out: int
    rows: float
    groups: int = 1
    layout: GemmLayout = "dense"
    filled: float = 1.0  # share of the groups that have rows
    precision: GemmPrecision | None = None  # None: BF16
    plain: GemmFormat = "bf16"  # the format if there is no precision

    @property
    def format(self) -> GemmFormat:
        return self.plain if self.precision is None else "fp8"

    @property
    def all_rows(self) -> float:
        return self.rows * self.groups

    def forward(self, recomputed: bool = False) -> Gemm:
        pass_: Pass = "dgrad" if recomputed else "forward"
        return self._gemm(self.name, pass_, self.rows, self.n_out, self.n_in, recomputed)

    def dgrad(self) -> Gemm:
        return self._gemm(self.name, "dgrad", self.rows, self.n_in, self.n_out)

    def wgrad(self) -> Gemm:
        return self._gemm(self.name, "wgrad", self.n_out, self.n_in, self.rows)

    def _gemm(self, name: str, pass_: Pass, m: float, n: int, k: float, recomputed: bool = False) -> Gemm:
        return Gemm(
            name=name,
            pass_=pass_,
            m=m,
            n=n,
            k=k,
            groups=self.groups,
            format=self.format,
            layout=self.layout,
            part=self.part,
            recomputed=recomputed,
            filled=1.0 if pass_ == "wgrad" else self.filled,  # a weight gradient is written for every group
        )

    def cast_weight(self, pass_: Pass, orders: int = 1) -> list[Elementwise]:
        """Return the quantisation of the weight from BF16, in `orders` orders.

        Products take operands along k only [DeepGEMM], so that dgrad needs another order than fprop. In training each
        use quantises anew: codes kept from micro-batch to micro-batch would take two bytes per parameter, which
        DeepSeek-V3's ranks do not have (`cost.memory.rank`). In serving the weights are quantised beforehand.
        """
        if self.precision is None:
            return []
        bytes_ = self.groups * self.n_in * self.n_out * (BF16 + orders * (1.0 + FP32 / TILE**2))
        return [
            Elementwise(
                name=f"quantise weight of {self.name}",
                pass_=pass_,
                bytes=bytes_,
                part=self.part,
                kind="quantise weight",
            )
        ]

    def cast_input(self, is_training: bool) -> list[Elementwise]:
        """Return the quantisation of the input from BF16 and, in training, of the copy that is kept if it differs."""
        if self.precision is None:
            return []
        written = [self.precision.input]
        saved = self.precision.saved_input
        if is_training and saved is not None and saved != self.precision.input:
            written.append(saved)
        return [self._cast("quantise input of", "forward", self.n_in, BF16, *written)]

    def cast_grad(self) -> list[Elementwise]:
        """Return the quantisation of the output's gradient from BF16, for dgrad."""
        if self.precision is None:
            return []
        return [self._cast("quantise gradient of", "dgrad", self.n_out, BF16, self.precision.grad)]

    def cast_for_wgrad(self, input_from: float | None = None, grad_from: float = BF16) -> list[Elementwise]:
        """Return the quantisation of both operands of wgrad in column tiles.

        `input_from` and `grad_from` are the bytes per value of what is read; by default the kept input, and BF16.
        """
        precision = self.precision
        if precision is None:
            return []
        if input_from is None:
            input_from = coded_bytes(TILE, precision.saved_input or precision.input) / TILE
        return [
            self._cast("requantise input of", "wgrad", self.n_in, input_from, precision.wgrad_input),
            self._cast("requantise gradient of", "wgrad", self.n_out, grad_from, precision.wgrad_grad),
        ]

    def _cast(self, what: str, pass_: Pass, width: int, read: float, *written: Quantization) -> Elementwise:
        per_row = read * width + sum(coded_bytes(width, each) for each in written)
        kind: ElementwiseKind = "requantise" if pass_ == "wgrad" else "quantise"
        bytes_ = self.all_rows * per_row
        return Elementwise(name=f"{what} {self.name}", pass_=pass_, bytes=bytes_, part=self.part, kind=kind)


def site_precision(recipe: Recipe, site: Site) -> GemmPrecision | None:
    return recipe.sites.get(site)


def coded_bytes(width: int, quantization: Quantization | None) -> float:
    """Return the bytes of a row of `width` values with a scale for every 128; None means BF16 without scales."""
    if quantization is None:
        return BF16 * width
    return code_bytes(width, quantization.format) + FP32 * -(-width // TILE)
