"""Counts of ranks are read, and stand beside the kernel's, link by link."""

from __future__ import annotations

import json
import os
import re
from dataclasses import replace
from pathlib import Path

import pytest

from dovetail.cluster.counters import Counts, read_traffic
from dovetail.cluster.launch import Failure
from dovetail.cluster.report import as_json, table
from dovetail.cluster.run import Outcome
from dovetail.cluster.shape import Shape


def counts(sent: int, dropped: int = 0) -> Counts:
    return Counts(sent=sent, received=sent + 1, packets_sent=2, packets_received=3, dropped=dropped)


OUTCOME = Outcome(
    shape=Shape(nodes=2, ranks=2, nic=25e6),
    counts={(0, "nic"): counts(1000), (0, "lo"): counts(2000), (1, "nic"): counts(3000), (1, "lo"): counts(4000)},
    started=0.0,
    seconds=2.0,
    failure=None,
)
TRAFFIC = {rank: {"nic": 10 * 2**rank, "node": 2**rank} for rank in range(4)}


def test_ranks_of_a_node_are_added_up_beside_its_links() -> None:
    title, header, rows = table(OUTCOME, {"in_steps": TRAFFIC})
    assert title == "bytes sent in 2.0 s"
    assert header == ("link", ">counted in steps", ">by the kernel", ">received")
    assert rows == [
        ("node 0 to the switch", "30", "1,000", "1,001"),
        ("inside node 0", "3", "2,000", "2,001"),
        ("node 1 to the switch", "120", "3,000", "3,001"),
        ("inside node 1", "12", "4,000", "4,001"),
    ]
    predicted = {rank: {kind: 100 * size for kind, size in of.items()} for rank, of in TRAFFIC.items()}
    told = {"in_steps": TRAFFIC, "beside": TRAFFIC, "predicted": predicted}
    assert table(OUTCOME, told)[2][0] == ("node 0 to the switch", "3,000", "30", "30", "1,000", "1,001")
    assert [link["predicted"] for link in as_json(OUTCOME, told)["links"]] == [3000, 300, 12000, 1200]


def test_what_is_not_known_has_no_column() -> None:
    _, header, rows = table(OUTCOME, {})
    assert header == ("link", ">by the kernel", ">received") and rows[0] == ("node 0 to the switch", "1,000", "1,001")
    assert not {"predicted", "in_steps", "beside"} & set(as_json(OUTCOME, {})["links"][0])


def test_dropped_packets_are_shown_where_there_are_some() -> None:
    lossy = replace(OUTCOME, counts={**OUTCOME.counts, (1, "nic"): counts(3000, dropped=7)})
    _, header, rows = table(lossy, {})
    assert header[-1] == ">packets dropped" and [row[-1] for row in rows] == ["0", "0", "7", "0"]


def test_a_difference_is_taken_count_by_count() -> None:
    difference = Counts(sent=30, received=30, packets_sent=0, packets_received=0, dropped=3)
    assert counts(50, dropped=4).since(counts(20, dropped=1)) == difference


def test_a_failure_has_the_exit_code_of_a_shell() -> None:
    assert (Failure(3, 1, 7).exit_code, Failure(3, 1, -9).exit_code) == (7, 137)
    assert str(Failure(3, 1, 7)) == "rank 3 (node 1) ended with exit code 7; the other ranks were stopped"
    assert str(Failure(3, 1, -9)) == "rank 3 (node 1) was killed by SIGKILL; the other ranks were stopped"


def test_counts_of_an_earlier_run_are_not_this_runs(tmp_path: Path) -> None:
    path = tmp_path / "traffic.json"
    assert read_traffic(path, 4, since=0.0) == {}
    path.write_text(json.dumps({"in_steps": TRAFFIC, "beside": TRAFFIC}))
    os.utime(path, (100.0, 100.0))
    assert read_traffic(path, 4, since=99.0) == {"in_steps": TRAFFIC, "beside": TRAFFIC}
    assert read_traffic(path, 4, since=101.0) == {}


@pytest.mark.parametrize(
    ("text", "refusal"),
    [
        ('{"in_steps": {"0": {"nic": 1}}}', "expected {table: {rank: {nic: bytes, node: bytes}}}"),
        ('{"in_steps": {"first": {"nic": 1, "node": 2}}}', "expected {table: {rank: {nic: bytes, node: bytes}}}"),
        ('{"beside": {"0": 1}}', "expected {table: {rank: {nic: bytes, node: bytes}}}"),
        ('{"beside": {"1": {"nic": 1, "node": 2}}}', "beside has ranks [1], but 1 ran"),
        ('{"0"', "not valid JSON"),
    ],
)
def test_another_file_is_refused(tmp_path: Path, text: str, refusal: str) -> None:
    path = tmp_path / "traffic.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=f"^{re.escape(str(path))}: .*{re.escape(refusal)}"):
        read_traffic(path, 1, since=0.0)
