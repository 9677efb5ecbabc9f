"""The kinds of operations that a rank runs: products, attention, memory-bound work, exchanges.

`cost.ops.layer` makes lists of them. `cost.roofline` says how long each takes on a GPU, and
`network.demands.closed_forms` how long an exchange takes on a cluster. A record holds dims and formats only; FLOP and
bytes are derived. All numbers are for one rank and one micro-batch (or one step of serving).

    pass_   "forward"; "dgrad", the gradient of inputs, with what is recomputed for it (`recomputed`); "wgrad", the
            gradient of weights. These are V3's 1F, 1B and 1W [ISCA Table 4].
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from dovetail.spec.measurements import ElementwiseKind

Pass = Literal["forward", "dgrad", "wgrad"]
GemmFormat = Literal["bf16", "fp8", "fp32"]
GemmLayout = Literal["dense", "contiguous", "masked"]  # how the rows of groups lie [DeepGEMM]

OPERAND_BYTES = {"fp8": 1 + 4 / 128, "bf16": 2.0, "fp32": 4.0}  # FP8 has an FP32 scale for every 128 [V3 §3.3.2]
BF16, FP32 = 2, 4  # bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Gemm:
    """`groups` products [m, k] x [k, n].

    With several groups m (in wgrad: k) is the mean number of rows per group, which need not be whole. `filled` is the
    share of the groups that have rows at all; the weights [k, n] of the others are not read.
    """

    name: str
    pass_: Pass
    m: float
    n: int
    k: float
    groups: int = 1
    format: GemmFormat = "bf16"
    layout: GemmLayout = "dense"
    part: str = ""
    recomputed: bool = False  # run again for the backward pass
    is_added: bool = True  # for a weight gradient: it is added to those of other micro-batches or ranks
    filled: float = 1.0  # of forward products and dgrad

    @property
    def flop(self) -> float:
        return 2.0 * self.m * self.n * self.k * self.groups

    @property
    def bytes(self) -> float:
        """The bytes of both operands, read once, and of the result, written once, in BF16 or in FP32 for FP32 products.

        A weight gradient is added to one in FP32, which is read and written [V3 §3.3.3]; if there is none to add to,
        it is written like other results.
        """
        operands = (self.m * self.k + self.filled * self.k * self.n) * OPERAND_BYTES[self.format]
        is_added = self.pass_ == "wgrad" and self.is_added
        per_result = 2 * FP32 if is_added else FP32 if self.format == "fp32" else BF16
        return self.groups * (operands + self.m * self.n * per_result)


@dataclass(frozen=True, slots=True, kw_only=True)
class Attention:
    """The attention core in BF16: scores, softmax, weighted values.

    `tokens` are the queries of all `sequences` together, `context` the keys of one sequence, its own tokens included.
    If `absorbed`, all heads share one key, which is read from the cache: the latent with its rotary part (qk_dim). Its
    first v_dim elements are the value. Otherwise each head has keys and values of its own.
    """

    name: str
    pass_: Pass
    tokens: float
    context: float
    heads: int
    qk_dim: int
    v_dim: int
    causal: bool = True
    absorbed: bool = False
    sequences: float = 1
    cache_element_bytes: float = BF16  # if absorbed
    part: str = "attention"

    @property
    def visible(self) -> float:
        """The mean number of keys that a query sees; the rule is the paper's [ISCA Table 4].

        A causal query sees all tokens before its sequence's new ones, and half of the new ones.
        """
        return self.context - (self.tokens / self.sequences / 2 if self.causal else 0)

    @property
    def flop(self) -> float:
        """The FLOP of two products forward, or of five backward.

        The five are the scores once more and the gradients of probabilities, values, queries and keys. They are 2.6
        times as many FLOP for widths of 192 and 128.
        """
        widths = self.qk_dim + self.v_dim if self.pass_ == "forward" else 3 * self.qk_dim + 2 * self.v_dim
        return 2.0 * self.heads * self.tokens * self.visible * widths

    @property
    def bytes(self) -> float:
        """The bytes read and written.

        The forward pass reads q, k, v and writes the output and log-sum-exp. The backward pass reads these and the
        output's gradient, and writes the gradients of q, k, v.
        """
        queries = self.tokens * self.heads * self.qk_dim * BF16
        outputs = self.tokens * self.heads * self.v_dim * BF16
        keys = self.sequences * self.context
        if self.absorbed:
            stored = keys * self.qk_dim * self.cache_element_bytes
        else:
            stored = keys * self.heads * (self.qk_dim + self.v_dim) * BF16
        statistics = self.tokens * self.heads * FP32
        if self.pass_ == "forward":
            return queries + stored + outputs + statistics
        return 2 * (queries + stored + outputs) + statistics


@dataclass(frozen=True, slots=True, kw_only=True)
class Elementwise:
    """Memory-bound work. `bytes` are those read and written; `kind` is the kind of measurement that applies to it."""

    name: str
    pass_: Pass
    bytes: float
    part: str = ""
    recomputed: bool = False
    kind: ElementwiseKind = "other"


@dataclass(frozen=True, slots=True, kw_only=True)
class Exchange:
    """Expert-parallel all-to-all.

    Each of `tokens` on this rank goes to the ranks of its `choices` experts (dispatch) or back from them (combine). The
    choices are among `experts`, in `groups` groups of which `kept_groups` are used. The number of distinct nodes and
    ranks depends on the cluster; `network.demands.closed_forms` computes it.
    """

    name: Literal["dispatch", "combine"]
    pass_: Pass
    tokens: float
    bytes_per_copy: float  # one token's vector, its scales, ids and weights
    choices: int
    experts: int
    groups: int = 1
    kept_groups: int = 1
    ranks: int = 1  # number of ranks that the experts are split over
    part: str = "experts"


@dataclass(frozen=True, slots=True, kw_only=True)
class Collective:
    """A collective of `ranks` ranks on a tensor of `bytes` in all.

    Each of the ranks is `stride` ranks after the one before. With a stride of a node or more, all are on different
    nodes.
    """

    name: Literal["all_gather", "reduce_scatter", "all_reduce"]
    pass_: Pass
    bytes: float
    ranks: int
    stride: int = 1
    part: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Send:
    """A message from each of `gpus` ranks, except the last, to the rank `distance` further, on the next stage."""

    bytes: float
    distance: int
    gpus: int


Op = Gemm | Attention | Elementwise | Exchange | Collective
