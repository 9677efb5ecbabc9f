import json
import math
from pathlib import Path

import pytest

from dovetail.train.report.metrics import (
    HeldOutMetrics,
    Metrics,
    MetricsLog,
    StepMetrics,
    WholeHeldOutMetrics,
    read_metrics,
)


def step_metrics(step: int, loss: float = 2.5) -> StepMetrics:
    return StepMetrics(
        step=step,
        tokens=step * 2048,
        loss=loss,
        mtp_loss=loss + 0.25,
        mtp_losses=[loss, loss + 0.5],
        balance_loss=1e-4,
        grad_norm=0.1 + step,
        learning_rate=1e-3 / 3,
        batch_size=8,
        gamma=0.001,
        mtp_weight=0.3,
        tokens_per_second=3100.0,
        mfu=0.4,
        max_vio=[0.5, 1 / 3],
        skipped=0,
        seconds=0.66,
    )


def held_out(step: int) -> HeldOutMetrics:
    return HeldOutMetrics(step=step, tokens=step * 2048, loss=3.0, bits_per_byte=1.9)


def run(path: Path, resumed_step: int, last: int) -> None:
    log = MetricsLog(path, resumed_step)
    for step in range(resumed_step + 1, last + 1):
        log.write(step_metrics(step))
        if step % 2 == 0:
            log.write(held_out(step))
    log.sync()
    log.close()


def test_records_come_back(tmp_path: Path) -> None:
    path = tmp_path / "run" / "metrics.jsonl"
    log = MetricsLog(path)
    whole = WholeHeldOutMetrics(step=2, tokens=4096, loss=3.1, bits_per_byte=1.95)
    written: list[Metrics] = [step_metrics(1), held_out(1), step_metrics(2), held_out(2), whole]
    for count, record in enumerate(written, start=1):
        log.write(record)
        assert read_metrics(path) == written[:count]  # flushed line by line
    log.close()
    records = [json.loads(line) for line in path.read_text().splitlines()]
    assert [record["kind"] for record in records] == ["step", "held_out", "step", "held_out", "held_out_whole"]
    first = records[0]
    assert first["learning_rate"] == 1e-3 / 3
    assert first["max_vio"] == [0.5, 1 / 3]


def test_what_is_not_finite_is_valid_json(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path)
    log.write(step_metrics(1, loss=math.inf))
    log.close()
    assert json.loads(path.read_text(), parse_constant=pytest.fail)["loss"] is None
    (record,) = read_metrics(path)
    assert isinstance(record, StepMetrics)
    assert math.isnan(record.loss)
    assert math.isnan(record.mtp_loss)


def test_resumed_file_is_the_uninterrupted_one(tmp_path: Path) -> None:
    run(tmp_path / "whole.jsonl", 0, 9)
    expected = (tmp_path / "whole.jsonl").read_bytes()
    for stopped_at in range(10):
        for resumed_step in range(stopped_at + 1):
            path = tmp_path / f"{stopped_at}-{resumed_step}.jsonl"
            run(path, 0, stopped_at)
            run(path, resumed_step, 9)
            assert path.read_bytes() == expected


def test_a_torn_last_line_is_dropped(tmp_path: Path) -> None:
    whole, path = tmp_path / "whole.jsonl", tmp_path / "metrics.jsonl"
    run(whole, 0, 4)
    expected = whole.read_bytes()
    start = expected.rindex(b'{"kind": "step"')  # of step 4
    for cut in [*range(start, len(expected), 7), len(expected) - 1]:
        path.write_bytes(expected[:cut])
        assert [record.step for record in read_metrics(path)][:5] == [1, 2, 2, 3] + [4] * (b"\n" in expected[start:cut])
        run(path, 3, 4)
        assert path.read_bytes() == expected
    path.write_bytes(expected[:start] + b"\0" * 50)  # what a power cut leaves on some file systems
    run(path, 3, 4)
    assert path.read_bytes() == expected


def test_a_line_that_is_no_record_is_named(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    run(path, 0, 2)
    path.write_text(path.read_text() + '{"kind": "step", "step": 3}\n')
    with pytest.raises(ValueError, match=r"metrics.jsonl: line 4 is not a record"):
        read_metrics(path)


def test_a_log_of_an_earlier_version_lacks_what_it_did_not_know(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path)
    log.write(step_metrics(1))
    log.close()
    record = json.loads(path.read_text())
    del record["nic_bytes"], record["node_bytes"]
    path.write_text(json.dumps(record) + "\n")
    assert read_metrics(path) == [step_metrics(1)]
    del record["loss"]
    path.write_text(json.dumps(record) + "\n")
    with pytest.raises(ValueError, match="line 1 is not a record"):
        read_metrics(path)
