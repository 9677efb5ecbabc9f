"""Ranks of one attempt find each other in a store that still holds what earlier attempts wrote.

torchrun keeps one store for all its restarts, and torch writes the addresses of ranks into it under the same names each
time. A rank that reads an address before its owner has written the new one is refused. So each attempt has a name of
its own, and everything it writes stands under that name.

    every rank   writes a random word of its own
    rank 0       writes the list of all words, again and again, for some may be of an earlier attempt
    every rank   agrees to a list that has its own word
    rank 0       says that all have agreed: the list is the name of the attempt

torchrun's count of restarts is no such name: each node counts for itself.
"""

from __future__ import annotations

import time
from datetime import timedelta
from hashlib import sha256
from uuid import uuid4

import torch.distributed as dist

PAUSE = 0.05  # seconds


class AbsentError(RuntimeError):
    """Not all ranks of a run came."""


def meet(store: dist.Store, rank: int, world: int, patience: timedelta) -> str:
    """The name of this attempt, which all its ranks call for together. Raises AbsentError where some do not come."""
    own, end = uuid4().hex, time.monotonic() + patience.total_seconds()
    store.set(f"word/{rank}", own)
    agreed: list[str] = []  # the keys that ranks agree to the list by
    while time.monotonic() < end:
        if rank == 0 and store.check([f"word/{each}" for each in range(world)]):
            store.set("words", b",".join(store.multi_get([f"word/{each}" for each in range(world)])))
        if store.check(["words"]) and own in (words := store.get("words").decode()).split(","):
            name = sha256(words.encode()).hexdigest()[:16]
            agreed = [f"{name}/{each}" for each in range(world)]
            store.set(agreed[rank], "")
            if rank == 0 and store.check(agreed):
                store.set(f"{name}/all", "")
            if store.check([f"{name}/all"]):
                return name
        time.sleep(PAUSE)
    absent = [each for each in range(world) if not agreed or not store.check([agreed[each]])]
    raise AbsentError(
        f"of {world} ranks, {', '.join(map(str, absent))} did not come within {patience.total_seconds():g} s: see "
        "that all nodes were started with the same command"
    )
