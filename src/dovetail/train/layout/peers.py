"""What becomes of a rank when another one is lost: one message, and an end within seconds, on all.

    a rank's exchange fails   it says so in the store that all ranks have, and the first one speaks for all
    every other rank          has a thread that looks into the store each half second: it says what its rank is doing
                              there, and ends the process if that does not end by itself
    a rank that says nothing  is the one that is lost: killed, stopped, or on a machine that is gone

The thread also sees that torchrun itself is gone, which leaves its ranks without anybody to end them.

Operations are named by the functions that a rank is in, see `OPERATIONS`: so no code has to say what it does.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from types import FrameType
from typing import NoReturn

import torch.distributed as dist

from dovetail.parallel.weights.replicas import ReplicaError

LOOK = 0.5  # seconds between two looks into the store
PAUSE = 0.1  # seconds between two looks for what is about to come
LAST = 10.0  # seconds in which a rank that ends has ended
GRACE = 2.0  # seconds in which a rank that lives has said what it is doing
AGAIN = "the same command goes on from the newest checkpoint"

# What a rank does, by the innermost function that it is in.
OPERATIONS = {
    "parallel.mesh.form_mesh": "forming of groups",
    "parallel.weights.shard.Shares.__init__": "forming of groups",
    "parallel.weights.shard.Shares.give": "sum of gradients",
    "parallel.weights.shard.Shares.finish": "sum of gradients",
    "parallel.weights.shard.Shares.norm": "norm of gradients",
    "parallel.weights.shard.Shares.gather": "gathering of weights",
    "parallel.experts.wire.Wire.out": "rows to experts",
    "parallel.experts.wire.Wire.home": "rows from experts",
    "parallel.pipeline.mail.Mail.take": "hidden states between stages",
    "parallel.pipeline.mail.Mail.finish": "hidden states between stages",
    "parallel.weights.replicas.Replicas.compare": "comparison of replicas",
    "train.step.on_ranks.Ranks.num_targets": "count of targets",
    "train.step.on_ranks.Ranks.backward": "forward and backward pass",
    "train.step.on_ranks.Ranks.add_up": "sum of losses and loads",
    "train.step.on_ranks.Ranks.told": "report of all ranks",
    "train.run.evaluate.held_out": "measurement on held-out text",
    "train.run.checkpoint.Checkpointer.save": "checkpoint",
    "train.run.checkpoint.Checkpointer.wait": "checkpoint",
    "train.run.checkpoint.load_checkpoint": "reading of a checkpoint",
    "train.layout.ranks.first_rank_first": "preparation by rank 0",
    "train.layout.ranks.any_rank": "vote on whether to stop",
}


class Peers:
    """The other ranks, as this one sees them in a store of this attempt."""

    def __init__(self, store: dist.Store, rank: int, world: int, deadline: timedelta) -> None:
        self._store, self._rank, self._world = store, rank, world
        self._deadline = deadline.total_seconds()
        self._is_over = threading.Event()
        self._parent = os.getppid()
        self._is_ending = False  # by itself
        threading.Thread(target=self._watch, daemon=True, name="peers").start()

    def close(self) -> None:
        self._is_over.set()

    @contextmanager
    def guard(self, leave: Callable[[], str]) -> Iterator[None]:
        """Where an exchange fails in the block, end this process, and have one rank say it.

        Nothing is wound up, since that may need the ranks that are lost: what is on the disk is always whole. `leave`
        is called before: it leaves the terminal in order, and returns where the run is.
        """
        try:
            yield
        except ReplicaError:
            if self._rank == 0:
                raise
            self._wait_until_said(GRACE)  # all ranks know of it, and the first one speaks
            os._exit(1)
        except Exception as error:
            self._is_ending = True
            try:
                if not is_lost(error):
                    self._tell({"own": True})
                    raise
                place = leave()
                if os.getppid() == self._parent:
                    self._speak(error, place)
                    os._exit(1)
            except dist.DistError:  # the store has gone with torchrun, which had it
                pass
            _end_as_orphan()

    def _speak(self, error: Exception, place: str) -> None:
        """Or wait until another rank has spoken."""
        frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
        self._tell({"doing": operation(reversed(frames)), "lost": True})
        is_first = self._store.add("speakers", 1) == 1
        self._store.set("fault", "")
        if is_first:
            deadline = self._deadline if is_late(error) else None
            if said := message(self._reports(), self._rank, self._world, deadline):
                _say(place + said)
            self._store.set("said", "")
        self._wait_until_said(2 * GRACE)

    def _wait_until_said(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end and not self._store.check(["said"]):
            time.sleep(PAUSE)

    def _reports(self) -> dict[int, Mapping[str, object]]:
        """What ranks have said, once all have, or after a while."""
        end, keys = time.monotonic() + GRACE, {rank: f"report/{rank}" for rank in range(self._world)}
        while time.monotonic() < end and not self._store.check(list(keys.values())):
            time.sleep(PAUSE)
        return {rank: json.loads(self._store.get(key)) for rank, key in keys.items() if self._store.check([key])}

    def _tell(self, report: Mapping[str, object], store: dist.Store | None = None) -> None:
        (store or self._store).set(f"report/{self._rank}", json.dumps(report))

    def _watch(self) -> None:
        store = self._store.clone()  # a request that waits would hold up those of the other thread
        try:
            while os.getppid() == self._parent and not store.check(["fault"]):
                if self._is_over.wait(LOOK):
                    return
            if os.getppid() != self._parent:
                _end_as_orphan()
            if self._is_ending:
                time.sleep(LAST)
                os._exit(1)
            innermost = sys._current_frames().get(threading.main_thread().ident or 0)
            self._tell({"doing": operation(outward(innermost))}, store)
            end = time.monotonic() + 2 * GRACE
            while time.monotonic() < end and not store.check(["said"]):
                time.sleep(PAUSE)
        except dist.DistError:
            _end_as_orphan()
        os._exit(1)


def is_lost(error: BaseException) -> bool:
    """Whether `error` is that of an exchange that another rank has no part in any more."""
    return any(isinstance(each, dist.DistError) or "gloo" in str(each) for each in _chain(error))


def is_late(error: BaseException) -> bool:
    """Whether the other rank may still be there."""
    return any("imed out" in str(each) or "imeout" in str(each) for each in _chain(error))


def operation(frames: Iterable[FrameType]) -> str:
    """What a thread does whose functions are these, the innermost first."""
    for frame in frames:
        name = f"{frame.f_globals.get('__name__', '')}.{frame.f_code.co_qualname}".removeprefix("dovetail.")
        if name in OPERATIONS:
            return OPERATIONS[name]
    return "work of its own"


def outward(frame: FrameType | None) -> Iterator[FrameType]:
    while frame is not None:
        yield frame
        frame = frame.f_back


def message(
    reports: Mapping[int, Mapping[str, object]], speaker: int, world: int, deadline: float | None
) -> str | None:
    """What one rank says for all; nothing where a rank has said itself why it ended.

    `deadline`, in seconds, is what ran out; None where a connection broke.
    """
    if any("own" in each for each in reports.values()):
        return None
    silent = [rank for rank in range(world) if rank not in reports]
    busy = [f"rank {rank} was at: {each['doing']}" for rank, each in reports.items() if "lost" not in each]
    if deadline is None:
        is_are = "is" if len(silent) == 1 else "are"
        said = f"{_ranks(silent)} {is_are} gone" if silent else "a connection between ranks broke"
        remedy = AGAIN
    else:
        said = f"{_ranks(silent) if silent else 'a rank'} did not answer within {deadline:g} s"
        said += f" ({', '.join(busy)})" if busy and not silent else ""
        remedy = f"look at its machine, or set a longer layout.deadline; {AGAIN}"
    return f"{reports[speaker]['doing']}: {said}; {remedy}"


def _ranks(numbers: Sequence[int]) -> str:
    return f"rank {numbers[0]}" if len(numbers) == 1 else f"ranks {', '.join(map(str, numbers))}"


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _end_as_orphan() -> NoReturn:
    if os.environ.get("LOCAL_RANK", "0") == "0":  # one of a node speaks
        _say(f"torchrun is gone, and its ranks end; {AGAIN}")
    os._exit(1)


def _say(text: str) -> None:
    sys.stderr.write(f"dovetail: {text}\n")
    sys.stderr.flush()
