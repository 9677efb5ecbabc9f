"""Times steps, to say how much of a prompt fits beside decoding, and whether drafts pay.

Both answers change when something is computed and never what comes out of it, so that timing may decide.
"""

from __future__ import annotations

from dataclasses import dataclass, field

NEWEST = 0.1  # weight of the newest measurement in an average
STALL = 1.0  # a prompt that waits alone makes a step at most so many steps longer, and each further one two more
LEAST_PART = 32  # tokens
PROBE_EVERY = 200  # decoding steps after which the way not taken is tried again,
PROBE_STEPS = 4  # for so many


@dataclass(slots=True)
class Average:
    value: float = 0.0
    count: int = 0

    def add(self, value: float) -> None:
        self.count += 1
        self.value += (value - self.value) * max(NEWEST, 1 / self.count)


@dataclass(slots=True)
class Pace:
    """Averages of seconds, by the number of sequences (rounded up to a power of two) and of drafts."""

    steps: dict[tuple[int, int], Average] = field(default_factory=dict)
    accepted: list[Average] = field(default_factory=list)  # share of steps whose draft k was kept
    prompt_token: Average = field(default_factory=Average)
    since_probe: int = 0

    def add_step(self, sequences: int, depth: int, seconds: float) -> None:
        self.steps.setdefault((_rounded(sequences), depth), Average()).add(seconds)

    def add_part(self, sequences: int, depth: int, tokens: int, seconds: float) -> None:
        """A pass of so many decoding sequences and tokens of prompts."""
        step = self.steps.get((_rounded(sequences), depth)) if sequences else None
        if tokens >= LEAST_PART and (step is not None or not sequences):
            self.prompt_token.add(max(seconds - (step.value if step else 0.0), 0.0) / tokens)

    def add_drafts(self, depth: int, kept: int) -> None:
        self.accepted += [Average() for _ in range(depth - len(self.accepted))]
        for k in range(depth):
            self.accepted[k].add(float(kept > k))

    def part(self, sequences: int, depth: int, waiting: int, most: int) -> int:
        """Tokens of prompts for a pass beside so many decoding sequences, while so many prompts are unfinished.

        A burst has longer parts, so that its prompts begin to decode, and share steps, soon.
        """
        step = self.steps.get((_rounded(sequences), depth))
        if not sequences or not self.prompt_token.value or step is None:
            return most
        seconds = STALL * step.value * max(2 * waiting - 1, 1)
        return min(max(int(seconds / self.prompt_token.value), LEAST_PART), most)

    def depth(self, sequences: int, most: int) -> int:
        """0 drafts or `most`, whichever gives more tokens a second; the other is tried now and then."""
        known = [self.steps.get((_rounded(sequences), depth), Average()) for depth in (0, most)]
        for depth, average in zip((most, 0), reversed(known), strict=True):
            if average.count < PROBE_STEPS:
                return depth
        better = most if self.gain(sequences, most) > 1 else 0
        self.since_probe += 1
        if self.since_probe >= PROBE_EVERY:
            if self.since_probe >= PROBE_EVERY + PROBE_STEPS:
                self.since_probe = 0
            return most - better
        return better

    def gain(self, sequences: int, depth: int) -> float:
        """Tokens a second with drafts over those without; 1 where it is not known yet."""
        plain, drafting = (self.steps.get((_rounded(sequences), each)) for each in (0, depth))
        if plain is None or drafting is None or not drafting.value:
            return 1.0
        return self.tokens(depth) * plain.value / drafting.value

    def tokens(self, depth: int) -> float:
        """What a step with so many drafts gives a sequence."""
        return 1 + sum(each.value for each in self.accepted[:depth])

    def explain(self, depth: int) -> str:
        """A line for a person: where drafts pay, and where not."""
        if not depth:
            return "no drafts: none were asked for, or the model has no MTP modules"
        parts = []
        for sequences in sorted({key[0] for key in list(self.steps)}):  # another thread may add one
            plain, drafting = (self.steps.get((sequences, each)) for each in (0, depth))
            if plain is not None and drafting is not None:
                word = "pay" if self.gain(sequences, depth) > 1 else "do not pay"
                parts.append(
                    f"up to {sequences} sequences drafts {word}: a step takes {drafting.value * 1e3:.1f} ms with and "
                    f"{plain.value * 1e3:.1f} ms without, and gives {self.tokens(depth):.2f} tokens"
                )
        return "; ".join(parts) or "not measured yet"


def _rounded(sequences: int) -> int:
    return 1 << max(sequences - 1, 0).bit_length()
