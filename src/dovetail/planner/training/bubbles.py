"""The idle time of pipelines in closed form: published formulas, and an estimate without a schedule.

If F, I, W, B = I + W and FB (a pair) are the same on every stage, with h = PP/2 [V3 Table 2]:

    1F1B                 (PP - 1) (F + B)
    interleaved          (PP - 1) (F + B), with F and B of one of a rank's stages [arXiv 2104.04473]
    ZB1P                 (PP - 1) (F + B - 2 W)
    DualPipe, DualPipeV  (h - 1) (FB + B - 3 W), h = PP for DualPipeV on PP ranks

Replays of schedules agree with the first two always, with ZB1P if W <= F and W <= I, and with DualPipe on the middle
ranks if I = F and W <= I. Replays over random durations agree exactly with

    ZB1P                 (PP - 1) (F + I - min(F, I, W))
    DualPipe(V), middle  (h - 1) (FB + I - W - min(I, W)) - min((h - 1) (I - F), F)

where the last term is due to the middle ranks' first pair, which does not overlap. From the second rank away from the
middle on, each rank runs one more pair as separate halves than the rank before; each such pair takes F + B - FB more
work, and the rank idles as much less.
"""

from __future__ import annotations

from dataclasses import dataclass

from dovetail.parallel.schedules.pipelines import SCHEDULES
from dovetail.planner.training.timeline import Durations, step_seconds


def published_bubble(
    name: str, ranks: int, *, forward: float, backward: float, weight_backward: float = 0.0, pair: float = 0.0
) -> float:
    """Return the idle seconds of a rank by the published formula; F and B are those of one stage.

    Raises ValueError for an unknown schedule.
    """
    if name in ("1f1b", "interleaved"):
        return (ranks - 1) * (forward + backward)
    if name == "zb1p":
        return (ranks - 1) * (forward + backward - 2 * weight_backward)
    if name in ("dualpipe", "dualpipev"):
        half = ranks / 2 if name == "dualpipe" else ranks
        return (half - 1) * (pair + backward - 3 * weight_backward)
    raise ValueError(f"no schedule {name!r}; there are {', '.join(SCHEDULES)}")


@dataclass(frozen=True, slots=True)
class _Stage:
    """The seconds of one stage, or their means over several."""

    forward: float
    backward: float
    inputs: float
    weights: float
    pair: float


def estimate_seconds(name: str, ranks: int, microbatches: int, durations: Durations, chunks: int = 2) -> float:
    """Estimate `replay(make_schedule(...), durations).seconds` in 0.1 ms, without a schedule, to prune a search.

    The estimate is the work of the slowest rank plus the idle time of a pipeline of mean stages. Except for sends it is
    exact if all stages take the same time, B = I + W, and there are at least PP micro-batches. If stages differ, it is
    up to an eighth off with 2 PP micro-batches, and less with more. Sizes are not checked. Raises ValueError for an
    unknown name or illegal durations.
    """
    if name not in SCHEDULES:
        raise ValueError(f"no schedule {name!r}; there are {', '.join(SCHEDULES)}")
    num_stages = ranks * {"interleaved": chunks, "dualpipev": 2}.get(name, 1)
    each = [_stage(name, durations, stage, num_stages) for stage in range(num_stages)]
    messages = _exposed_messages(name, ranks, microbatches, num_stages)
    if name in ("dualpipe", "dualpipev"):
        return _estimate_dualpipe(name, ranks, microbatches, each) + messages * durations.send
    if name == "zb1p":
        work = [microbatches * (stage.forward + stage.inputs + stage.weights) for stage in each]
        idle = [stage.forward + stage.inputs - min(stage.forward, stage.inputs, stage.weights) for stage in each]
    else:
        rows = [each[rank::ranks] for rank in range(ranks)]
        work = [microbatches * sum(stage.forward + stage.backward for stage in row) for row in rows]
        idle = [sum(stage.forward + stage.backward for stage in row) / len(row) for row in rows]
    slowest = work.index(max(work))
    return work[slowest] + sum(idle) - idle[slowest] + messages * durations.send


def _exposed_messages(name: str, ranks: int, microbatches: int, num_stages: int) -> float:
    """Return the number of messages in a row that no work hides, as fitted to replays with short sends.

    If the micro-batches in flight only just fill the pipeline (1F1B, DualPipe), each round trip of them waits once.
    """
    rounds = microbatches * (ranks - 1) / ranks
    return {
        "1f1b": 2 * rounds + 2 * max(0, ranks - 2),
        "interleaved": 2 * (num_stages - 1),
        "zb1p": 4 * (ranks - 1),
        "dualpipe": rounds + 2 * max(0, ranks - 2),
        "dualpipev": 2 * rounds + max(0, 4 * ranks - 6),
    }[name]


def _stage(name: str, durations: Durations, stage: int, num_stages: int) -> _Stage:
    is_dual = name in ("dualpipe", "dualpipev")
    is_split = is_dual or name == "zb1p"

    def seconds(kind: str, *stages: int) -> float:
        return step_seconds(durations, kind, stages, num_stages)

    return _Stage(
        forward=seconds("F", stage),
        backward=seconds("B", stage),
        inputs=seconds("I", stage) if is_split else 0.0,
        weights=seconds("W", stage) if is_split else 0.0,
        pair=seconds("FB", stage, num_stages - 1 - stage) if is_dual else 0.0,
    )


def _mean(stages: list[_Stage]) -> _Stage:
    count = len(stages)
    return _Stage(
        forward=sum(stage.forward for stage in stages) / count,
        backward=sum(stage.backward for stage in stages) / count,
        inputs=sum(stage.inputs for stage in stages) / count,
        weights=sum(stage.weights for stage in stages) / count,
        pair=sum(stage.pair for stage in stages) / count,
    )


def _estimate_dualpipe(name: str, ranks: int, microbatches: int, each: list[_Stage]) -> float:
    half = ranks // 2 if name == "dualpipe" else ranks
    visits = microbatches if name == "dualpipe" else 2 * microbatches  # forwards that a rank runs
    mean = _mean(each)
    idle = (half - 1) * (mean.pair + mean.inputs - mean.weights - min(mean.inputs, mean.weights))
    idle -= min((half - 1) * (mean.inputs - mean.forward), mean.forward)
    saved = mean.forward + mean.backward - mean.pair
    totals = []
    for distance in range(half):
        is_middle = distance == half - 1
        own = _mean([each[distance], each[-1 - distance]])
        alone = 3 * half - distance - 1 + is_middle  # forwards, and as many backwards
        split = 2 * half - distance - 1  # of these backwards
        work = alone * own.forward + (alone - split) * own.backward + split * (own.inputs + own.weights)
        work += (visits - alone) * own.pair
        totals.append(work + idle - max(0, half - 2 - distance) * saved)
    return max(totals)
