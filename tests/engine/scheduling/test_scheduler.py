"""The scheduler on invented tasks: who goes when, in which pages, and that everything ends."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dovetail.engine.scheduling.blocks import BlockPool
from dovetail.engine.scheduling.scheduler import Part, Scheduler, Task, Work


def task_of(length: int, **named: object) -> Task:
    tokens = list(range(length))
    return Task(tokens=tokens, prompt_tokens=length, **named)  # type: ignore[arg-type]


def decoding(scheduler: Scheduler, *tasks: Task) -> None:
    """Prompts computed, and one token drawn."""
    for task in tasks:
        scheduler.add(task)
    while any(task.computed < task.prompt_tokens for task in tasks):
        for part in scheduler.schedule(0, 10**6).parts:
            scheduler.commit(part)
    for task in tasks:
        task.tokens.append(0)


def spans(work: Work) -> list[tuple[Task, int, int]]:
    return [(part.task, part.start, part.count) for part in work.parts]


# ---- One thing at a time ----


def test_prompts_first_come_first_served_within_slots_and_budget() -> None:
    scheduler = Scheduler(BlockPool(100, 4), slots=2)
    one, two, three = task_of(3), task_of(4), task_of(5)
    for task in (one, two, three):
        scheduler.add(task)
    work = scheduler.schedule(0, 100)
    assert spans(work) == [(one, 0, 3), (two, 0, 4)] and not work.decode
    assert scheduler.waiting == [three]


def test_a_prompt_leaves_half_of_a_step_to_those_behind_it() -> None:
    scheduler = Scheduler(BlockPool(100, 4), slots=3)
    long, short = task_of(50), task_of(6)
    scheduler.add(long)
    assert spans(scheduler.schedule(0, 20)) == [(long, 0, 20)], "nobody else is there"
    scheduler.add(short)
    assert spans(scheduler.schedule(0, 20)) == [(long, 0, 10), (short, 0, 6)]  # the first part was not committed


def test_a_smaller_priority_goes_first() -> None:
    scheduler = Scheduler(BlockPool(100, 4), slots=1)
    late, soon = task_of(3, priority=1), task_of(3)
    for task in (late, soon):
        scheduler.add(task)
    assert spans(scheduler.schedule(0, 9)) == [(soon, 0, 3)]


def test_whole_prompts_where_they_are_not_cut() -> None:
    scheduler = Scheduler(BlockPool(100, 4), slots=3, cuts=False)
    tasks = [task_of(50), task_of(50)]
    for task in tasks:
        scheduler.add(task)
    assert spans(scheduler.schedule(0, 20)) == [(tasks[0], 0, 50)]
    assert scheduler.queried == 50 and scheduler.hit == 0


def test_the_head_of_the_queue_is_not_overtaken_where_pages_lack() -> None:
    scheduler = Scheduler(BlockPool(4, 4), slots=4)
    first = task_of(7)
    decoding(scheduler, first)
    large, small = task_of(8, shares=False), task_of(1)
    for task in (large, small):
        scheduler.add(task)
    assert not scheduler.schedule(0, 100).parts
    scheduler.remove(first)
    assert [task for task, _, _ in spans(scheduler.schedule(0, 100))] == [large, small]


def test_who_came_last_is_set_back_and_computes_everything_again() -> None:
    scheduler = Scheduler(BlockPool(4, 4), slots=4)
    first, last = task_of(7, shares=False), task_of(6, shares=False)
    decoding(scheduler, first, last)
    slot = last.slot
    for token in range(2):
        first.computed += 1
        first.tokens.append(token)
    work = scheduler.schedule(0, 100)  # position 8 of the first needs a third page
    assert work.set_back == [slot] and work.decode == [first] and not work.parts
    assert (last.is_running, last.computed, last.pages) == (False, 0, []) and scheduler.set_backs == 1
    last.tokens += [1, 2]
    scheduler.remove(first)
    [part] = scheduler.schedule(0, 100).parts
    assert (part.start, part.count) == (0, 6), "its prompt"
    scheduler.commit(part)
    [part] = scheduler.schedule(0, 100).parts
    assert (part.start, part.count) == (6, 2), "what it had generated, but for the last token"
    scheduler.commit(part)
    work = scheduler.schedule(0, 100)
    assert work.decode == [last] and not work.parts


def test_one_that_has_no_room_to_grow_is_set_back_itself() -> None:
    scheduler = Scheduler(BlockPool(4, 4), slots=4)
    first, last = task_of(6, shares=False), task_of(7, shares=False)
    decoding(scheduler, first, last)
    last.computed += 1
    last.tokens.append(0)
    work = scheduler.schedule(0, 0)
    assert work.set_back == [1] and work.decode == [first]


@pytest.mark.parametrize(("depth", "cached"), [(0, 12), (1, 8), (4, 8), (5, 4), (9, 0)])
def test_a_prompt_begins_behind_known_pages(depth: int, cached: int) -> None:
    """With drafts as many positions less as modules look ahead, in whole pages."""
    scheduler = Scheduler(BlockPool(100, 4), slots=4, depth=depth)
    first, second = task_of(14), task_of(15)
    decoding(scheduler, first)
    scheduler.add(second)
    assert spans(scheduler.schedule(0, 100)) == [(second, cached, 15 - cached)]
    assert second.cached == cached == scheduler.hit and scheduler.queried == 29
    assert second.pages[: cached // 4] == first.pages[: cached // 4]
    assert not set(second.pages[cached // 4 :]) & set(first.pages)


def test_the_last_token_of_a_prompt_is_always_computed() -> None:
    scheduler = Scheduler(BlockPool(100, 4), slots=4)
    decoding(scheduler, task_of(12))
    scheduler.add(again := task_of(12))
    assert spans(scheduler.schedule(0, 100)) == [(again, 8, 4)]


def test_pages_are_known_part_by_part_and_after_their_task_is_gone() -> None:
    scheduler = Scheduler(BlockPool(100, 4), slots=4)
    first, second, third, last = task_of(20), task_of(20), task_of(20), task_of(20)
    scheduler.add(first)
    [part] = scheduler.schedule(0, 9).parts
    scheduler.add(second)
    assert spans(scheduler.schedule(0, 100))[1] == (second, 0, 20), "nothing is committed yet"
    scheduler.commit(part)
    scheduler.add(third)
    assert spans(scheduler.schedule(0, 100))[-1] == (third, 8, 12)
    for task in (first, second, third):
        scheduler.remove(task)
    scheduler.add(last)
    assert spans(scheduler.schedule(0, 100)) == [(last, 8, 12)]


def test_generated_tokens_are_not_shared() -> None:
    """Their entries come from other kernels than a prompt's."""
    scheduler = Scheduler(BlockPool(100, 4), slots=4)
    first = task_of(4)
    decoding(scheduler, first)
    while len(first.tokens) < 13:
        first.tokens.append(len(first.tokens))
        scheduler.schedule(0, 0)
        first.computed += 1
    second = Task(tokens=list(first.tokens), prompt_tokens=13)
    scheduler.add(second)
    assert spans(scheduler.schedule(0, 100)) == [(second, 4, 9)]


def test_one_that_does_not_share_computes_all_but_is_shared() -> None:
    scheduler = Scheduler(BlockPool(100, 4), slots=4)
    decoding(scheduler, task_of(9))
    scheduler.add(alone := task_of(9, shares=False))
    assert spans(scheduler.schedule(0, 100)) == [(alone, 0, 9)]


def test_followers_wait_for_their_leaders_pages() -> None:
    scheduler = Scheduler(BlockPool(100, 4), slots=4)
    leader, other = task_of(10), task_of(3)
    followers = [task_of(10, leader=leader) for _ in range(2)]
    for task in (leader, *followers, other):
        scheduler.add(task)
    work = scheduler.schedule(0, 8)
    assert [part.task for part in work.parts] == [leader, other], "others may pass them"
    for part in work.parts:
        scheduler.commit(part)
    other.tokens.append(0)
    for part in scheduler.schedule(0, 100).parts:
        scheduler.commit(part)
    leader.tokens.append(0)
    work = scheduler.schedule(0, 100)
    assert work.decode == [leader, other]
    assert spans(work) == [(follower, 8, 2) for follower in followers]


def test_followers_of_a_leader_that_is_gone_go_themselves() -> None:
    scheduler = Scheduler(BlockPool(100, 4), slots=4)
    leader = task_of(10)
    follower = task_of(10, leader=leader)
    for task in (leader, follower):
        scheduler.add(task)
    scheduler.remove(leader)
    assert spans(scheduler.schedule(0, 100)) == [(follower, 0, 10)]


# ---- Everything together ----


@dataclass
class Request:
    task: Task
    arrives: int  # in this step
    max_tokens: int
    cancelled: int | None  # in this step
    admitted: int | None = None


@dataclass
class Simulation:
    """Runs a scheduler as `engine.core` does; entries are strings of tokens, so that wrong pages are seen."""

    scheduler: Scheduler
    requests: list[Request]
    rng: random.Random
    depth: int
    entries: dict[int, tuple[int, ...]] = field(default_factory=dict)  # by place: all tokens up to it
    step: int = 0

    def run(self) -> None:
        left = list(self.requests)
        while left:
            assert self.step < 20_000, "it does not end"
            for request in left:
                if request.arrives == self.step:
                    self.scheduler.add(request.task)
                if request.cancelled == self.step and request.arrives <= self.step:
                    self.scheduler.remove(request.task)
            left = [request for request in left if not request.task.has_ended]
            self.once([request for request in left if request.arrives <= self.step])
            left = [request for request in left if not request.task.has_ended]
            self.step += 1

    def once(self, present: list[Request]) -> None:
        depth, budget = self.rng.choice((0, self.depth)), self.rng.choice((1, 5, 16, 100))
        was_running = list(self.scheduler.running)
        work = self.scheduler.schedule(depth, budget)
        self.check(work, budget, depth)
        if present:
            assert work, "whoever is there makes progress"
        self.check_order(present, was_running)
        for task in work.decode:
            self.decode(task, depth)
        for part in work.parts:
            self.compute(part)
        for request in present:
            if request.task.prompt_tokens + request.max_tokens <= len(request.task.tokens):
                self.scheduler.remove(request.task)

    def check(self, work: Work, budget: int, depth: int) -> None:
        pool, running = self.scheduler.pool, self.scheduler.running
        assert len({task.slot for task in running}) == len(running)
        assert all(task.slot not in work.set_back or task in running for task in running)
        if self.scheduler.cuts:
            assert sum(part.count for part in work.parts) <= budget
        assert all(part.count > 0 and part.start == part.task.computed for part in work.parts)
        assert len({id(part.task) for part in work.parts}) == len(work.parts)
        assert not {id(part.task) for part in work.parts} & {id(task) for task in work.decode}
        for task in work.decode:
            assert len(task.pages) * pool.page_size >= len(task.tokens) + depth
        for part in work.parts:
            assert len(part.task.pages) * pool.page_size >= part.start + part.count
        held: dict[int, int] = {}
        for task in running:
            assert len(set(task.pages)) == len(task.pages)
            for page in task.pages:
                held[page] = held.get(page, 0) + 1
        assert pool.num_free == pool.num_pages - len(held)

    def check_order(self, present: list[Request], was_running: list[Task]) -> None:
        """Nobody of the same priority begins before one who came earlier, unless that one waits for its leader."""
        for request in present:
            task = request.task
            if not task.is_running or task in was_running:
                continue
            request.admitted = self.step if request.admitted is None else request.admitted
            for other in self.scheduler.waiting:
                is_held = other.leader is not None and not other.leader.has_ended
                assert other.order > task.order or is_held

    def place(self, task: Task, position: int) -> int:
        size = self.scheduler.pool.page_size
        return task.pages[position // size] * size + position % size

    def write(self, task: Task, position: int, tokens: list[int]) -> None:
        self.entries[self.place(task, position)] = tuple(tokens[: position + 1])

    def read(self, task: Task, end: int) -> None:
        """All entries before `end` are those of the task's own tokens."""
        for position in range(end):
            assert self.entries[self.place(task, position)] == tuple(task.tokens[: position + 1])

    def decode(self, task: Task, depth: int) -> None:
        drafts = [self.rng.randrange(3) + 10 for _ in range(depth)]
        for position in range(len(task.tokens) - 1, len(task.tokens) + depth):
            self.write(task, position, task.tokens + drafts)
        kept = self.rng.randrange(depth + 1)
        task.computed += kept + 1
        task.tokens += [*drafts[:kept], self.rng.randrange(3)]
        self.read(task, task.computed)

    def compute(self, part: Part) -> None:
        task = part.task
        self.read(task, part.start)
        for position in range(part.start, part.start + part.count):
            self.write(task, position, task.tokens)
        self.scheduler.commit(part)
        if task.computed == task.prompt_tokens == len(task.tokens):
            task.tokens.append(self.rng.randrange(3))


def random_requests(rng: random.Random, count: int, longest: int) -> list[Request]:
    requests: list[Request] = []
    prefix = [rng.randrange(3) for _ in range(longest)]
    for _ in range(count):
        length = rng.randint(1, longest)
        leader = None
        if requests and rng.random() < 0.3:  # a further sample of the prompt before
            before = requests[-1]
            leader = before.task.leader or before.task
            tokens, arrives, priority = list(leader.tokens), before.arrives, leader.priority
        else:
            shared = rng.randint(0, length)
            tokens = prefix[:shared] + [rng.randrange(3) for _ in range(length - shared)]
            arrives, priority = rng.randrange(30), rng.choice((0, 0, 0, 1))
        requests.append(
            Request(
                task=Task(
                    tokens=tokens,
                    prompt_tokens=len(tokens),
                    priority=priority,
                    leader=leader,
                    shares=rng.random() < 0.9,
                ),
                arrives=arrives,
                max_tokens=rng.randint(1, longest),
                cancelled=arrives + rng.randrange(20) if rng.random() < 0.2 else None,
            )
        )
    return requests


@settings(max_examples=150, deadline=None)
@given(
    rng=st.randoms(use_true_random=False),
    size=st.integers(1, 9),
    slots=st.integers(1, 5),
    depth=st.integers(0, 3),
    spare=st.integers(0, 8),
    cuts=st.booleans(),
)
def test_everything_ends_in_order_and_in_its_own_pages(
    rng: random.Random, size: int, slots: int, depth: int, spare: int, cuts: bool
) -> None:
    """Pools from the smallest that holds the longest task alone."""
    requests = random_requests(rng, 12, 24)
    pool = BlockPool(-(-(48 + depth) // size) + spare, size)
    scheduler = Scheduler(pool, slots, depth, cuts)
    assert pool.num_pages >= max(
        scheduler.pool.pages_for(request.task.prompt_tokens + request.max_tokens + scheduler.depth)
        for request in requests
    )
    Simulation(scheduler, requests, rng, depth).run()
    assert pool.num_free == pool.num_pages and not scheduler.running and not scheduler.waiting
    for request in requests:
        generated = len(request.task.tokens) - request.task.prompt_tokens
        assert request.cancelled is not None or request.max_tokens <= generated <= request.max_tokens + depth


def test_tiny_pools_set_back_and_large_ones_do_not() -> None:
    """What the test above rests on."""
    set_backs, hits = [], []
    for spare in (0, 1000):
        rng = random.Random(1)
        scheduler = Scheduler(BlockPool(51 + spare, 1), 5, 3)
        Simulation(scheduler, random_requests(rng, 40, 24), rng, 3).run()
        set_backs.append(scheduler.set_backs)
        hits.append(scheduler.hit)
    assert set_backs[0] > 10 and set_backs[1] == 0
    assert all(hits)


def test_a_page_given_to_two_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(BlockPool, "share", lambda self, pages: None)
    rng = random.Random(1)
    with pytest.raises(AssertionError):
        Simulation(Scheduler(BlockPool(60, 2), 5), random_requests(rng, 40, 24), rng, 0).run()
