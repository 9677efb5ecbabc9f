"""Health records as a table, the worst operands first, in one line, and as JSON."""

import json
import math
from pathlib import Path

import pytest

from dovetail.train.report.health_table import as_json, of_step, read_health, rows, summary_line
from dovetail.train.report.metrics import HealthMetrics, MetricsLog


def record(layer: str, operand: str, step: int = 3, **changed: float) -> HealthMetrics:
    figures = {
        "flushed": 0.0,
        "clipped": 0.0,
        "smallest_scale": 1e-4,
        "largest_scale": 0.5,
        "signal_to_noise": 31.5,
    }
    return HealthMetrics(step=step, layer=layer, operand=operand, **(figures | changed))


GOOD = record("layers.0.o_proj", "input")
NOISY = record("layers.1.experts", "grad", signal_to_noise=24.25)
FLUSHED = record("layers.1.experts", "input", flushed=0.0125)
EXACT = record("layers.2.o_proj", "weight", signal_to_noise=math.inf)
BROKEN = record("layers.2.o_proj", "grad", largest_scale=math.nan, smallest_scale=math.nan, signal_to_noise=math.inf)
RECORDS = [GOOD, EXACT, FLUSHED, NOISY, BROKEN]


def logged(directory: Path, records: list[HealthMetrics]) -> Path:
    log = MetricsLog(directory / "metrics.jsonl")
    for each in records:
        log.write(each)
    log.close()
    return directory


def test_the_worst_come_first() -> None:
    assert of_step(RECORDS) == [BROKEN, NOISY, FLUSHED, GOOD, EXACT]
    printed = rows(of_step(RECORDS))
    assert [row[2] for row in printed] == ["not finite", "24.2 dB", "31.5 dB", "31.5 dB", "exact"]
    assert printed[2] == ("layers.1.experts", "input", "31.5 dB", "1.250%", "0.000%", "0.0001", "0.5")


def test_the_order_survives_the_log(tmp_path: Path) -> None:
    """There infinities and NaN are both null."""
    found = of_step(read_health(logged(tmp_path, RECORDS)))
    names = [(each.layer, each.operand) for each in of_step(RECORDS)]
    assert [(each.layer, each.operand) for each in found] == names
    record_of_step = json.loads(json.dumps(as_json(found, found), allow_nan=False))
    assert record_of_step["steps"] == [3] and record_of_step["step"] == 3
    assert [each["signal_to_noise"] for each in record_of_step["operands"]] == [None, 24.25, 31.5, 31.5, None]


def test_a_step_is_chosen_and_another_is_an_error() -> None:
    early = record("layers.0.o_proj", "input", step=1)
    assert of_step([early, *RECORDS])[0].step == 3
    assert of_step([early, *RECORDS], step=1) == [early]
    with pytest.raises(ValueError, match="step 2 has no health records; the nearest that has is 1"):
        of_step([early, *RECORDS], step=2)


def test_one_line_names_the_worst_of_each_kind() -> None:
    assert summary_line([GOOD, FLUSHED, NOISY]) == (
        "health after step 3, 3 operands: lowest signal-to-noise 24.2 dB (grad of layers.1.experts), "
        "flushed up to 1.25% (input of layers.1.experts), clipped up to 0.00%"
    )
    assert "lowest signal-to-noise not finite (grad of layers.2.o_proj)" in summary_line(RECORDS)


def test_a_run_without_records_says_how_to_get_some(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no metrics.jsonl in it; give the directory of a run"):
        read_health(tmp_path)
    with pytest.raises(ValueError, match=r"no health records; a run writes them with train.health_every"):
        read_health(logged(tmp_path, []))
