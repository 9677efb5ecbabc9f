"""What the quickstart asks of a run."""

from __future__ import annotations

from pathlib import Path

from dovetail.catalog.presets import load_model
from dovetail.cost.count import forward_flop_per_token, training_flop_per_token
from dovetail.quickstart import PRESET, run_config


def test_the_curve_takes_a_small_share_of_the_time() -> None:
    """By FLOP: a point is a forward pass over its windows, of which whole batches are measured."""
    train, spec = run_config(Path("out"), 5.0).train, load_model(PRESET)
    assert train.evaluate_every is not None
    length, windows = train.sequence_length, train.evaluate_windows + train.microbatch_size
    forward = forward_flop_per_token(spec, length)
    step = training_flop_per_token(spec, length, mtp=True) * train.microbatch_size * length
    assert windows * length * forward < 0.03 * train.evaluate_every * step
