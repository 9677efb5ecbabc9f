"""The mean number of distinct nodes or ranks that hold the experts of one token.

The scores of experts are taken to be independent and alike. The best K of E experts are then a uniform choice. With a
limit on groups (those with the largest best score are kept, as in V2) the choice is a walk down the ranking:

    each next expert is in a group with a chance proportional to the experts that are left in the group, until
    kept_groups distinct groups have been chosen from; from then on it is in one of those, until K are chosen.

So the mean number of distinct groups is E[min(kept_groups, D)], where D is the number in a choice without limit. The
counts per group have few states, the partitions of K, so the walk is summed exactly. Without a limit the result is
bins (1 - C(E - E / bins, K) / C(E, K)): 5.29 of 8 nodes for 8 of 256 experts. V3 ranks groups by the sum of their two
best scores, for which the result depends on the distribution of scores; simulated with its gate, the means are within
1 % of these.
"""

from __future__ import annotations

from functools import lru_cache

from dovetail.cost.ops.ops import Exchange

Partition = tuple[int, ...]  # number of experts chosen in each group with any, the largest first


def distinct_bins(exchange: Exchange, bins: float) -> float:
    """Return the mean number of distinct bins that hold the experts of one token.

    The experts are split evenly over `bins` nodes or ranks in order of their numbers. If experts or groups do not
    divide evenly, bins hold fractions of them.
    """
    if bins <= 1:
        return 1.0
    groups, experts = exchange.groups, exchange.experts
    walk = _walk(exchange.choices, experts, groups, exchange.kept_groups)
    if bins < groups:  # a bin holds whole groups, and the chosen groups are a uniform choice
        per_bin = groups / bins
        return sum(chance * bins * (1 - _miss(groups, per_bin, len(counts))) for counts, chance in walk.items())
    size, bins_per_group = experts / groups, bins / groups
    return sum(
        chance * sum(bins_per_group * (1 - _miss(size, size / bins_per_group, count)) for count in counts)
        for counts, chance in walk.items()
    )


@lru_cache(maxsize=256)
def _walk(choices: int, experts: int, groups: int, kept: int) -> dict[Partition, float]:
    """Return the chance of each partition of the K choices over groups."""
    size = experts // groups
    states: dict[Partition, float] = {(): 1.0}
    for chosen in range(choices):
        following: dict[Partition, float] = {}
        for counts, chance in states.items():
            is_full = len(counts) == kept
            left = (kept * size if is_full else experts) - chosen
            if not is_full:
                new = chance * (groups - len(counts)) * size / left
                _add(following, (*counts, 1), new)
            for index, count in enumerate(counts):
                grown = (*counts[:index], count + 1, *counts[index + 1 :])
                _add(following, grown, chance * (size - count) / left)
        states = following
    return states


def _add(states: dict[Partition, float], counts: Partition, chance: float) -> None:
    if chance > 0:
        ordered = tuple(sorted(counts, reverse=True))
        states[ordered] = states.get(ordered, 0.0) + chance


def _miss(items: float, marked: float, drawn: int) -> float:
    """Return the chance C(items - marked, drawn) / C(items, drawn) that none of `drawn` items is a `marked` one."""
    chance = 1.0
    for index in range(drawn):
        chance *= max(items - marked - index, 0.0) / (items - index)
    return chance
