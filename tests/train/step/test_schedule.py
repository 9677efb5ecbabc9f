import math
import subprocess
import sys

import pytest

from dovetail.config import dump, load_toml
from dovetail.train.step.schedule import (
    Position,
    Schedule,
    Segment,
    TrainingSchedule,
    as_fractions,
    load_schedule,
    schedule_names,
    tokens_after,
    value,
    values,
    with_peak,
)

T = 10**12
B = 10**9
LATE = 10_000  # a step past every warm-up


def rate(name: str, step: int = LATE, tokens: int = 0, fraction: float = 0.0) -> float:
    return value(load_schedule(name).learning_rate, Position(step=step, tokens=tokens, fraction=fraction))


def test_warm_up_is_linear_over_2000_steps() -> None:
    for name, peak in [("deepseek-v3", 2.2e-4), ("deepseek-v2", 2.4e-4), ("deepseek-v2-lite", 4.2e-4)]:
        assert rate(name, step=0) == 0.0
        assert rate(name, step=1) == pytest.approx(peak / 2000, rel=1e-12)
        assert rate(name, step=500) == pytest.approx(peak / 4, rel=1e-12)
        assert rate(name, step=1999) == pytest.approx(peak * 1999 / 2000, rel=1e-12)
        assert rate(name, step=2000) == peak
        assert rate(name, step=2001) == peak


def test_v3_learning_rate_at_every_breakpoint() -> None:  # [V3 §4.2]
    assert rate("deepseek-v3", tokens=5 * T) == 2.2e-4
    assert rate("deepseek-v3", tokens=10 * T - 1) == 2.2e-4
    assert rate("deepseek-v3", tokens=10 * T) == pytest.approx(2.2e-4, rel=1e-12)
    middle = (2.2e-4 + 2.2e-5) / 2
    assert rate("deepseek-v3", tokens=10 * T + 2150 * B) == pytest.approx(middle, rel=1e-12)
    quarter = 2.2e-5 + (2.2e-4 - 2.2e-5) * (1 + math.cos(math.pi / 4)) / 2
    assert rate("deepseek-v3", tokens=10 * T + 1075 * B) == pytest.approx(quarter, rel=1e-12)
    assert rate("deepseek-v3", tokens=14_300 * B - 1) == pytest.approx(2.2e-5, rel=1e-9)
    assert rate("deepseek-v3", tokens=14_300 * B) == 2.2e-5
    assert rate("deepseek-v3", tokens=14_633 * B - 1) == 2.2e-5
    assert rate("deepseek-v3", tokens=14_633 * B) == 7.3e-6
    assert rate("deepseek-v3", tokens=14_800 * B) == 7.3e-6
    assert load_schedule("deepseek-v3").total_tokens == 14_633 * B + 167 * B


def test_v3_batch_gamma_and_mtp_weight_at_every_breakpoint() -> None:  # [V3 §4.2]
    v3 = load_schedule("deepseek-v3")

    def at(tokens: int) -> tuple[int, float, float]:
        now = values(v3, Position(step=LATE, tokens=tokens))
        return now.batch_size, now.gamma, now.mtp_weight

    assert at(0) == (3072, 0.001, 0.3)
    assert at(234_500 * 10**6) == ((3072 + 15360) // 2, 0.001, 0.3)
    assert at(469 * B) == (15360, 0.001, 0.3)
    assert at(10 * T - 1) == (15360, 0.001, 0.3)
    assert at(10 * T) == (15360, 0.001, 0.1)
    assert at(14_300 * B - 1) == (15360, 0.001, 0.1)
    assert at(14_300 * B) == (15360, 0.0, 0.1)
    assert v3.sequence_length == 4096
    assert 15360 * 4096 == 62_914_560


@pytest.mark.parametrize(
    ("name", "peak", "first", "batches", "total"),
    [
        ("deepseek-v2", 2.4e-4, 0.6, [(0, 2304), (112_500 * 10**6, 5760), (225 * B, 9216)], 8_100 * B),
        ("deepseek-v2-lite", 4.2e-4, 0.8, [(0, 4608), (T, 4608)], 5_700 * B),
    ],
)
def test_v2_decays_in_two_steps(
    name: str, peak: float, first: float, batches: list[tuple[int, int]], total: int
) -> None:  # [V2 §3.1.2, App. B]
    assert rate(name, fraction=first - 1e-9) == peak
    assert rate(name, fraction=first) == pytest.approx(0.316 * peak, rel=1e-12)
    assert rate(name, fraction=0.9 - 1e-9) == pytest.approx(0.316 * peak, rel=1e-12)
    assert rate(name, fraction=0.9) == pytest.approx(0.316**2 * peak, rel=1e-12)
    schedule = load_schedule(name)
    assert [values(schedule, Position(tokens=tokens)).batch_size for tokens, _ in batches] == [b for _, b in batches]
    assert values(schedule, Position()).gamma == values(schedule, Position()).mtp_weight == 0.0
    assert (schedule.total_tokens, schedule.sequence_length) == (total, 4096)


def test_fractions_have_the_shape_of_the_tokens() -> None:
    v3 = load_schedule("deepseek-v3")
    short = as_fractions(v3)
    for tokens in range(100 * B, 14_800 * B, 97 * B):
        long_run = values(v3, Position(step=LATE, tokens=tokens))
        fraction = values(short, Position(step=1, tokens=1, fraction=tokens / (14_800 * B)))
        assert fraction.learning_rate == pytest.approx(long_run.learning_rate, rel=1e-9)
        assert (fraction.batch_size, fraction.gamma, fraction.mtp_weight) == (
            long_run.batch_size,
            long_run.gamma,
            long_run.mtp_weight,
        )


def test_steps_become_the_tokens_they_consume() -> None:
    v3 = load_schedule("deepseek-v3")
    assert tokens_after(v3, 0) == 0
    assert tokens_after(v3, 1) == 3072 * 4096
    # b(t) = b0 + k t has t(n) = b0 (e^(k n) - 1) / k; summing over whole steps falls a little short of it.
    k = (15360 - 3072) * 4096 / (469 * B)
    assert tokens_after(v3, 2000) == pytest.approx(3072 * 4096 * math.expm1(2000 * k) / k, rel=1e-3)
    end = as_fractions(v3).learning_rate.segments[0].fraction
    assert end == tokens_after(v3, 2000) / v3.total_tokens  # type: ignore[operator]
    assert as_fractions(v3, warmup=0.02).learning_rate.segments[0].fraction == 0.02


def test_with_peak_scales_everything() -> None:
    batch = with_peak(load_schedule("deepseek-v3").batch_size, 40)
    assert (batch.start, [segment.value for segment in batch.segments]) == (8.0, [40.0, 40.0])
    lr = with_peak(load_schedule("deepseek-v3").learning_rate, 3e-3)
    assert [segment.value for segment in lr.segments] == pytest.approx([3e-3, 3e-3, 3e-4, 3e-4, 3e-3 * 7.3e-6 / 2.2e-4])
    with pytest.raises(ValueError, match="zero throughout"):
        with_peak(load_schedule("deepseek-v2").gamma, 1.0)


def test_short_preset_is_fractions_only() -> None:
    short = load_schedule("short")
    learning_rate = short.learning_rate
    assert value(learning_rate, Position(fraction=0.01)) == pytest.approx(1.5e-3)
    assert value(learning_rate, Position(fraction=0.02)) == pytest.approx(3e-3)
    assert value(learning_rate, Position(fraction=0.51)) == pytest.approx((3e-3 + 3e-4) / 2)
    assert value(learning_rate, Position(fraction=1.0)) == pytest.approx(3e-4)
    assert value(learning_rate, Position(fraction=1.5)) == pytest.approx(3e-4)
    first, last = (
        values(short, Position(step=7, tokens=T)),
        values(short, Position(step=7, tokens=T, fraction=0.99)),
    )
    assert (first.gamma, first.mtp_weight, last.gamma, last.mtp_weight) == (0.001, 0.3, 0.0, 0.1)
    assert as_fractions(short) == short


def test_batch_sizes_are_positive_multiples() -> None:
    schedule = TrainingSchedule(
        source="test",
        learning_rate=Schedule(segments=(Segment(value=1.0),)),
        batch_size=Schedule(start=1, segments=(Segment(shape="linear", value=33, tokens=32), Segment(value=33))),
    )
    sizes = [values(schedule, Position(tokens=tokens), batch_multiple=8).batch_size for tokens in (0, 5, 12, 31, 99)]
    assert sizes == [8, 8, 16, 32, 32]


def test_schedules_survive_toml(tmp_path) -> None:  # type: ignore[no-untyped-def]
    assert {"deepseek-v2", "deepseek-v2-lite", "deepseek-v3", "short"} <= set(schedule_names())
    for name in schedule_names():
        path = tmp_path / "run.toml"
        path.write_text(dump(load_schedule(name)), encoding="utf-8")
        assert load_toml(path, TrainingSchedule) == load_schedule(name)


@pytest.mark.parametrize(
    ("segments", "message"),
    [
        ([], "at least 1"),
        ([{"value": 1, "steps": 3}], "last segment must have no end"),
        ([{"value": 1}, {"value": 2}], "segment 0 has no end but is not the last"),
        ([{"value": 1, "steps": 3, "tokens": 4}, {"value": 1}], "ends at one of"),
        ([{"value": 1, "tokens": 9}, {"value": 1, "tokens": 9}, {"value": 1}], "not after 9"),
        (
            [{"value": 1, "steps": 9}, {"value": 1, "shape": "cosine", "tokens": 9}, {"value": 1}],
            "boundary in steps",
        ),
        ([{"value": 1, "shape": "linear"}], "add a constant one"),
        ([{"value": 1, "fraction": 1.1}, {"value": 1}], "less than or equal to 1"),
        ([{"value": 1, "step": 3}, {"value": 1}], "Extra inputs"),
    ],
)
def test_mistakes_in_a_schedule_are_named(segments: list[dict[str, object]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Schedule.model_validate({"segments": segments})


def test_unknown_schedule_names_the_near_one() -> None:
    with pytest.raises(ValueError, match="deepseek-v3"):
        load_schedule("deepseek-v4")


def test_schedule_does_not_load_torch() -> None:
    code = "import sys, dovetail.train.step.schedule; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
