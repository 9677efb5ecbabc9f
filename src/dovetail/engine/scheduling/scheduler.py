"""Chooses, step by step, which tokens of which sequences are computed, and gives them pages.

One rule covers all: a sequence has to compute the tokens that it has, less those that it has computed. For a new one
that is its prompt, for one that generates it is the last token (and drafts after it), and for one that was set back it
is everything again.

    schedule(depth, budget) -> Work      decode: those with one token left, `depth` drafts for each
                                         chunks: parts of prompts, `budget` tokens in all
                                         placed: those that got pages
                                         set_back: slots whose pages were taken for others

Who came first goes first, within a priority. A prompt leaves half of a step's budget to those behind it. Where pages
run out, whoever came last is set back: its pages go, and it waits until there is room to compute it again.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from dovetail.engine.scheduling.blocks import BlockPool, page_keys


@dataclass(slots=True, kw_only=True, eq=False)
class Task:
    """What the scheduler knows of a sequence."""

    tokens: list[int]  # prompt and what was generated; grows
    prompt_tokens: int
    priority: int = 0  # smaller goes first
    leader: Task | None = None  # one with the same prompt, whose pages are waited for
    shares: bool = True  # its prompt may begin behind known pages
    arrival: int = -1
    computed: int = 0  # positions whose cache entries are final
    cached: int = 0  # of the prompt, found in the pages of others when it was last admitted
    pages: list[int] = field(default_factory=list)
    slot: int = -1
    keys: list[bytes] = field(default_factory=list)  # of the prompt's whole pages
    published: int = 0
    has_ended: bool = False

    @property
    def is_running(self) -> bool:
        return self.slot >= 0

    @property
    def left(self) -> int:
        """Tokens to compute; 1 where the next one can be drawn in a decoding step."""
        return len(self.tokens) - self.computed

    @property
    def is_decoding(self) -> bool:
        return self.left == 1 and self.computed >= self.prompt_tokens

    @property
    def order(self) -> tuple[int, int]:
        return self.priority, self.arrival


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """Tokens start .. start + count - 1 of a task."""

    task: Task
    start: int
    count: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    decode: list[Task]
    parts: list[Part]
    placed: list[Task]
    set_back: list[int]

    def __bool__(self) -> bool:
        return bool(self.decode or self.parts)


class Scheduler:
    """`slots` tasks at a time. `cuts`: prompts may be computed in parts, and begin behind pages that are known."""

    def __init__(self, pool: BlockPool, slots: int, depth: int = 0, cuts: bool = True) -> None:
        """`depth`: most drafts of a step, which also says how far MTP modules look ahead of a page's end."""
        self.pool, self.depth, self.cuts = pool, depth, cuts
        self.running: list[Task] = []
        self.waiting: list[Task] = []
        self._slots = list(range(slots - 1, -1, -1))
        self._arrivals = 0
        self._placed: list[Task] = []  # in the step being scheduled
        self.queried = self.hit = self.set_backs = 0  # tokens looked for in known pages, tokens found; times

    def add(self, task: Task) -> None:
        task.arrival = self._arrivals
        self._arrivals += 1
        self._wait(task)

    def remove(self, task: Task) -> None:
        """It has ended, or is not wanted any more; its pages are free."""
        task.has_ended = True
        if task.is_running:
            self._stop(task)
        elif task in self.waiting:
            self.waiting.remove(task)

    def schedule(self, depth: int, budget: int) -> Work:
        """`depth` drafts per decoding task; at most `budget` tokens of prompts."""
        set_back: list[int] = []
        self._placed = []
        for task in sorted(self.running, key=lambda task: task.order):
            if task.is_running and task.is_decoding:
                self._grow(task, len(task.tokens) + depth, set_back)
        parts = self._parts(budget)
        decode = [task for task in self.running if task.is_decoding]
        placed = [task for task in self._placed if task.is_running]
        return Work(decode=decode, parts=parts, placed=placed, set_back=set_back)

    def commit(self, part: Part) -> None:
        """The part was computed: whole pages of the prompt may be shared from now on."""
        task = part.task
        task.computed = part.start + part.count
        whole = min(task.computed, task.prompt_tokens) // self.pool.page_size
        while self.cuts and task.published < min(whole, len(task.keys)):
            self.pool.publish(task.pages[task.published], task.keys[task.published])
            task.published += 1

    def _grow(self, task: Task, positions: int, set_back: list[int]) -> None:
        """Pages for so many positions; others are set back for them, or the task itself."""
        missing = self.pool.pages_for(positions) - len(task.pages)
        while missing > 0 and not self.pool.can_allocate(missing):
            last = max(self.running, key=lambda task: task.order)
            set_back.append(last.slot)
            self._set_back(last)
            if last is task:
                return
        if missing > 0:
            task.pages += self.pool.allocate(missing)
            self._placed.append(task)

    def _parts(self, budget: int) -> list[Part]:
        parts: list[Part] = []
        unfinished = [task for task in self.running if not task.is_decoding]
        for task in sorted(unfinished, key=lambda task: task.order):
            if budget > 0:
                budget -= self._add_part(task, budget, parts)
        while budget > 0 and self.waiting and self._slots:
            first = next((task for task in self.waiting if not _waits_for_leader(task)), None)
            if first is None or not self._admit(first):
                break
            budget -= self._add_part(first, budget, parts)
        return parts

    def _add_part(self, task: Task, budget: int, parts: list[Part]) -> int:
        """Takes tokens of the budget; how many."""
        has_others = len(self.waiting) > 0 or any(not other.is_decoding for other in self.running if other is not task)
        if task.computed < task.prompt_tokens:
            left = task.prompt_tokens - task.computed
        else:
            left = task.left - 1  # what it had generated; the last token is for a decoding step
        count = min(left, max(budget // 2, 1) if has_others and left > budget else budget)
        if not self.cuts and task.computed < task.prompt_tokens:
            count = left
        parts.append(Part(task=task, start=task.computed, count=count))
        return count

    def _admit(self, task: Task) -> bool:
        """Give a waiting task a slot and pages for all its tokens, if there are any left."""
        if not task.keys and self.cuts:
            task.keys = page_keys(task.tokens, self.pool.page_size, task.prompt_tokens // self.pool.page_size)
        known = self.pool.find(task.keys[: self._most_known(task)]) if self.cuts and task.shares else []
        missing = self.pool.pages_for(len(task.tokens) + self.depth + 1) - len(known)
        if missing > self.pool.num_free_without(known):
            return False
        self.waiting.remove(task)
        self.pool.share(known)
        task.pages = known + self.pool.allocate(missing)
        task.published = len(known)
        task.computed = task.cached = len(known) * self.pool.page_size
        task.slot = self._slots.pop()
        self.running.append(task)
        self._placed.append(task)
        self.queried += task.prompt_tokens
        self.hit += task.cached
        return True

    def _most_known(self, task: Task) -> int:
        """Whole pages of the prompt, but not its last token, which the next one is drawn from. Entries of MTP modules
        depend on a few tokens after their own, so that with drafts the last page that is known is not taken."""
        size = self.pool.page_size
        known = len(self.pool.find(task.keys[: (task.prompt_tokens - 1) // size]))
        return max(known - -(-self.depth // size), 0)

    def _set_back(self, task: Task) -> None:
        self._stop(task)
        self.set_backs += 1
        self._wait(task)

    def _stop(self, task: Task) -> None:
        self.running.remove(task)
        self.pool.release(task.pages)
        self._slots.append(task.slot)
        task.pages, task.slot, task.computed, task.published = [], -1, 0, 0

    def _wait(self, task: Task) -> None:
        self.waiting.append(task)
        self.waiting.sort(key=lambda task: task.order)


def _waits_for_leader(task: Task) -> bool:
    leader = task.leader
    return leader is not None and not leader.has_ended and leader.computed < leader.prompt_tokens
