"""Schedules against torch's own, the paper's counts, and rules that every schedule keeps."""

from __future__ import annotations

import dataclasses
import itertools
from collections import Counter, defaultdict
from types import SimpleNamespace

import pytest
import torch
from torch.distributed.pipelining import schedules as torch_schedules

from dovetail.cost.memory.rank import in_flight
from dovetail.parallel.schedules.dualpipe import dualpipe, dualpipev
from dovetail.parallel.schedules.pipelines import SCHEDULES, interleaved, make_schedule, one_f_one_b, zero_bubble
from dovetail.parallel.schedules.schedule import Action, Pair, Schedule, Step, activation_peaks, check, counts
from dovetail.spec.layout import Layout

SIZES = {
    "1f1b": [(1, 1), (2, 1), (4, 2), (4, 9), (8, 16)],
    "interleaved": [(1, 3), (2, 2), (4, 4), (4, 8), (8, 16)],
    "zb1p": [(1, 1), (2, 1), (4, 2), (4, 9), (8, 16)],
    "dualpipe": [(2, 4), (2, 6), (4, 8), (4, 14), (8, 20)],
    "dualpipev": [(1, 2), (2, 4), (3, 7), (4, 8), (4, 14)],
}
ALL = [(name, *sizes) for name in SCHEDULES for sizes in SIZES[name]]
TORCH_SIZES = {
    "1f1b": [(2, 4), (4, 4), (4, 9), (8, 16)],
    "interleaved": [(2, 4), (4, 8), (8, 16)],
    "zb1p": [(2, 4), (4, 8), (8, 16)],
    "dualpipev": [(2, 4), (3, 7), (4, 8), (8, 40)],
}


def torch_order(name: str, ranks: int, microbatches: int) -> dict[int, list[str]]:
    """What torch plans for every rank, from its own constructors with stages that compute nothing."""
    local = {"1f1b": 1, "zb1p": 1}.get(name, 2)
    stages = [
        SimpleNamespace(
            num_stages=ranks * local,
            group_size=ranks,
            group_rank=0,
            stage_index=index * ranks,
            submod=torch.nn.Identity(),
            is_first=index == 0,
            is_last=False,
            has_backward=True,
        )
        for index in range(local)
    ]
    if name == "1f1b":
        order = torch_schedules.Schedule1F1B(stages[0], microbatches, loss_fn=None)._get_pipeline_order()
        # This description of torch's counts the forwards of the last rank from 1 on (its run counts from 0).
        if str(next(action for action in order[ranks - 1] if action is not None)).endswith("F1"):
            order[ranks - 1] = [
                action._replace(microbatch_index=action.microbatch_index - 1)
                if action and "F" in str(action)
                else action
                for action in order[ranks - 1]
            ]
    else:
        kind = {
            "interleaved": torch_schedules.ScheduleInterleaved1F1B,
            "zb1p": torch_schedules.ScheduleInterleavedZeroBubble,
            "dualpipev": torch_schedules.ScheduleDualPipeV,
        }[name]
        order = kind(stages, microbatches, loss_fn=None).pipeline_order
    return {
        rank: [str(action) for action in actions if action is not None and "REDUCE_GRAD" not in str(action)]
        for rank, actions in order.items()
    }


def spelled(step: Step) -> str:
    """As torch prints it."""
    if isinstance(step, Pair):
        return f"({';'.join(spelled(half) for half in step.halves)})OVERLAP_F_B"
    return f"{step.stage}{step.kind}{step.microbatch}"


@pytest.mark.parametrize(
    ("name", "ranks", "microbatches"), [(name, *sizes) for name in TORCH_SIZES for sizes in TORCH_SIZES[name]]
)
def test_ranks_do_what_torch_plans(name: str, ranks: int, microbatches: int) -> None:
    schedule = make_schedule(name, ranks, microbatches)
    ours = {rank: [spelled(step) for step in steps] for rank, steps in enumerate(schedule.actions)}
    assert ours == torch_order(name, ranks, microbatches)


@pytest.mark.parametrize(("ranks", "microbatches"), [(4, 8), (8, 20), (16, 40)])
def test_half_of_dualpipe_is_dualpipev(ranks: int, microbatches: int) -> None:
    """Torch checks the folded one; a rank of DualPipe does the same, stage for stage and direction for fold."""
    whole, folded = dualpipe(ranks, microbatches), dualpipev(ranks // 2, microbatches // 2)

    def unfold(action: Action) -> Action:
        if action.stage < ranks // 2:
            return action
        return Action(action.kind, action.microbatch + microbatches // 2, action.stage, 1)

    for rank, steps in enumerate(folded.actions):
        expected = [
            Pair(unfold(step.forward), unfold(step.backward)) if isinstance(step, Pair) else unfold(step)
            for step in steps
        ]
        assert list(whole.actions[rank]) == expected


def test_both_ends_of_dualpipe_do_the_same() -> None:
    schedule = dualpipe(6, 14)

    def mirrored(action: Action) -> Action:
        microbatch = (action.microbatch + 7) % 14
        return Action(action.kind, microbatch, action.stage, 1 - action.direction)

    for near, far in zip(schedule.actions, reversed(schedule.actions), strict=True):
        assert [tuple(mirrored(half) for half in step.halves) for step in near] == [step.halves for step in far]


def test_dualpipe_counts_of_the_training_run() -> None:
    """PP 16, 120 chunks [V3 §3.2]: rank 0 runs 23 F, 97 pairs, 23 backwards and 15 W alone, rank 7 16, 104, 16, 8;
    there one pair more runs as its halves, the first of the two middle ranks."""
    schedule = dualpipe(16, 120)
    for rank, (alone, pairs, weights) in {0: (23, 97, 15), 15: (23, 97, 15), 7: (16, 104, 8), 8: (16, 104, 8)}.items():
        found = counts(schedule, rank)
        apart = rank in (7, 8)
        assert found["F"] == found["B"] + found["I"] == alone + apart
        assert found["FB"] == pairs - apart
        assert found["W"] == found["I"] == weights
    for rank in range(16):
        found = counts(schedule, rank)
        assert found["F"] + found["FB"] == found["B"] + found["I"] + found["FB"] == 120


def test_first_steps_of_dualpipe_as_drawn() -> None:
    """Rank 0 of the drawing for 8 ranks and 20 micro-batches: 0 to 6 and the far end's first, then I, W, F of these."""
    steps = dualpipe(8, 20).actions[0]
    assert " ".join(f"{step.halves[0].kind}{step.halves[0].microbatch}" for step in steps[:17]) == (
        "F0 F1 F2 F3 F4 F5 F6 F10 I10 W10 F11 I11 W11 F12 I12 W12 F13"
    )
    assert steps[17] == Pair(Action("F", 7, 0, 0), Action("B", 13, 7, 1))
    assert [step.kind for step in steps[-8:]] == ["I", "W", "I", "W", "I", "W", "I", "W"]


@pytest.mark.parametrize(("name", "ranks", "microbatches"), ALL)
def test_every_schedule_is_legal(name: str, ranks: int, microbatches: int) -> None:
    schedule = make_schedule(name, ranks, microbatches)
    check(schedule)
    assert (schedule.ranks, schedule.microbatches, schedule.name) == (ranks, microbatches, name)
    assert schedule.stages == ranks * (2 if name in ("interleaved", "dualpipev") else 1)
    forwards = Counter(
        (half.microbatch, half.stage)
        for steps in schedule.actions
        for step in steps
        for half in step.halves
        if half.kind == "F"
    )
    assert forwards == dict.fromkeys(itertools.product(range(microbatches), range(schedule.stages)), 1)


@pytest.mark.parametrize(("name", "ranks", "microbatches"), ALL)
def test_messages_arrive_in_the_order_in_which_they_are_needed(name: str, ranks: int, microbatches: int) -> None:
    """So a runtime can send without tags: between two ranks one channel for activations and one for gradients. (One
    for both does not do for DualPipe and DualPipeV.)"""
    schedule = make_schedule(name, ranks, microbatches)
    sent, needed = defaultdict(list), defaultdict(list)
    for rank, steps in enumerate(schedule.actions):
        for half in (half for step in steps for half in step.halves):
            if (target := schedule.sends_to(half)) is not None:
                after = half.stage + (1 if half.kind == "F" else -1)
                sent[rank, target, half.kind == "F"].append((half.microbatch, after))
            if (source := schedule.receives_from(half)) is not None:
                needed[source, rank, half.kind == "F"].append((half.microbatch, half.stage))
    assert sent == needed


def test_activations_in_flight() -> None:
    assert activation_peaks(one_f_one_b(8, 20)) == (8, 7, 6, 5, 4, 3, 2, 1)
    assert activation_peaks(zero_bubble(8, 20)) == (8,) * 8
    assert activation_peaks(dualpipe(8, 20)) == (9,) * 8  # PP + 1 [V3 Table 2]
    assert activation_peaks(dualpipev(4, 20)) == (9,) * 4
    assert activation_peaks(interleaved(4, 8, 2)) == (11, 9, 7, 5)  # Megatron: (chunks-1) PP + 2 (PP-1-r) + 1
    # What the weight half needs is all that ZB1P adds to 1F1B.
    assert activation_peaks(zero_bubble(8, 20), [1.0] * 8, [0.0] * 8) == activation_peaks(one_f_one_b(8, 20))
    assert activation_peaks(one_f_one_b(2, 4), held=[10.0, 7.0]) == (20.0, 7.0)
    with pytest.raises(ValueError, match="8 stages: 2, 2"):
        activation_peaks(one_f_one_b(8, 20), [1.0, 1.0])


@pytest.mark.parametrize(("name", "ranks", "microbatches"), ALL)
def test_memory_counts_the_activations_that_the_schedule_holds(name: str, ranks: int, microbatches: int) -> None:
    """What `cost.memory.rank` says without a schedule."""
    schedule = make_schedule(name, ranks, microbatches)
    layout = Layout(pp=ranks, microbatches=microbatches, schedule=name)
    for rank in range(ranks):
        stages = layout.stages_of(rank)
        assert sorted(stages) == [stage for stage, _ in schedule.held_by(rank)]
        for stage in stages:
            only = [float(each == stage) for each in range(schedule.stages)]
            assert activation_peaks(schedule, only)[rank] == in_flight(layout, rank, stage)


def test_who_holds_what_and_hears_from_whom() -> None:
    whole, folded = dualpipe(4, 8), dualpipev(2, 4)
    assert whole.held_by(0) == ((0, 0), (3, 1))
    assert folded.held_by(1) == ((1, 0), (2, 0))
    far = Action("F", 4, 3, 1)  # the last stage of what entered at rank 3
    assert (whole.rank_of(far), whole.receives_from(far), whole.sends_to(far)) == (0, 1, None)
    assert whole.receives_from(Action("B", 0, 2, 0)) == 3
    assert whole.sends_to(Action("I", 0, 2, 0)) == 1
    assert whole.sends_to(Action("W", 0, 2, 0)) is None
    assert folded.sends_to(Action("F", 0, 1)) is None  # stages 1 and 2 share rank 1
    assert folded.sends_to(Action("F", 0, 2)) == 0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: dualpipe(7, 20), "ranks = 7.*nearest: 6 or 8"),
        (lambda: dualpipe(8, 21), "microbatches = 21.*nearest: 20 or 22"),
        (lambda: dualpipe(8, 14), "14 micro-batches.*at least 16"),
        (lambda: dualpipe(0, 20), "ranks = 0.*nearest: 2"),
        (lambda: dualpipev(4, 7), "7 micro-batches.*at least 8"),
        (lambda: dualpipev(0, 7), "ranks = 0"),
        (lambda: interleaved(4, 9, 2), "microbatches = 9 .*nearest: 8"),
        (lambda: interleaved(4, 8, 0), "chunks = 0"),
        (lambda: one_f_one_b(0, 4), "ranks = 0"),
        (lambda: zero_bubble(4, 0), "microbatches = 0"),
        (lambda: make_schedule("gpipe", 4, 8), "no schedule 'gpipe'; there are 1f1b, interleaved"),
    ],
)
def test_sizes_that_cannot_be(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def edited(schedule: Schedule, rank: int, steps: list[Step]) -> Schedule:
    actions = list(schedule.actions)
    actions[rank] = tuple(steps)
    return dataclasses.replace(schedule, actions=tuple(actions))


def test_check_finds_what_is_wrong() -> None:
    good = zero_bubble(2, 3)
    first, last = list(good.actions[0]), list(good.actions[1])
    assert last[:3] == [Action("F", 0, 1), Action("I", 0, 1), Action("F", 1, 1)]
    broken = {
        "micro-batch 2 at stage 1 runs FI": edited(good, 1, last[:-1]),
        "W2 of stage 1 comes after F and I and W": edited(good, 1, [*last, last[-1]]),
        "I0 of stage 1 comes after nothing": edited(good, 1, [last[1], last[0], *last[2:]]),
        "W0 of stage 1 comes after F of": edited(good, 1, [last[0], Action("W", 0, 1), *last[1:]]),
        "F0 of stage 1 belongs on rank 1": edited(good, 0, [Action("F", 0, 1), *first]),
        "F3 of stage 0: micro-batches are 0 to 2": edited(good, 0, [*first, Action("F", 3, 0)]),
        "there are 2 stages in 1": edited(good, 0, [*first, Action("F", 0, 0, 1)]),
        "rank 0 holds 2 activations at once, over its 1": dataclasses.replace(good, activation_limit=(1, 2)),
    }
    for message, schedule in broken.items():
        with pytest.raises(ValueError, match=message):
            check(schedule)
    check(good)


def test_check_finds_a_circle() -> None:
    """Each rank does its own in a fair order, but rank 0 wants a gradient before it makes what rank 1 begins with."""
    good = one_f_one_b(2, 2)
    assert [str(step) for step in good.actions[0][:3]] == ["F0 of stage 0", "F1 of stage 0", "B0 of stage 0"]
    waiting = edited(good, 1, [Action("F", 1, 1), Action("B", 1, 1), Action("F", 0, 1), Action("B", 0, 1)])
    check(waiting)  # another order, but it can be done
    stuck = edited(waiting, 0, [Action("F", 0, 0), Action("B", 0, 0), Action("F", 1, 0), Action("B", 1, 0)])
    with pytest.raises(ValueError, match="rank 0 before B0 of stage 0; rank 1 before F1 of stage 1"):
        check(stuck)
    alone = edited(good, 1, [])
    with pytest.raises(ValueError, match="waits for a stage that never runs"):
        _ = alone.order
