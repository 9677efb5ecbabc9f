"""The records of what one rank runs: products, attention, memory-bound work, and exchanges between ranks.

Lists of them are made by `cost.ops.layer`; `cost.roofline` says how long each takes on a GPU and
`network.demands.closed_forms` how long an exchange takes on a cluster. A record holds dims and formats only; FLOP and
bytes are derived. All numbers are of one rank and one micro-batch (or one step of serving).

    pass_   "forward"; "dgrad": the gradient of inputs, with what is recomputed for it (`recomputed`); "wgrad": the
            gradient of weights. V3's 1F, 1B and 1W [ISCA Table 4].
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from dovetail.spec.measurements import ElementwiseKind

Pass = Literal["forward", "dgrad", "wgrad"]
GemmFormat = Literal["bf16", "fp8", "fp32"]
GemmLayout = Literal["dense", "contiguous", "masked"]  # of rows of groups, as in [DeepGEMM]

OPERAND_BYTES = {"fp8": 1 + 4 / 128, "bf16": 2.0, "fp32": 4.0}  # an FP32 scale for every 128 FP8 values [V3 §3.3.2]
BF16, FP32 = 2, 4  # bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Gemm:
    """`groups` products [m, k] x [k, n]. For grouped products m (of wgrad: k) is the mean number of rows per group,
    not their sum; it may be a fraction where tokens do not divide."""

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
    is_added: bool = True  # a weight gradient, to what other micro-batches or ranks have

    @property
    def flop(self) -> float:
        return 2.0 * self.m * self.n * self.k * self.groups

    @property
    def bytes(self) -> float:
        """Both operands read and the result written once: BF16, and FP32 where the product is itself FP32. A weight
        gradient is added to one in FP32, which is read and written [V3 §3.3.3]; where there is none to add to, it is
        written as other results are."""
        operands = (self.m * self.k + self.k * self.n) * OPERAND_BYTES[self.format]
        is_added = self.pass_ == "wgrad" and self.is_added
        per_result = 2 * FP32 if is_added else FP32 if self.format == "fp32" else BF16
        return self.groups * (operands + self.m * self.n * per_result)


@dataclass(frozen=True, slots=True, kw_only=True)
class Attention:
    """The attention core in BF16: scores, softmax, weighted values.

    `tokens` are the queries of all `sequences` together, `context` the keys of one sequence, its own tokens included.
    `absorbed`: all heads share one key, the latent with its rotary part (qk_dim), whose first v_dim are the value; it
    is read from the cache. Otherwise each head has keys and values of its own.
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
    cache_element_bytes: float = BF16  # where absorbed
    part: str = "attention"

    @property
    def visible(self) -> float:
        """Keys that a query sees in the mean: a causal one half of its own sequence's new tokens, and all before
        them; the paper's rule [ISCA Table 4]."""
        return self.context - (self.tokens / self.sequences / 2 if self.causal else 0)

    @property
    def flop(self) -> float:
        """Two products forward; five backward: scores again and the gradients of probabilities, values, queries and
        keys, which is 2.6 times as much at 192 and 128."""
        widths = self.qk_dim + self.v_dim if self.pass_ == "forward" else 3 * self.qk_dim + 2 * self.v_dim
        return 2.0 * self.heads * self.tokens * self.visible * widths

    @property
    def bytes(self) -> float:
        """Forward: q, k, v read, output and log-sum-exp written. Backward: these and the output's gradient read, the
        gradients of q, k, v written."""
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
    """Work that is bound by memory; `bytes` are those read and written. `kind` tells apart what hardware may have been
    measured at."""

    name: str
    pass_: Pass
    bytes: float
    part: str = ""
    recomputed: bool = False
    kind: ElementwiseKind = "other"


@dataclass(frozen=True, slots=True, kw_only=True)
class Exchange:
    """Expert-parallel all-to-all: each of `tokens` on this rank to the ranks (dispatch) or back from the ranks
    (combine) of its `choices` experts among `experts`, in `groups` groups of which `kept_groups` are used. How many
    distinct nodes and ranks that makes depends on the cluster: `network.demands.closed_forms`."""

    name: Literal["dispatch", "combine"]
    pass_: Pass
    tokens: float
    bytes_per_copy: float  # one token's vector, its scales, ids and weights
    choices: int
    experts: int
    groups: int = 1
    kept_groups: int = 1
    ranks: int = 1  # that the experts are split over
    part: str = "experts"


@dataclass(frozen=True, slots=True, kw_only=True)
class Collective:
    """What `ranks` ranks do together; `bytes` is the whole tensor. `stride`: how many ranks the next of them is away,
    so that those of a stride of a node or more are on different nodes."""

    name: Literal["all_gather", "reduce_scatter", "all_reduce"]
    pass_: Pass
    bytes: float
    ranks: int
    stride: int = 1
    part: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Send:
    """From each of `gpus` ranks to the one `distance` further, the last ones to none: the next stage of a pipeline."""

    bytes: float
    distance: int
    gpus: int


Op = Gemm | Attention | Elementwise | Exchange | Collective
