import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dovetail.train.run.checkpoint import Checkpointer, load_checkpoint
from dovetail.train.step.ema import Ema


def make_weights() -> dict[str, Tensor]:
    torch.manual_seed(0)
    # Large and odd enough that torch splits the work over its threads.
    return {
        "large": torch.randn(70_001),
        "matrix": torch.randn(33, 65),
        "one": torch.randn(()),
        "none": torch.zeros(0),
    }


def change(weights: dict[str, Tensor], step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    for weight in weights.values():
        weight.add_(torch.randn(weight.shape, generator=generator), alpha=0.1)


def train(ema: Ema, weights: dict[str, Tensor], steps: range) -> None:
    for step in steps:
        ema.finish_reading()
        change(weights, step)
        ema.update()


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def test_average_is_the_formula() -> None:
    weights = make_weights()
    ema = Ema(weights, decay=0.6)
    expected = {name: weight.double() for name, weight in weights.items()}
    for step in range(20):  # the ramp reaches 0.6 at update 12.5
        ema.finish_reading()
        change(weights, step)
        ema.update()
        decay = min(0.6, (1 + step) / (10 + step))
        expected = {name: decay * each + (1 - decay) * weights[name].double() for name, each in expected.items()}
    ema.finish()
    assert int(ema.num_updates) == 20
    for name, average in ema.average.items():
        torch.testing.assert_close(average.double(), expected[name], rtol=1e-5, atol=1e-6)
        assert average.data_ptr() != weights[name].data_ptr() or average.numel() == 0
    ema.close()


def test_same_bits_with_and_without_the_thread() -> None:
    averages = []
    for in_background in (False, True):
        weights = make_weights()
        ema = Ema(weights, decay=0.9, in_background=in_background)
        train(ema, weights, range(20))
        ema.close()
        averages.append(ema.average)
    assert same(averages[0], averages[1])
    assert not same(averages[0], make_weights())


def held_back(ema: Ema) -> threading.Event:
    """Let the thread start its arithmetic only when the returned event is set."""
    release, blend = threading.Event(), ema._blend

    def late(towards: float) -> None:
        release.wait(10)
        blend(towards)

    ema._blend = late  # type: ignore[method-assign]
    return release


def test_update_does_not_wait_but_finish_reading_does() -> None:
    weights = make_weights()
    ema = Ema(weights, decay=0.9)
    before = {name: average.clone() for name, average in ema.average.items()}
    release = held_back(ema)
    change(weights, 1)
    expected = make_weights()
    reference = Ema(expected, decay=0.9, in_background=False)
    change(expected, 1)
    reference.update()
    ema.update()
    assert same(ema.average, before)
    threading.Timer(0.05, release.set).start()
    ema.finish_reading()
    change(weights, 2)
    assert same(ema.average, reference.average)
    ema.close()


def test_changing_weights_too_early_is_seen() -> None:
    """The wrong variant: without `finish_reading` the average takes weights of the next step."""
    weights = make_weights()
    ema = Ema(weights, decay=0.9)
    release = held_back(ema)
    change(weights, 1)
    right = Ema(weights, decay=0.9, in_background=False)
    ema.update()
    change(weights, 2)
    release.set()
    ema.close()
    right.update()
    assert not same(ema.average, right.average)


def test_resumed_is_uninterrupted(tmp_path: Path) -> None:
    weights = make_weights()
    whole = Ema(weights, decay=0.9)
    train(whole, weights, range(9))
    whole.close()

    weights = make_weights()
    first = Ema(weights, decay=0.9)
    train(first, weights, range(4))
    checkpointer = Checkpointer(tmp_path)
    path = checkpointer.save(4, {"weights": weights, "ema": first.state()}).wait()
    checkpointer.close()
    first.close()

    weights = {name: torch.full_like(weight, 7.0) for name, weight in weights.items()}
    second = Ema(weights, decay=0.9)
    load_checkpoint(path, {"weights": weights, "ema": second.state()})
    train(second, weights, range(4, 9))
    second.close()
    assert same(second.average, whole.average)
    assert int(second.num_updates) == 9


def test_an_error_in_the_thread_is_raised() -> None:
    ema = Ema(make_weights(), decay=0.9)

    def fail(towards: float) -> None:
        raise RuntimeError("no memory")

    ema._blend = fail  # type: ignore[method-assign]
    ema.update()
    with pytest.raises(RuntimeError, match="no memory"):
        ema.finish_reading()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Ema(make_weights(), decay=1.0), "decay = 1.0"),
        (
            lambda: Ema({"gate": torch.zeros(2).bfloat16()}, decay=0.9),
            "gate is torch.bfloat16: average the FP32",
        ),
    ],
)
def test_mistakes_are_named(make: Callable[[], Ema], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
