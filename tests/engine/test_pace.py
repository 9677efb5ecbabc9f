"""What is decided from times, with invented ones."""

from __future__ import annotations

import pytest

from dovetail.engine.scheduling.pace import LEAST_PART, PROBE_EVERY, PROBE_STEPS, STALL, Average, Pace


def measured(plain: float, drafting: float, sequences: int = 1, kept: tuple[float, ...] = (0.8, 0.5)) -> Pace:
    """Times of steps, and shares of steps whose drafts were kept."""
    pace = Pace()
    for _ in range(PROBE_STEPS):
        pace.add_step(sequences, 0, plain)
        pace.add_step(sequences, 2, drafting)
    pace.accepted = [Average(value=share, count=9) for share in kept]
    return pace


def test_an_average_forgets() -> None:
    average = Average()
    for value in (1.0, 2.0, 3.0):
        average.add(value)
    assert average.value == pytest.approx(2)
    for _ in range(100):
        average.add(7.0)
    assert average.value == pytest.approx(7, rel=1e-3) and average.count == 103


@pytest.mark.parametrize(("plain", "drafting", "pays"), [(1.0, 2.2, True), (1.0, 2.4, False), (0.1, 0.24, False)])
def test_drafts_are_made_where_they_give_more_tokens_a_second(plain: float, drafting: float, pays: bool) -> None:
    pace = measured(plain, drafting)
    assert pace.gain(1, 2) == pytest.approx(2.3 * plain / drafting)
    assert pace.depth(1, 2) == (2 if pays else 0)


def test_fewer_drafts_gain_by_those_alone() -> None:
    pace = measured(1.0, 2.0)
    pace.add_step(1, 1, 1.5)
    assert pace.gain(1, 1) == pytest.approx(1.8 / 1.5)


def test_both_ways_are_tried_first() -> None:
    pace, seen = Pace(), []
    for _ in range(2 * PROBE_STEPS):
        seen.append(pace.depth(3, 2))
        pace.add_step(3, seen[-1], 1.0)
    assert seen == [2] * PROBE_STEPS + [0] * PROBE_STEPS
    assert pace.gain(3, 2) == 1.0 and pace.depth(3, 2) == 0, "nothing was kept"


def test_numbers_of_sequences_are_told_apart_by_powers_of_two() -> None:
    pace = measured(1.0, 2.0, sequences=5)
    assert [pace.depth(count, 2) for count in (5, 6, 8)] == [2, 2, 2]
    assert pace.gain(4, 2) == pace.gain(9, 2) == 1.0, "not known"
    pace.add_step(1, 0, 1.0)
    assert (1, 0) in pace.steps


@pytest.mark.parametrize("drafting", [2.0, 3.0])
def test_the_way_not_taken_is_tried_now_and_then(drafting: float) -> None:
    pace = measured(1.0, drafting)
    taken = 2 if drafting == 2.0 else 0
    seen = [pace.depth(1, 2) for _ in range(3 * PROBE_EVERY)]
    others = [number for number, depth in enumerate(seen) if depth != taken]
    assert others[: PROBE_STEPS + 1] == list(range(PROBE_EVERY - 1, PROBE_EVERY + PROBE_STEPS))
    assert len(others) <= 3 * (PROBE_STEPS + 1)


def test_a_change_of_load_changes_the_choice() -> None:
    pace = measured(1.0, 2.0)
    for _ in range(40):
        pace.add_step(1, 2, 4.0)
    assert pace.depth(1, 2) == 0
    for _ in range(60):
        pace.add_step(1, 2, 1.0)
    assert pace.depth(1, 2) == 2


def test_shares_of_accepted_drafts_are_by_position() -> None:
    pace = Pace()
    for kept in (2, 1, 0, 1):
        pace.add_drafts(2, kept)
    assert [average.value for average in pace.accepted] == pytest.approx([0.75, 0.25])
    pace.add_drafts(1, 1)
    assert [average.value for average in pace.accepted] == pytest.approx([0.8, 0.25])


def test_a_part_of_a_prompt_takes_as_long_as_a_step() -> None:
    pace = measured(0.1, 0.2, sequences=4)
    assert pace.part(4, 0, 1, 512) == 512, "the time of a prompt is not known"
    pace.add_part(0, 0, 100, 0.1)  # 1 ms a token
    assert [pace.part(4, depth, 1, 512) for depth in (0, 2)] == [int(STALL * 100), int(STALL * 200)]
    assert pace.part(4, 2, 1, 150) == 150
    assert pace.part(0, 0, 1, 512) == 512, "nobody waits"
    assert pace.part(9, 0, 1, 512) == 512, "a step of so many is not known"
    for _ in range(99):
        pace.add_part(0, 0, 100, 1.0)
    assert pace.part(4, 0, 1, 512) == LEAST_PART
    assert pace.part(4, 0, 1, 7) == 7


def test_a_burst_of_prompts_has_longer_parts() -> None:
    pace = measured(0.1, 0.2, sequences=4)
    pace.add_part(0, 0, 100, 0.1)
    alone = int(STALL * 100)
    assert [pace.part(4, 0, waiting, 512) for waiting in (0, 1, 2, 3, 8)] == [alone, alone, 3 * alone, 5 * alone, 512]


def test_a_part_beside_decoding_took_what_it_added_to_the_step() -> None:
    pace = measured(0.1, 0.2, sequences=4)
    pace.add_part(4, 0, 100, 0.3)
    assert pace.prompt_token.value == pytest.approx(0.002)
    pace.add_part(9, 0, 100, 0.3)
    assert pace.prompt_token.count == 1, "a step of so many is not known"
    pace.add_part(4, 2, 100, 0.1)
    assert pace.prompt_token.value == pytest.approx(0.001), "never below nothing"


def test_a_few_tokens_say_nothing_of_the_time_of_a_prompt() -> None:
    pace = Pace()
    pace.add_part(0, 0, LEAST_PART - 1, 9.0)
    assert pace.prompt_token.count == 0


def test_explanations() -> None:
    assert Pace().explain(0) == "no drafts: none were asked for, or the model has no MTP modules"
    assert Pace().explain(2) == "not measured yet"
    pace = measured(0.010, 0.020, sequences=4)
    for _ in range(PROBE_STEPS):
        pace.add_step(1, 0, 0.010)
        pace.add_step(1, 2, 0.040)
    pace.add_step(8, 0, 0.01)
    assert pace.explain(2) == (
        "up to 1 sequences drafts do not pay: a step takes 40.0 ms with and 10.0 ms without, and gives 2.30 tokens; "
        "up to 4 sequences drafts pay: a step takes 20.0 ms with and 10.0 ms without, and gives 2.30 tokens"
    )
    pace.add_step(1, 1, 0.012)
    assert "gives 1.80 tokens" in pace.explain(1)
