"""What a pipeline idles, in closed form: the published formulas, and an estimate that builds no schedule.

With F, I, W, B = I + W and FB (a pair) the same on every stage, and h = PP/2 [V3 Table 2]:

    1F1B                 (PP - 1) (F + B)
    interleaved          (PP - 1) (F + B), of one of a rank's stages [arXiv 2104.04473]
    ZB1P                 (PP - 1) (F + B - 2 W)
    DualPipe, DualPipeV  (h - 1) (FB + B - 3 W), h = PP for DualPipeV on PP ranks

Replays agree with the first two always, with ZB1P where W <= F and W <= I, and with DualPipe on the middle ranks where
I = F and W <= I. Replays over random durations fit, exactly,

    ZB1P                 (PP - 1) (F + I - min(F, I, W))
    DualPipe(V), middle  (h - 1) (FB + I - W - min(I, W)) - min((h - 1) (I - F), F)

of which the last term comes from the middle ranks' first pair, which does not overlap. Further out a rank runs one more
pair per rank as lone halves (not the first rank out), works F + B - FB longer for each and idles as much less.
"""

from __future__ import annotations

from dataclasses import dataclass

from dovetail.parallel.schedules.pipelines import SCHEDULES
from dovetail.planner.training.timeline import Durations, step_seconds


def published_bubble(
    name: str, ranks: int, *, forward: float, backward: float, weight_backward: float = 0.0, pair: float = 0.0
) -> float:
    """Seconds that a rank idles by the published formula; F and B are of one stage. Raises ValueError for `name`."""
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
    """Seconds of one stage, or their mean over some."""

    forward: float
    backward: float
    inputs: float
    weights: float
    pair: float


def estimate_seconds(name: str, ranks: int, microbatches: int, durations: Durations, chunks: int = 2) -> float:
    """Roughly `replay(make_schedule(...), durations).seconds` in 0.1 ms, without building a schedule: to prune.

    The work of the slowest rank and the idling of a pipeline of mean stages. Exact, sends aside, where all stages take
    the same, B = I + W and there are PP micro-batches or more. Where stages differ it is up to an eighth off with 2 PP
    micro-batches, and less with more. Sizes are not checked. Raises ValueError for an unknown name or illegal
    durations.
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
    """How many messages in a row nothing hides: a fit to replays with short sends.

    Where micro-batches in flight only just fill the pipeline (1F1B, DualPipe) each round trip of them waits once.
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
