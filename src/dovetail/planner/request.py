"""A user's request, as `dovetail plan` takes it, and the plans that answer it.

Options that do not belong together are refused, and all that can be wrong is found before the first search. The plans
are made by `planner.training.search`, `planner.training.plan` and `planner.serving.plan`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import partial
from typing import TYPE_CHECKING, Any

from dovetail.catalog.hardware import load_cluster
from dovetail.catalog.precision import load_recipe
from dovetail.catalog.presets import find_model
from dovetail.config import apply_override, near_matches, validate
from dovetail.planner.amounts import amount, whole
from dovetail.planner.figure import Figure
from dovetail.planner.figure_keys import check_key
from dovetail.planner.serving.figures import serving_figures
from dovetail.planner.serving.fitting import why_none_fits as why_no_pool_fits
from dovetail.planner.serving.goal import ServingGoal
from dovetail.planner.serving.memory import DoesNotFitError
from dovetail.planner.serving.plan import Search, ServingPlan, Wanted, best_pools, on_network
from dovetail.planner.training.chunks import Workload
from dovetail.planner.training.figures import training_figures
from dovetail.planner.training.fitting import why_none_fits
from dovetail.planner.training.plan import TrainingGoal, TrainingPlan
from dovetail.planner.training.search import Candidate, search_all
from dovetail.planner.training.vary import Choices, vary
from dovetail.spec.hardware import Cluster
from dovetail.spec.layout import Layout, check_layout, nearest_divisor
from dovetail.spec.model import ModelSpec

if TYPE_CHECKING:
    from dovetail.network.delivery.layout_traffic import LayoutTraffic

GOALS = ("train", "serve")
NETWORKS = ("closed-forms", "simulate")
TRAIN_ONLY = ("tokens", "batch", "sequence_length", "pp", "schedule", "microbatch_size", "vary")
SERVE_ONLY = ("context", "prompt_length", "output_length", "output_speed", "prefill_ep", "decode_cluster", "change")
SEQUENCE_LENGTH = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """Options as they were typed; None and empty mean that an option was not given."""

    model: str
    clusters: Sequence[str]
    goal: str
    precision: str = "deepseek-v3"
    gpus: int | None = None
    ep: int | None = None
    tp: int | None = None
    tokens: str | None = None
    batch: str | None = None
    sequence_length: str | None = None
    pp: int | None = None
    schedule: str | None = None
    microbatch_size: int | None = None
    vary: Sequence[str] = ()
    context: str | None = None
    prompt_length: str | None = None
    output_length: str | None = None
    output_speed: str | None = None
    prefill_ep: int | None = None
    decode_cluster: str | None = None
    network: str = "closed-forms"
    fabric: str | None = None
    routing: str | None = None
    fail: Sequence[str] = ()
    change: Sequence[str] = ()  # "cache_hit=0.5": other keys of ServingGoal
    explain: str | None = None  # the figure that is asked for, if one is

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> Request:
        """Make a request of those `options` that are its own and were given."""
        names = {each.name for each in fields(cls)}
        return cls(**{name: value for name, value in options.items() if name in names and value is not None})

    @property
    def layout(self) -> dict[str, Any]:
        """The parts of a training layout that were given."""
        names = ("pp", "ep", "tp", "schedule", "microbatch_size")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """The plan on one cluster, and how it was found."""

    cluster: Cluster
    plan: TrainingPlan | ServingPlan
    tried: int = 1  # number of layouts
    fitting: int = 1  # number of layouts that fit in memory
    others: tuple[TrainingPlan, ...] = ()  # the next fastest
    front: tuple[Candidate, ...] = ()  # the Pareto front of time and memory

    def figures(self) -> tuple[Figure, ...]:
        """Return every number of the plan, which are those that `--explain` knows."""
        if isinstance(self.plan, TrainingPlan):
            return training_figures(self.plan)
        return serving_figures(self.plan)


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """A choice for each cluster, in the order in which the clusters were named."""

    request: Request
    spec: ModelSpec
    choices: tuple[Choice, ...]


def answer(request: Request) -> Answer:
    """Make the plans. Raises ValueError, one line, for unknown names, illegal numbers, options of the other goal, and
    if nothing fits."""
    _check(request)
    spec = find_model(request.model).spec
    prepare = _train if request.goal == "train" else _serve
    searches = [prepare(request, spec, load_cluster(name)) for name in request.clusters]  # all are checked first
    return Answer(request=request, spec=spec, choices=tuple(search() for search in searches))


def _check(request: Request) -> None:
    if request.goal not in GOALS:
        raise ValueError(f"--goal {request.goal}: {near_matches(request.goal, GOALS)}")
    if not request.clusters:
        raise ValueError("give a --cluster: a name of the catalog, such as h800-2048, or a .toml file")
    for name in SERVE_ONLY if request.goal == "train" else TRAIN_ONLY:
        if getattr(request, name):
            option = "set" if name == "change" else name.replace("_", "-")
            other = "serve" if request.goal == "train" else "train"
            raise ValueError(f"--{option} is for --goal {other}, and the goal is {request.goal}: leave it out")
    if request.network not in NETWORKS:
        raise ValueError(f"--network {request.network}: {near_matches(request.network, NETWORKS)}")
    for name in ("fabric", "routing", "fail"):
        if getattr(request, name) and request.network != "simulate":
            raise ValueError(f"--{name} is for --network simulate: add that, or leave --{name} out")
    if request.explain is not None:
        check_key(request.explain, request.goal)
    for name in ("gpus", "ep", "tp", "pp", "microbatch_size", "prefill_ep"):
        value = getattr(request, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} {value}: expected at least 1")


def _train(request: Request, spec: ModelSpec, cluster: Cluster) -> Callable[[], Choice]:
    """Return the search on one cluster, after checking what can be checked without it; `_serve` does likewise."""
    if request.batch is None:
        raise ValueError("--goal train takes --batch, the sequences of a step, such as --batch 15360")
    tokens = None if request.tokens is None else amount(request.tokens, "--tokens")
    goal = TrainingGoal(batch=whole(request.batch, "--batch"), tokens=tokens)
    length = whole(request.sequence_length, "--sequence-length") if request.sequence_length else SEQUENCE_LENGTH
    work = Workload(
        spec=spec,
        cluster=cluster,
        layout=Layout(),
        recipe=load_recipe(request.precision),
        sequence_length=length,
    )
    works, choices = vary(work, request.vary, Choices.of(request.layout))
    _check_gpus(request.gpus, cluster)
    traffic = _traffic(request, cluster, request.gpus or cluster.gpus)
    return partial(_best_layout, request, work, works, goal, choices, traffic)


def _best_layout(
    request: Request,
    work: Workload,
    works: list[Workload],
    goal: TrainingGoal,
    choices: Choices,
    traffic: LayoutTraffic | None,
) -> Choice:
    cluster = work.cluster
    try:
        found = search_all(works, goal, request.gpus, choices, traffic)
    except ValueError:
        if request.layout:
            _check_fixed(request.layout, work, goal.batch, request.gpus or cluster.gpus)
        raise
    if not found.plans:
        assert found.smallest is not None
        raise ValueError(why_none_fits(found.smallest, goal.batch))
    best, *others = found.plans
    return Choice(
        cluster=cluster,
        plan=best,
        tried=found.tried,
        fitting=found.fitting,
        others=tuple(others),
        front=found.front,
    )


def _check_fixed(fixed: dict[str, Any], work: Workload, batch: int, gpus: int) -> None:
    """Raise ValueError if the given values are wrong by themselves, whatever the search chooses for the others."""
    pp, tp, size = (fixed.get(name, 1) for name in ("pp", "tp", "microbatch_size"))
    if gpus % (pp * tp):
        raise ValueError(
            f"--pp {pp} x --tp {tp} does not divide {gpus} GPUs; nearest: --pp {nearest_divisor(pp, gpus // tp)}"
            if gpus % tp == 0
            else f"--tp {tp} does not divide {gpus} GPUs; nearest: --tp {nearest_divisor(tp, gpus)}"
        )
    dp = gpus // (pp * tp)
    layout = Layout(**{"dp": dp, "microbatches": max(1, batch // (dp * size)), **fixed})
    check_layout(layout, work.spec, work.cluster.gpus, batch)


def _serve(request: Request, spec: ModelSpec, cluster: Cluster) -> Callable[[], Choice]:
    table: dict[str, Any] = {}
    for name in ("context", "prompt_length", "output_length", "output_speed"):
        text = getattr(request, name)
        if text is not None:
            table[name] = amount(text, f"--{name.replace('_', '-')}")
    for change in request.change:
        apply_override(table, change)
    _check_gpus(request.gpus, cluster)
    own = _of(cluster, request.gpus)
    search = Search(
        spec=spec,
        cluster=own,
        decode_cluster=load_cluster(request.decode_cluster) if request.decode_cluster else own,
        recipe=load_recipe(request.precision),
        goal=validate(ServingGoal, table, where="--goal serve"),
        prefill=Wanted(ep=request.prefill_ep, tp=request.tp),
        decode=Wanted(ep=request.ep, tp=request.tp),
    )
    for each in (own, search.decode_cluster):
        _traffic(request, each, each.gpus)  # names of fabrics and failures, before the search
    return partial(_best_pools, request, cluster, search)


def _best_pools(request: Request, cluster: Cluster, search: Search) -> Choice:
    try:
        plan = best_pools(search)
    except DoesNotFitError as problem:
        raise ValueError(why_no_pool_fits(search, problem)) from None
    if request.network == "simulate":
        pools = [_pools_traffic(request, each.work.cluster, each.layout) for each in (plan.prefill, plan.decode)]
        plan = on_network(plan, *pools)
    return Choice(cluster=cluster, plan=plan)


def _traffic(request: Request, cluster: Cluster, gpus: int) -> LayoutTraffic | None:
    """Return the traffic of the first `gpus` if exchanges are to be simulated, else None."""
    if request.network == "closed-forms":
        return None
    from dovetail.network.delivery.layout_traffic import layout_traffic

    return layout_traffic(cluster, gpus, request.fabric, request.routing or "adaptive", request.fail)


def _pools_traffic(request: Request, cluster: Cluster, layout: Layout) -> LayoutTraffic:
    """Return the traffic of as many pools as the cluster has room for, all at once."""
    traffic = _traffic(request, cluster, cluster.gpus // layout.gpus * layout.gpus)
    assert traffic is not None
    return traffic


def _check_gpus(gpus: int | None, cluster: Cluster) -> None:
    if gpus is not None and gpus > cluster.gpus:
        more = -(-gpus // cluster.gpus_per_node)
        raise ValueError(
            f"--gpus {gpus}: {cluster.name} has {cluster.gpus}; for more of its nodes name a .toml file with three "
            f'lines: name = "mine", like = "{cluster.name}", nodes = {more}'
        )


def _of(cluster: Cluster, gpus: int | None) -> Cluster:
    """Return the cluster cut to `gpus` GPUs, which are whole nodes or a part of one node."""
    if gpus is None:
        return cluster
    if gpus < cluster.gpus_per_node:
        return cluster.model_copy(update={"nodes": 1, "gpus_per_node": gpus})
    if gpus % cluster.gpus_per_node:
        low = gpus // cluster.gpus_per_node * cluster.gpus_per_node
        raise ValueError(
            f"--gpus {gpus}: nodes of {cluster.name} have {cluster.gpus_per_node}; nearest: {low} and "
            f"{low + cluster.gpus_per_node}"
        )
    return cluster.model_copy(update={"nodes": gpus // cluster.gpus_per_node})
