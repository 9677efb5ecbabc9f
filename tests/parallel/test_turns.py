"""Who computes while an exchange is under way, and what is left where one of the two fails."""

from collections.abc import Callable

import pytest

from dovetail.parallel.turns import Turns


class Exchange:
    def __init__(self, name: str, log: list[str]) -> None:
        self.name, self.log = name, log
        log.append(f"post {name}")

    def wait(self) -> None:
        self.log.append(f"has {self.name}")


def piece(turns: Turns, name: str, exchanges: int, log: list[str], fails_after: int = -1) -> Callable[[], str]:
    def work() -> str:
        for number in range(exchanges):
            turns.await_exchange(Exchange(f"{name}{number}", log))
            if number == fails_after:
                raise ValueError(f"{name} fails")
        return name

    return work


def test_one_computes_while_the_other_exchanges() -> None:
    turns = Turns()
    for _ in range(20):
        log: list[str] = []
        assert turns.both(piece(turns, "f", 2, log), piece(turns, "b", 3, log)) == ("f", "b")
        assert log == [
            *("post f0", "post b0", "has f0", "post f1", "has b0", "post b1", "has f1"),
            *("has b1", "post b2", "has b2"),  # f has ended
        ]


def test_alone_an_exchange_is_waited_for() -> None:
    log: list[str] = []
    piece(Turns(), "f", 2, log)()
    assert log == ["post f0", "has f0", "post f1", "has f1"]


@pytest.mark.parametrize("failing", ["f", "b"])
def test_the_error_of_either_is_raised_and_the_other_is_left(failing: str) -> None:
    turns = Turns()
    log: list[str] = []
    pieces = [piece(turns, name, 5, log, fails_after=1 if name == failing else -1) for name in "fb"]
    with pytest.raises(ValueError, match=f"{failing} fails"):
        turns.both(*pieces)
    assert f"has {'b' if failing == 'f' else 'f'}3" not in log
    assert turns.both(piece(turns, "f", 1, log), piece(turns, "b", 1, log)) == ("f", "b")
