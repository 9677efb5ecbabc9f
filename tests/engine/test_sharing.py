"""Who runs a short step is decided by who was faster, and nothing else depends on it."""

from collections.abc import Callable

import pytest

from dovetail.numerics.cpu import sharing
from dovetail.numerics.cpu.sharing import PROBE, Sharing


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[int]]:
    """`run(share, seconds, count, rows)`: the threads of `count` steps; a step takes seconds[threads]."""
    now = [100.0]
    monkeypatch.setattr(sharing.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(sharing.numba, "get_num_threads", lambda: 2)
    asked: list[int] = []
    monkeypatch.setattr(sharing.numba, "set_num_threads", asked.append)

    def steps(share: Sharing, seconds: dict[int, float], count: int, rows: int = 1) -> list[int]:
        used = []
        for _ in range(count):
            with share.of_step(rows):
                used.append(asked[-1])
                now[0] += seconds[asked[-1]]
            assert asked[-1] == 2  # what comes between the steps has all threads
        return used

    return steps


def test_all_threads_where_they_are_faster_and_one_where_they_are_in_each_others_way(
    run: Callable[..., list[int]],
) -> None:
    share = Sharing()
    quiet, busy = {1: 2e-4, 2: 1.5e-4}, {1: 2.2e-4, 2: 9e-3}
    assert run(share, quiet, PROBE) == [2, 1] * (PROBE // 2)
    assert run(share, quiet, 1000) == [2] * 1000
    used = run(share, busy, 5000)  # found out a quarter of a second later
    first = used.index(1)
    assert first < 1000 and used[first + PROBE :].count(2) < 0.01 * len(used)
    used = run(share, quiet, 20_000)
    assert used[-1000:].count(2) > 990


def test_looking_costs_little(run: Callable[..., list[int]]) -> None:
    """A large model's step by one thread takes twice as long: for three steps of 300."""
    share = Sharing()
    assert run(share, {1: 0.4, 2: 0.2}, 3000).count(1) <= 3000 / 100


def test_steps_of_other_sizes_are_not_compared(run: Callable[..., list[int]]) -> None:
    share = Sharing()
    run(share, {1: 1e-3, 2: 2e-3}, 2, rows=1)
    assert run(share, {1: 2e-2, 2: 1e-2}, PROBE, rows=8) == [2, 1] * (PROBE // 2)
    assert share.threads == 2


def test_an_error_in_a_step_leaves_all_threads(run: Callable[..., list[int]]) -> None:
    share = Sharing()
    run(share, {1: 1e-4, 2: 2e-4}, PROBE)
    with pytest.raises(KeyError), share.of_step(1):
        raise KeyError
    assert run(share, {1: 1e-4, 2: 2e-4}, 1) == [1]
