"""Explains why no serving plan fits in memory, and names remedies that were planned and do fit.

Each remedy changes the user's request in one way: other layouts, less work at once, narrower weights, more GPUs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from dovetail.catalog.precision import load_recipe
from dovetail.planner.serving.decode import decode_pool
from dovetail.planner.serving.memory import DoesNotFitError
from dovetail.planner.serving.plan import FREE, Search, best_pools, pool_layouts

CODED = "deepseek-v3"  # the recipe whose weights are in FP8
HALVINGS = 10  # tokens and lengths down to a thousandth are tried
LENGTHS = ("context", "prompt_length", "output_length")


def why_none_fits(search: Search, problem: DoesNotFitError) -> str:
    """Return one line: what the layout that needs the least holds, and which changes of the request were found to fit.

    If none was, it says how much memory a GPU would need, whatever their number.
    """
    free = replace(search, prefill=FREE, decode=FREE)
    larger = _more_gpus(free, problem.pool)
    kinds = [_free(search, free), _less(search, problem), _narrower(search), larger]
    found = [text for kind in kinds for text in _first_that_fits(kind)]
    first = f"no layout that was tried fits: {problem}"
    if found:
        return f"{first}; what was tried and fits: {' or '.join(found)}"
    return f"{first}; {_needed(larger[-1][1] if larger else free)}"


def _first_that_fits(kind: Sequence[tuple[str, Search]]) -> Iterator[str]:
    """Yield the first remedy of a kind that has a plan, with its layouts."""
    for text, changed in kind:
        try:
            plan = best_pools(changed)
        except ValueError:
            continue
        pools = (("prefill", plan.prefill.layout), ("decode", plan.decode.layout))
        yield f"{text} ({', '.join(f'{name} ep = {each.ep}, tp = {each.tp}' for name, each in pools)})"
        return


def _free(search: Search, free: Search) -> list[tuple[str, Search]]:
    return [] if free == search else [("other --ep, --prefill-ep and --tp", free)]


def _less(search: Search, problem: DoesNotFitError) -> list[tuple[str, Search]]:
    """Return less work at once: half as much each time, and of given requests as many as fit."""
    goal = search.goal
    parts = [2**halving for halving in range(1, HALVINGS + 1)]
    changes: list[dict[str, Any]] = []
    if problem.pool == "prefill":
        changes = [{"prefill_tokens": goal.prefill_tokens // part} for part in parts]
    elif goal.requests_per_gpu is not None and (most := _most_requests(search)):
        changes = [{"requests_per_gpu": most}]
    elif problem.holding.largest == "cache":
        lengths = {name: length for name in LENGTHS if (length := getattr(goal, name)) is not None}
        changes = [{name: length // part for name, length in lengths.items()} for part in parts]
    return [
        (
            " ".join(_option(name, value) for name, value in change.items()),
            replace(search, goal=goal.model_copy(update=change)),
        )
        for change in changes
        if min(change.values()) >= 1
    ]


def _most_requests(search: Search) -> int:
    spec, cluster = search.spec, search.decode_cluster
    layouts = pool_layouts(spec, cluster, search.decode)
    return max(decode_pool(spec, cluster, each, search.recipe, search.goal).most_that_fit() for each in layouts)


def _option(name: str, value: float) -> str:
    return f"--{name.replace('_', '-')} {value:.0f}" if name in LENGTHS else f"--set {name}={value:.0f}"


def _narrower(search: Search) -> list[tuple[str, Search]]:
    if search.recipe.sites:
        return []
    return [(f"--precision {CODED}, with weights in FP8", replace(search, recipe=load_recipe(CODED)))]


def _more_gpus(search: Search, pool: str) -> list[tuple[str, Search]]:
    """Return the search on more nodes of the same kind for `pool`, or for both if they are on the same cluster."""
    is_same = search.cluster == search.decode_cluster
    cluster = search.cluster if pool == "prefill" else search.decode_cluster
    moe, found = search.spec.moe, []
    if moe is None or cluster.scale_out is None:  # a group of ranks that share a layer is within a node
        return []
    most = cluster.model_copy(update={"nodes": moe.n_routed_experts})  # an expert on each GPU is the least it can hold
    for gpus in sorted({layout.gpus for layout in pool_layouts(search.spec, most)}):
        if gpus > cluster.gpus:
            larger = cluster.model_copy(update={"nodes": gpus // cluster.gpus_per_node})
            own = larger if is_same or pool == "prefill" else search.cluster
            other = larger if is_same or pool == "decode" else search.decode_cluster
            found.append((f"{gpus} GPUs", replace(search, cluster=own, decode_cluster=other)))
    return found


def _needed(search: Search) -> str:
    """Return what `search`, on as many GPUs as there are experts, would need."""
    try:
        best_pools(search)
    except DoesNotFitError as problem:
        needed = problem.holding
        gpus = search.cluster.gpus if problem.pool == "prefill" else search.decode_cluster.gpus
        return f"on {gpus} GPUs each would need {needed.total / 1e9:.1f} GB, most of it {needed.largest}"
    except ValueError as problem:
        return str(problem)
    raise AssertionError("a remedy that was found to fit")
