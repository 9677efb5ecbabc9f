"""Lists the catalog by kind: the name of each entry, its main figures, and where they come from."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from dovetail.catalog.fabrics import fabric_names, load_fabric
from dovetail.catalog.hardware import cluster_names, gpu_names, load_cluster, load_gpu
from dovetail.catalog.precision import load_recipe, recipe_names
from dovetail.catalog.presets import load_model, model_names, model_source
from dovetail.config import near_matches
from dovetail.cost.count import parameters
from dovetail.spec.precision import Quantization, Recipe
from dovetail.train.step.schedule import Schedule, load_schedule, schedule_names

PIPELINES = {  # of `parallel.schedules.pipelines.SCHEDULES`: what a rank does, and who says so
    "1f1b": ("one forward and one backward in turn", "[PipeDream-Flush, Megatron]"),
    "interleaved": ("the same with several stages per rank, a smaller bubble for more sends", "[arXiv 2104.04473]"),
    "zb1p": ("backwards split in two, gradients of weights put off into the bubble", "[arXiv 2401.10241]"),
    "dualpipe": ("from both ends, a forward overlapped with a backward; weights held twice", "[V3 §3.2.1]"),
    "dualpipev": ("DualPipe cut in half and folded: two stages per rank, weights held once", "[DualPipe repository]"),
}
TILES = {"row": "1x128", "column": "128x1", "block": "128x128", "tensor": "with one scale"}

Entry = dict[str, Any]  # plain data: a name, figures in base units, a source


@dataclass(frozen=True, slots=True, kw_only=True)
class Column:
    """A header that opens with ">" is aligned right; `text` turns the value of `key` into what is printed."""

    header: str
    key: str
    text: Callable[[Any], str] = str


@dataclass(frozen=True, slots=True, kw_only=True)
class Listing:
    """The entries of one kind, and how they are printed."""

    kind: str
    title: str
    columns: tuple[Column, ...]
    entries: tuple[Entry, ...]

    @property
    def header(self) -> tuple[str, ...]:
        return tuple(column.header for column in self.columns)

    @property
    def rows(self) -> list[tuple[str, ...]]:
        return [tuple(column.text(entry[column.key]) for column in self.columns) for entry in self.entries]


def listings(kind: str | None = None) -> list[Listing]:
    """Return the entries of `kind`, or of every kind. Raises ValueError with near matches for an unknown kind."""
    if kind is not None and kind not in KINDS:
        raise ValueError(f"the catalog has no {kind!r}; {near_matches(kind, KINDS)}")
    return [_listing(name) for name in ([kind] if kind else KINDS)]


def as_json(found: Sequence[Listing]) -> dict[str, list[Entry]]:
    return {listing.kind: list(listing.entries) for listing in found}


def _listing(kind: str) -> Listing:
    title, entries, columns = KINDS[kind]
    name, source = Column(header="", key="name"), Column(header="source", key="source")
    return Listing(kind=kind, title=f"{kind}: {title}", columns=(name, *columns, source), entries=tuple(entries()))


def _models() -> Iterator[Entry]:
    for name in model_names():
        spec = load_model(name)
        counted = parameters(spec)
        yield {
            "name": name,
            "parameters": counted.total,
            "active": counted.active,
            "layers": spec.num_hidden_layers,
            "experts": spec.moe.n_routed_experts if spec.moe else 0,
            "context": spec.max_position_embeddings,
            "source": model_source(name),
        }


def _clusters() -> Iterator[Entry]:
    for name in cluster_names():
        cluster = load_cluster(name)
        figures = {"gpus": cluster.gpus, "gpu": cluster.gpu.name, "gpus_per_node": cluster.gpus_per_node}
        yield {"name": name, **figures, "fabric": cluster.fabric, "source": cluster.source}


def _gpus() -> Iterator[Entry]:
    for name in gpu_names():
        gpu = load_gpu(name)
        yield {
            "name": name,
            "memory": gpu.memory_bytes,
            "bandwidth": gpu.bandwidth,
            "bf16": gpu.peak("bf16"),
            "fp8": gpu.peak("fp8") if gpu.runs_as("fp8") == "fp8" else None,
            "borrowed_from": gpu.efficiency.borrowed_from,
            "source": gpu.source,
        }


def _fabrics() -> Iterator[Entry]:
    for name in fabric_names():
        spec = load_fabric(name)
        figures = {"family": spec.kind, "endpoints": spec.endpoints, "planes": spec.planes, "radix": spec.radix}
        yield {"name": name, **figures, "source": spec.source}


def _recipes() -> Iterator[Entry]:
    for name, recipe in ((name, load_recipe(name)) for name in recipe_names()):
        yield {"name": name, "quantised": quantised(recipe), "source": recipe.source}


def quantised(recipe: Recipe) -> str:
    """Say in a few words what `recipe` rounds; where layers differ, what most of them do."""
    parts = []
    for operand, title in (("input", "inputs"), ("weight", "weights"), ("grad", "gradients")):
        found = Counter[Quantization](getattr(site, operand) for site in recipe.sites.values())
        for most, _ in found.most_common(1):
            parts.append(f"{title} {most.format.upper()} {TILES[most.tile]}")
    if recipe.sites and all(site.input.power_of_two and site.weight.power_of_two for site in recipe.sites.values()):
        parts.append("scales powers of two")
    if any(site.accumulator == "hopper" for site in recipe.sites.values()):
        promotion = next(site.promotion for site in recipe.sites.values())
        parts.append("sums of Hopper's Tensor Core, " + (f"promoted every {promotion}" if promotion else "unpromoted"))
    if recipe.expert_output:
        parts.append(f"outputs of experts sent as {recipe.expert_output.upper()}")
    if recipe.moments == "float32":
        parts.append("moments kept in FP32")
    return ", ".join(parts) or "nothing"


def _schedules() -> Iterator[Entry]:
    for name in schedule_names():
        schedule = load_schedule(name)
        yield {
            "name": name,
            "learning_rate": _peak(schedule.learning_rate),
            "batch_size": int(_peak(schedule.batch_size)),
            "total_tokens": schedule.total_tokens,
            "source": schedule.source,
        }


def _peak(schedule: Schedule) -> float:
    return max(schedule.start, *(segment.value for segment in schedule.segments))


def _pipelines() -> Iterator[Entry]:
    for name, (about, source) in PIPELINES.items():
        yield {"name": name, "about": about, "source": source}


def _short(number: float) -> str:
    """Return a count as text, such as 671.0B."""
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M")):
        if number >= size:
            return f"{number / size:.1f}{letter}"
    return f"{number:,.0f}"


def _grouped(number: float) -> str:
    return f"{number:,.0f}"


def _giga(number: float) -> str:
    return f"{number / 1e9:,.0f}"


def _tera(number: float | None) -> str:
    return "-" if number is None else f"{number / 1e12:,.0f}"


KINDS: dict[str, tuple[str, Callable[[], Iterator[Entry]], tuple[Column, ...]]] = {  # title, entries, figures
    "models": (
        "for inspect, plan, network simulate, and model.preset of a run file",
        _models,
        (
            Column(header=">parameters", key="parameters", text=_short),
            Column(header=">active", key="active", text=_short),
            Column(header=">layers", key="layers"),
            Column(header=">experts", key="experts", text=lambda number: str(number or "-")),
            Column(header=">context", key="context", text=_grouped),
        ),
    ),
    "clusters": (
        "for plan --cluster",
        _clusters,
        (
            Column(header=">GPUs", key="gpus", text=_grouped),
            Column(header="GPU", key="gpu"),
            Column(header=">per node", key="gpus_per_node"),
            Column(header="fabric", key="fabric", text=lambda name: name or "-"),
        ),
    ),
    "gpus": (
        "for the gpu of a cluster file",
        _gpus,
        (
            Column(header=">GB", key="memory", text=_giga),
            Column(header=">GB/s", key="bandwidth", text=_giga),
            Column(header=">TFLOPS BF16", key="bf16", text=_tera),
            Column(header=">FP8", key="fp8", text=_tera),
            Column(
                header="operations",
                key="borrowed_from",
                text=lambda name: f"as {name}'s, wider" if name else "measured",
            ),
        ),
    ),
    "fabrics": (
        "for network show, network simulate, and the fabric of a cluster",
        _fabrics,
        (
            Column(header="family", key="family"),
            Column(header=">endpoints", key="endpoints", text=_grouped),
            Column(header=">planes", key="planes"),
            Column(header=">radix", key="radix"),
        ),
    ),
    "recipes": (
        "for train.precision, compare and plan --precision",
        _recipes,
        (Column(header="quantised", key="quantised"),),
    ),
    "schedules": (
        "of training, for the schedule of a run file",
        _schedules,
        (
            Column(header=">peak rate", key="learning_rate", text=lambda rate: f"{rate:g}"),
            Column(header=">sequences", key="batch_size", text=_grouped),
            Column(header=">tokens", key="total_tokens", text=lambda tokens: _short(tokens) if tokens else "any"),
        ),
    ),
    "pipelines": (
        "schedules of pipelines, for plan --schedule",
        _pipelines,
        (Column(header="what a rank does", key="about"),),
    ),
}
