"""The dispatch and combine of a question, from a model, a precision recipe and the experts chosen.

The experts of each token are drawn from random scores, or read from a recording. The bytes of a copy are those of
`cost.ops.ffn`: for prompts and training in normal mode, for decoding in low-latency mode. With skew S the expert at
place k of a shuffled order has popularity 1 / k^S (Zipf); the order is drawn from the seed.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import cast

import numpy as np
from numpy.typing import NDArray

from dovetail.catalog.precision import load_recipe
from dovetail.catalog.presets import find_model
from dovetail.cost.ops.ffn import FfnWork, experts_forward
from dovetail.cost.ops.ops import Exchange
from dovetail.network.ask.question import Question
from dovetail.network.delivery.memory import MOST_BYTES
from dovetail.network.demands.closed_forms import Mode
from dovetail.network.demands.collectives import Demand
from dovetail.network.demands.experts import Experts, combine, counted_copies, dispatch, sample_choices
from dovetail.network.fabric.topology import Fabric
from dovetail.network.flows.flows import Floats
from dovetail.spec.layout import Layout, divisors
from dovetail.spec.model import ModelSpec, Moe

MODEL, PRECISION, TOKENS = "deepseek-v3", "deepseek-v3", 4096
SCORE_BYTES = 26  # memory per token and expert while a GPU's tokens are drawn; measured with 300,000 tokens
CHOICE_BYTES = 80  # memory per choice of all GPUs; measured with 256 GPUs


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertCopies:
    """How often tokens are copied, as means over all GPUs."""

    model: str
    mode: str
    tokens: int  # per GPU
    bytes_per_copy: float
    across_nodes: float  # copies of a token that leave its node
    within_nodes: float  # copies over NVLink, those that are passed on included
    busiest_gpu: float  # rows for the experts of the GPU with the most, over the mean
    counted_bytes: float  # per GPU, as DeepEP's benchmarks count them


def exchange_demand(
    question: Question, name: str, fabric: Fabric, gpus: int, tokens: int
) -> tuple[Demand, ExpertCopies]:
    """Return dispatch or combine among the first `gpus`.

    Raises ValueError for experts that do not divide among them, for a model without experts, and for a recording that
    does not fit.
    """
    exchange = _exchange(question, name, fabric, gpus, tokens)
    experts = Experts(
        gpus=np.arange(gpus, dtype=np.int32),
        gpus_per_node=fabric.gpus_per_node,
        experts=exchange.experts,
        chosen=_chosen(question, exchange),
    )
    mode = cast(Mode, question.mode or "normal")
    demand = (dispatch if name == "dispatch" else combine)(experts, exchange.bytes_per_copy, mode)
    flows, each = demand.steps[0].flows, max(gpus * tokens, 1) * exchange.bytes_per_copy
    is_inside = flows.source // fabric.gpus_per_node == flows.destination // fabric.gpus_per_node
    rows = np.bincount(
        experts.chosen[experts.chosen >= 0] // (exchange.experts // gpus),
        minlength=gpus,
    )
    return demand, ExpertCopies(
        model=question.model or MODEL,
        mode=mode,
        tokens=tokens,
        bytes_per_copy=exchange.bytes_per_copy,
        across_nodes=float(flows.bytes[~is_inside].sum() / each),
        within_nodes=float(flows.bytes[is_inside].sum() / each),
        busiest_gpu=float(rows.max() / rows.mean()) if rows.any() else 1.0,
        counted_bytes=counted_copies(experts, mode) * exchange.bytes_per_copy,
    )


def check_exchange(question: Question, name: str, fabric: Fabric, gpus: int, tokens: int) -> None:
    """Raise ValueError as `exchange_demand` does, before anything is drawn, and if drawing needs more than 4 GiB."""
    exchange = _exchange(question, name, fabric, gpus, tokens)
    if question.recorded is not None:
        _fitting(question, exchange)
        return
    each = max(SCORE_BYTES * exchange.experts, CHOICE_BYTES * gpus * exchange.choices)
    if tokens * each > MOST_BYTES:
        raise ValueError(
            f"tokens = {tokens} for each of {gpus} GPUs: drawing their experts would need about "
            f"{tokens * each / 2**30:,.1f} GiB, more than {MOST_BYTES / 2**30:.0f}: use {MOST_BYTES // each} at most"
        )


def recorded_tokens(question: Question) -> int | None:
    """Return the tokens per GPU of the recording, if there is one. Raises ValueError if it cannot be read."""
    return None if question.recorded is None else _recording(question.recorded).shape[1]


def _moe(question: Question) -> tuple[ModelSpec, Moe]:
    spec = find_model(question.model or MODEL).spec
    if spec.moe is None:
        raise ValueError(f"{question.model} has no experts: use a model that has, such as {MODEL}")
    return spec, spec.moe


def _exchange(question: Question, name: str, fabric: Fabric, gpus: int, tokens: int) -> Exchange:
    """Return the exchange as the planner's list of operations has it."""
    spec, moe = _moe(question)
    _check_split(question.model or MODEL, moe.n_routed_experts, fabric, gpus)
    work = FfnWork(
        spec=spec,
        layout=Layout(ep=gpus, dp=gpus),
        recipe=load_recipe(question.precision or PRECISION),
        tokens=tokens,
        phase="decode" if question.mode == "low-latency" else "prefill",
    )
    return next(op for op in experts_forward(work, moe) if isinstance(op, Exchange) and op.name == name)


def _check_split(model: str, experts: int, fabric: Fabric, gpus: int) -> None:
    node = fabric.gpus_per_node
    legal = [each for each in divisors(experts) if 1 < each <= fabric.endpoints and (each <= node or not each % node)]
    if gpus not in legal:
        remedy = f"--gpus {min(legal, key=lambda each: abs(each - gpus))} is nearest" if legal else "use another model"
        raise ValueError(
            f"gpus = {gpus}: the {experts} experts of {model} are split evenly over all GPUs that take part, and those "
            f"fill their nodes of {node}: {remedy}"
        )


def _chosen(question: Question, exchange: Exchange) -> NDArray[np.integer]:
    if question.recorded is None:
        return _sampled(
            exchange.ranks,
            int(exchange.tokens),
            (exchange.choices, exchange.experts, exchange.groups, exchange.kept_groups),
            question.skew or 0.0,
            question.seed,
            2 if _moe(question)[1].topk_method == "noaux_tc" else 1,  # as in `model.experts.gate.select`
        )
    return _fitting(question, exchange)


def _fitting(question: Question, exchange: Exchange) -> NDArray[np.integer]:
    """Return the recording. Raises ValueError if it does not fit the question or the model."""
    assert question.recorded is not None
    chosen, tokens = _recording(question.recorded), int(exchange.tokens)
    where = f"--recorded {question.recorded}"
    if chosen.shape[:2] != (exchange.ranks, tokens):
        instead = f"--gpus {chosen.shape[0]}" if chosen.shape[0] != exchange.ranks else f"{chosen.shape[1]} tokens"
        raise ValueError(
            f"{where}: holds {chosen.shape[1]} tokens of {chosen.shape[0]} GPUs, but {tokens} of {exchange.ranks} are "
            f"asked for: use {instead}"
        )
    model = question.model or MODEL
    remedy = "give the --model that it was recorded from"
    if chosen.shape[2] != exchange.choices:
        raise ValueError(
            f"{where}: holds {chosen.shape[2]} choices of a token, but {model} makes {exchange.choices}: {remedy}"
        )
    if chosen.size and not -1 <= chosen.min() <= chosen.max() < exchange.experts:
        raise ValueError(
            f"{where}: experts {chosen.min()} to {chosen.max()}, but {model} has 0 to {exchange.experts - 1}, and -1 "
            f"is none: {remedy}"
        )
    ordered = np.sort(chosen, axis=2)
    if ((ordered[:, :, 1:] == ordered[:, :, :-1]) & (ordered[:, :, 1:] >= 0)).any():
        raise ValueError(f"{where}: a token has the same expert twice; use -1 for none")
    return chosen


@lru_cache(maxsize=1)
def _sampled(
    ranks: int, tokens: int, gate: tuple[int, int, int, int], skew: float, seed: int, best_of_group: int
) -> NDArray[np.int32]:
    """Draw the experts of each token once, for all fabrics and for both directions."""
    popularity = zipf(gate[1], skew, seed) if skew else None
    return sample_choices(ranks, tokens, *gate, popularity=popularity, seed=seed, best_of_group=best_of_group)


def zipf(experts: int, skew: float, seed: int) -> Floats:
    """Return the popularity of each expert [experts]; that of the most popular is 1."""
    order = np.random.default_rng([seed, 1]).permutation(experts)
    popularity: Floats = np.power(1.0 + order, -skew, dtype=np.float64)
    return popularity


def _recording(path: str) -> NDArray[np.integer]:
    try:
        found = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise ValueError(f"--recorded {path}: cannot be read as .npy: {str(error).splitlines()[0]}") from None
    if not isinstance(found, np.ndarray) or found.ndim != 3 or not np.issubdtype(found.dtype, np.integer):
        kind = f"{found.dtype} of shape {list(found.shape)}" if isinstance(found, np.ndarray) else "several arrays"
        raise ValueError(f"--recorded {path}: holds {kind}: expected whole numbers [GPUs, tokens, choices]")
    return found
