"""Expert dispatch and combine as flows, from the experts that each token chose.

    normal        a token's vector goes once to each node that has one of its experts, to the GPU with the sender's
                  index there, and from there over NVLink once to each rank that has one [V3 §3.2.2, DeepEP]
    low-latency   one message per expert goes directly to its rank [DeepEP]
    combine       the way back, with sums where dispatch made copies

Messages are counted as DeepEP posts them to a NIC. In normal mode a CPU proxy posts chunks of CHUNK tokens. In
low-latency mode warps of the GPU post one message for each token and expert, and one to each expert with the number of
its tokens.

Copies are passed on as they arrive, so both parts are one step. `network.demands.distinct` has the mean number of
copies in closed form.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import get_args

import numpy as np
from numpy.typing import NDArray

from dovetail.config import near_matches
from dovetail.network.demands.closed_forms import Mode
from dovetail.network.demands.collectives import Demand, Step, check_size, checked_ranks
from dovetail.network.flows.flows import Flows, joined

MODES = get_args(Mode)
CHUNK = 8  # tokens in a message: DeepEP's choice for 24 to 64 GPUs; with other numbers of GPUs it takes more


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Experts:
    """The GPUs that hold the experts, and the experts that each token of each rank is sent to."""

    gpus: NDArray[np.int32]  # [ranks], node by node
    gpus_per_node: int
    experts: int  # split evenly over the ranks, in order
    chosen: NDArray[np.integer]  # [ranks, tokens, choices]; -1 is no choice

    def __post_init__(self) -> None:
        ranks = len(checked_ranks(self.gpus, 0.0))
        if self.experts % ranks:
            raise ValueError(f"experts = {self.experts} over {ranks} ranks: use a multiple of {ranks}")
        if self.chosen.ndim != 3 or len(self.chosen) != ranks:
            raise ValueError(f"chosen has shape {self.chosen.shape}: expected [{ranks} ranks, tokens, choices]")
        if self.chosen.size and not -1 <= self.chosen.min() <= self.chosen.max() < self.experts:
            raise ValueError(f"chosen experts {self.chosen.min()} to {self.chosen.max()}: there are {self.experts}")
        if ranks > self.gpus_per_node and ranks % self.gpus_per_node:
            raise ValueError(f"{ranks} ranks on nodes of {self.gpus_per_node}: use a multiple")

    @property
    def tokens(self) -> int:
        """The number of tokens per rank."""
        return int(self.chosen.shape[1])


def dispatch(experts: Experts, bytes_per_copy: float, mode: Mode = "normal") -> Demand:
    """Return the flows of tokens to their experts. Raises ValueError for an unknown mode and for negative bytes."""
    if mode not in MODES:
        raise ValueError(f"mode = {mode!r}: {near_matches(mode, MODES)}")
    check_size(bytes_per_copy)
    count = len(experts.gpus)
    copies = _one_by_one(experts) if mode == "low-latency" else _once_per_node(experts)
    step = posted(copies, bytes_per_copy, mode, experts.experts // count)
    size = experts.tokens * bytes_per_copy
    return Demand(name="dispatch", ranks=count, size=size, bus_factor=1.0, steps=(step,))


def posted(copies: Flows, bytes_per_copy: float, mode: Mode, experts_per_rank: int) -> Step:
    """Return the step of `copies`, whose bytes are numbers of copies, with its bytes and messages."""
    flows = replace(copies, bytes=copies.bytes * bytes_per_copy)
    if mode == "low-latency":
        return Step(flows=flows, messages=copies.bytes + experts_per_rank, posted_by="gpu")
    return Step(flows=flows, messages=np.ceil(copies.bytes / CHUNK))


def combine(experts: Experts, bytes_per_copy: float, mode: Mode = "normal") -> Demand:
    """Return the way back of `dispatch`: the same copies in the other direction."""
    there = dispatch(experts, bytes_per_copy, mode)
    step = there.steps[0]
    return replace(there, name="combine", steps=(replace(step, flows=step.flows.reversed()),))


def _one_by_one(experts: Experts) -> Flows:
    """Return a flow per pair of ranks, with its number of copies as bytes, one copy for each choice."""
    count, per_rank = len(experts.gpus), experts.experts // len(experts.gpus)
    source = np.repeat(np.arange(count), experts.chosen[0].size)
    flat = experts.chosen.reshape(-1).astype(np.int64)
    is_sent = flat >= 0
    copies = _counts(source[is_sent], flat[is_sent] // per_rank, count, count)
    return _copies(experts.gpus, experts.gpus, copies)


def _once_per_node(experts: Experts) -> Flows:
    gpus, count = experts.gpus, len(experts.gpus)
    per_rank, within = experts.experts // count, min(experts.gpus_per_node, count)
    rank = np.where(experts.chosen >= 0, experts.chosen // per_rank, -1)
    source = np.arange(count)
    tokens = experts.chosen.shape[1]
    # Each token's distinct ranks, and its distinct nodes.
    to_rank = _distinct(rank)
    to_node = _distinct(np.where(rank >= 0, rank // within, -1))
    node_copies = _counts(np.repeat(source, tokens)[to_node[0]], to_node[1], count, count // within)
    owner = np.repeat(source, tokens)[to_rank[0]]
    # Within a node copies come from the GPU with the sender's index, which in the sender's own node is the sender.
    forwarder = to_rank[1] // within * within + owner % within
    rank_copies = _counts(forwarder, to_rank[1], count, count)
    mates = (np.arange(count // within) * within)[None, :] + (source % within)[:, None]
    across = np.zeros((count, count))
    np.put_along_axis(across, mates, node_copies, axis=1)
    return joined([_copies(gpus, gpus, across), _copies(gpus, gpus, rank_copies)])


def _distinct(bins: NDArray[np.integer]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the pairs (token, bin) without repetition for bins [ranks, tokens, choices].

    Tokens are numbered through all ranks.
    """
    flat = np.sort(bins.reshape(-1, bins.shape[-1]), axis=1)
    is_new = (flat >= 0) & (np.diff(flat, axis=1, prepend=-2) != 0)
    token, place = np.nonzero(is_new)
    return token, flat[token, place].astype(np.int64)


def _counts(row: NDArray[np.int64], column: NDArray[np.int64], rows: int, columns: int) -> NDArray[np.float64]:
    return np.bincount(row * columns + column, minlength=rows * columns).reshape(rows, columns).astype(np.float64)


def _copies(source: NDArray[np.int32], destination: NDArray[np.int32], copies: NDArray[np.float64]) -> Flows:
    """Return a flow for each count above 0 between two different ranks."""
    row, column = np.nonzero((copies > 0) & (source[:, None] != destination[None, :]))
    return Flows.of(source[row], destination[column], copies[row, column])


def sample_choices(
    ranks: int,
    tokens: int,
    choices: int,
    experts: int,
    groups: int = 1,
    kept_groups: int = 1,
    popularity: NDArray[np.float64] | None = None,
    seed: int = 0,
    best_of_group: int = 2,
) -> NDArray[np.int32]:
    """Draw the experts that a gate chooses from independent scores [ranks, tokens, choices].

    They are the best of the kept groups, which are those with the largest sum of their `best_of_group` best scores: 2
    in V3 [V3 eq 14-16], 1 in V2. `popularity` says how much more often than others an expert is the best. Raises
    ValueError for numbers that do not fit together.
    """
    size = experts // max(groups, 1)
    if not 1 <= kept_groups <= groups or experts % groups or not 1 <= choices <= kept_groups * size:
        raise ValueError(
            f"{choices} choices of {experts} experts in {groups} groups of which {kept_groups} are kept: groups must "
            f"divide the experts, and the kept ones hold as many as are chosen"
        )
    random = np.random.default_rng(seed)
    chosen = np.empty((ranks, tokens, choices), np.int32)
    bias = np.zeros(experts) if popularity is None else np.log(popularity)
    for rank in range(ranks):  # one at a time, to limit memory
        scores = random.gumbel(size=(tokens, experts)) + bias
        if kept_groups < groups:
            grouped = scores.reshape(tokens, groups, size)
            best = np.sort(grouped, axis=2)[:, :, -best_of_group:].sum(axis=2)
            dropped = np.argsort(best, axis=1)[:, : groups - kept_groups]
            np.put_along_axis(grouped, dropped[:, :, None], -np.inf, axis=1)
            scores = grouped.reshape(tokens, experts)
        chosen[rank] = np.argpartition(scores, -choices, axis=1)[:, -choices:]
    return chosen


def counted_copies(experts: Experts, mode: Mode = "normal") -> float:
    """Return the copies of vectors per rank that DeepEP's benchmarks divide by the time.

    A token counts one copy for each distinct node of its experts, its own included; on a single node one for each
    distinct rank; and in low-latency mode one for each choice.
    """
    if mode == "low-latency":
        return np.count_nonzero(experts.chosen >= 0) / len(experts.gpus)
    ranks, per_rank = len(experts.gpus), experts.experts // len(experts.gpus)
    per_bin = per_rank * experts.gpus_per_node if ranks > experts.gpus_per_node else per_rank
    bins = np.where(experts.chosen >= 0, experts.chosen // per_bin, -1)
    return len(_distinct(bins)[0]) / ranks
