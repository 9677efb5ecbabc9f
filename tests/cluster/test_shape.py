"""What a user gives of a cluster is read as it stands, or refused with the remedy."""

from __future__ import annotations

import pytest

from dovetail.cluster.shape import Shape, parse_latency, parse_rate


def test_rates_are_bits_per_second_and_kept_as_bytes() -> None:
    assert [parse_rate(text) for text in ("200Mbit", "1Gbit", "1.5 gbit", "800kbit")] == [25e6, 125e6, 187.5e6, 1e5]
    assert [parse_latency(text) for text in ("0ms", "0.2ms", "50us", "1s")] == pytest.approx([0.0, 2e-4, 5e-5, 1.0])


@pytest.mark.parametrize("text", ["", "200", "200MB", "fast", "-1Mbit", "0Mbit", "50kbit", "1000Gbit", "1.2.3Mbit"])
def test_other_rates_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"--nic '.*': (expected a rate in bits per second|give 100kbit to 100Gbit)"):
        parse_rate(text)


@pytest.mark.parametrize("text", ["", "1", "1min", "2s", "-1ms"])
def test_other_latencies_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"--latency '.*': (expected a time, such as|give at most 1s)"):
        parse_latency(text)


def test_numbers_of_nodes_and_ranks_have_limits() -> None:
    for nodes, ranks, refusal in ((0, 1, "--nodes 0: give 1 to 64"), (2, 65, "--ranks 65: give 1 to 64")):
        with pytest.raises(ValueError, match=refusal):
            Shape(nodes=nodes, ranks=ranks, nic=1e6)


def test_ranks_share_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "9")
    assert [Shape(nodes=2, ranks=ranks, nic=1e6).threads for ranks in (1, 2, 8)] == [4, 2, 1]
