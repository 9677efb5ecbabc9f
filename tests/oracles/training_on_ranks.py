"""What ranks do in the tests of training on several ranks."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor

from dovetail.model.transformer import initialize
from dovetail.text.shards import open_store
from dovetail.train.layout import ranks
from dovetail.train.run import loop
from dovetail.train.run.evaluate import held_out
from dovetail.train.run.run_file import RunConfig, build_model
from dovetail.train.run.stop import Interrupted
from dovetail.train.step.team import Alone


def train_until(run: RunConfig, last: int = 0) -> dict[str, Tensor]:
    """Train to the end, or up to step `last`; the weights at the end."""
    step: Callable[..., Any] = loop._one_step

    def one_step(state: loop.Run, counters: loop.Counters) -> object:
        if counters.step == last - 1:
            os.kill(os.getpid(), signal.SIGINT)
        return step(state, counters)

    with patch.object(loop, "_one_step", one_step), suppress(Interrupted):
        return loop.train(run).model.state_dict()
    return {}


@contextmanager
def impatient_group(directory: Path) -> Iterator[None]:
    """A group of all ranks whose collectives give up after four seconds, in place of the one there is."""
    place = {"rank": dist.get_rank(), "world_size": dist.get_world_size()}
    dist.destroy_process_group()
    dist.init_process_group("gloo", init_method=f"file://{directory}/first", timeout=timedelta(seconds=4), **place)
    try:
        yield
    finally:
        dist.destroy_process_group()
        dist.init_process_group("gloo", init_method=f"file://{directory}/second", **place)


class Two(Alone):
    """Shares the held-out text with the other rank."""

    num_shares = 2

    @property
    def index(self) -> int:  # type: ignore[override]
        return dist.get_rank()


def wait_and_measure(run: RunConfig, store: Path, directory: Path) -> list[str]:
    """Wait for the first rank, which takes longer than a collective may; then the held-out losses, in hex."""
    with impatient_group(directory):
        with ranks.first_rank_first():
            if dist.get_rank() == 0:
                time.sleep(6)
        model = build_model(run, torch.device("cpu"))
        initialize(model, 0)
        found = [held_out(Two(model), open_store(store), run.train.sequence_length, 4, each) for each in (None, 7)]
    return [value.hex() for figures in found for value in figures]
