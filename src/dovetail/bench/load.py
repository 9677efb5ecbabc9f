"""Sends the requests at their times, or as earlier ones end, and collects what became of them."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator, Sequence
from time import perf_counter

from dovetail.bench.outcome import Outcome
from dovetail.bench.workload import Request

Send = Callable[[Request, float], Awaitable[Outcome]]  # a request, and the moment from which times are counted
Heard = Callable[[Outcome], None]


async def closed_loop(requests: Sequence[Request], concurrency: int, send: Send, heard: Heard) -> None:
    """Keep `concurrency` requests under way until all are done."""
    start = perf_counter()
    left: Iterator[Request] = iter(requests)

    async def user() -> None:
        for request in left:
            heard(await send(request, start))

    async with asyncio.TaskGroup() as users:
        for _ in range(min(concurrency, len(requests))):
            users.create_task(user())


async def open_loop(requests: Sequence[Request], send: Send, heard: Heard) -> None:
    """Send each request when it is due, however many are under way."""
    start = perf_counter()

    async def arrive(request: Request) -> None:
        assert request.arrival is not None
        await asyncio.sleep(request.arrival - (perf_counter() - start))
        heard(await send(request, start))

    async with asyncio.TaskGroup() as users:
        for request in requests:
            users.create_task(arrive(request))
