"""How a model is split over ranks (pipeline, experts, tensors, data), and the rules for that.

    gpus            = dp x pp x tp
    ranks per stage = dp x tp; ep of them hold each expert once, so experts have (dp x tp) / ep replicas
    batch           = dp x microbatches x microbatch_size sequences per step

Tensor parallelism splits attention heads only; everywhere else the same ranks split the tokens (sequence parallelism).
V3 serves prompts in this way: dense feed-forwards are not split [V3 §3.4.1].

`dp` counts the ranks (or groups of `tp` ranks) that see different data, so it is also the number of replicas of all
weights but the experts'. DeepSeek-V3 was trained with pp 16, ep 64, dp 128, tp 1 on 2,048 GPUs [V3 §3.2].

Ranks of a pipeline and the stages they hold:

    1f1b, zb1p    rank r holds stage r
    interleaved   rank r holds stages r, r + pp, ...: `chunks` of them
    dualpipe      rank r holds stages r and pp-1-r: each stage stands on two ranks [V3 §3.2.1]
    dualpipev     rank r holds stages r and 2 pp-1-r [DualPipe]
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field, PositiveInt

from dovetail.config import Record
from dovetail.spec.model import ModelSpec

ScheduleName = Literal["1f1b", "interleaved", "zb1p", "dualpipe", "dualpipev"]


class Layout(Record):
    """One way to split. Training reads all of it; serving does not read `microbatches`, `schedule` and `zero`."""

    pp: int = Field(default=1, gt=0)  # ranks of a pipeline
    ep: int = Field(default=1, gt=0)  # ranks that share one copy of a layer's routed experts
    tp: int = Field(default=1, gt=0)  # ranks that share a layer's attention heads, and its tokens
    dp: int = Field(default=1, gt=0)  # ranks, or groups of tp ranks, with different data
    microbatches: int = Field(default=1, gt=0)  # per data-parallel rank and step
    microbatch_size: int = Field(default=1, gt=0)  # sequences
    schedule: ScheduleName = "1f1b"
    chunks: int = Field(default=2, gt=0)  # stages per rank under "interleaved"
    stage_layers: tuple[PositiveInt, ...] | None = None  # layers on each stage; None: `cost.memory.stages` decides
    zero: Literal[0, 1] = 1  # 1: ranks with the same weight share its optimizer state out (ZeRO-1); 0: each has all
    redundant_experts: int = Field(default=0, ge=0)  # second copies of busy experts, in serving [V3 §3.4]

    @property
    def gpus(self) -> int:
        return self.dp * self.pp * self.tp

    @property
    def batch(self) -> int:
        """The number of sequences per step."""
        return self.dp * self.microbatches * self.microbatch_size

    @property
    def num_stages(self) -> int:
        """The number of stages that the layers are divided into."""
        if self.schedule == "interleaved":
            return self.pp * self.chunks
        return 2 * self.pp if self.schedule == "dualpipev" else self.pp

    @property
    def adds_gradients(self) -> bool:
        """Whether several micro-batches or ranks have a gradient of the same weight; these add up in FP32."""
        return self.microbatches * self.dp * self.tp * self.stage_copies > 1

    @property
    def shares_optimizer(self) -> bool:
        """Whether optimizer states are divided among ranks that hold the same weights."""
        return self.zero == 1 and self.dp * self.tp * self.stage_copies > 1

    @property
    def stage_copies(self) -> int:
        """The number of ranks of one pipeline that hold the same stage."""
        return 2 if self.schedule == "dualpipe" else 1

    @property
    def expert_replicas(self) -> int:
        """The number of ranks of one stage that hold the same routed expert, redundant copies not counted."""
        return self.dp * self.tp // self.ep

    def stages_of(self, rank: int) -> tuple[int, ...]:
        """Return the stages that pipeline rank `rank` holds, in the order in which a token passes them."""
        assert 0 <= rank < self.pp, (rank, self.pp)
        if self.schedule == "interleaved":
            return tuple(range(rank, self.num_stages, self.pp))
        if self.schedule == "dualpipe":
            return rank, self.pp - 1 - rank
        return (rank, 2 * self.pp - 1 - rank) if self.schedule == "dualpipev" else (rank,)

    def experts_per_rank(self, spec: ModelSpec) -> int:
        """Return the number of routed experts that a rank holds, redundant ones included; 0 without experts."""
        return (spec.moe.n_routed_experts + self.redundant_experts) // self.ep if spec.moe else 0


def check_layout(layout: Layout, spec: ModelSpec, cluster_gpus: int | None = None, batch: int | None = None) -> None:
    """Raise ValueError, with the numbers and the nearest legal value, for a layout that is not possible.

    `cluster_gpus` is the number of GPUs there are, `batch` the sequences that a step must have; None is not checked.
    """
    _check_experts(layout, spec)
    _check_tensors(layout, spec)
    _check_pipeline(layout, spec)
    if cluster_gpus is not None and layout.gpus > cluster_gpus:
        raise ValueError(
            f"dp = {layout.dp} x pp = {layout.pp} x tp = {layout.tp} needs {layout.gpus} GPUs, the cluster has "
            f"{cluster_gpus}; the largest dp that fits is {cluster_gpus // (layout.pp * layout.tp)}"
        )
    if batch is not None and layout.batch != batch:
        _reject_batch(layout, batch)


def nearest_divisor(value: int, number: int) -> int:
    """Return the divisor of `number` that is nearest to `value`; of two as near, the smaller."""
    return min(divisors(number), key=lambda each: (abs(each - value), each))


def divisors(number: int) -> list[int]:
    return [each for each in range(1, number + 1) if number % each == 0]


def _check_experts(layout: Layout, spec: ModelSpec) -> None:
    if spec.moe is None:
        if layout.ep > 1 or layout.redundant_experts:
            raise ValueError(
                f"ep = {layout.ep}, redundant_experts = {layout.redundant_experts}, but the model has no experts: "
                "set ep = 1 and redundant_experts = 0"
            )
        return
    slots = spec.moe.n_routed_experts + layout.redundant_experts
    if slots % layout.ep:
        raise ValueError(
            f"ep = {layout.ep} does not divide n_routed_experts + redundant_experts = {slots}; "
            f"nearest: ep = {nearest_divisor(layout.ep, slots)}, or redundant_experts = "
            f"{-spec.moe.n_routed_experts % layout.ep}"
        )
    if layout.dp * layout.tp % layout.ep:
        raise ValueError(
            f"ep = {layout.ep} does not divide the {layout.dp * layout.tp} ranks of a stage (dp = {layout.dp} x "
            f"tp = {layout.tp}); nearest: ep = {nearest_divisor(layout.ep, layout.dp * layout.tp)}"
        )


def _check_tensors(layout: Layout, spec: ModelSpec) -> None:
    heads = spec.attention.num_attention_heads
    if heads % layout.tp:
        raise ValueError(
            f"tp = {layout.tp} does not divide num_attention_heads = {heads}; nearest: tp = "
            f"{nearest_divisor(layout.tp, heads)}"
        )


def _check_pipeline(layout: Layout, spec: ModelSpec) -> None:
    layers, microbatches, pp = spec.num_hidden_layers, layout.microbatches, layout.pp
    if layout.num_stages > layers:
        raise ValueError(
            f"{layout.num_stages} stages (pp = {pp}, schedule {layout.schedule}) for {layers} layers: each stage needs "
            f"one; the largest pp is {layers * pp // layout.num_stages}"
        )
    if layout.stage_layers is not None and (
        len(layout.stage_layers) != layout.num_stages or sum(layout.stage_layers) != layers
    ):
        raise ValueError(
            f"stage_layers has {len(layout.stage_layers)} stages with {sum(layout.stage_layers)} layers; the layout "
            f"has {layout.num_stages} stages and the model {layers} layers"
        )
    if layout.schedule == "dualpipe" and pp % 2:
        raise ValueError(f"pp = {pp}: DualPipe joins two ends of a pipeline and takes an even pp; nearest: {pp + 1}")
    if layout.schedule == "dualpipe" and microbatches % 2:
        raise ValueError(
            f"microbatches = {microbatches}: DualPipe feeds half from each end and takes an even number; nearest: "
            f"{microbatches + 1}"
        )
    if layout.schedule in ("dualpipe", "dualpipev") and microbatches < 2 * pp:
        raise ValueError(
            f"microbatches = {microbatches} with pp = {pp}: {layout.schedule} needs at least 2 pp = {2 * pp} [DualPipe]"
        )
    if layout.schedule == "interleaved" and microbatches % pp:
        raise ValueError(
            f"microbatches = {microbatches} with pp = {pp}: interleaved stages take whole rounds of pp; nearest: "
            f"{max(1, round(microbatches / pp)) * pp}"
        )


def _reject_batch(layout: Layout, batch: int) -> None:
    per_round = layout.dp * layout.microbatch_size
    exact, rest = divmod(batch, per_round)
    if rest == 0:
        remedy = f"microbatches = {exact} makes it"
    else:
        low, high = max(exact, 1) * per_round, (exact + 1) * per_round
        remedy = f"nearest batches for this dp and microbatch_size: {low} and {high}"
    raise ValueError(
        f"dp = {layout.dp} x microbatches = {layout.microbatches} x microbatch_size = {layout.microbatch_size} is a "
        f"batch of {layout.batch} sequences, not {batch}; {remedy}"
    )
