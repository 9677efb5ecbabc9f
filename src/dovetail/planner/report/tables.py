"""Prints plans as tables, for a terminal and as Markdown."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby

from dovetail.cost.memory.rank import RankMemory
from dovetail.planner.figure import Figure, explanation, find_figure, number
from dovetail.planner.on_network import networks_text, simulated
from dovetail.planner.report.launch import Launch, launches
from dovetail.planner.request import Answer, Choice
from dovetail.planner.serving.plan import ServingPlan
from dovetail.planner.training.chunks import Workload
from dovetail.planner.training.plan import TrainingPlan, evaluate
from dovetail.spec.band import Band
from dovetail.spec.layout import Layout

SCALES = ((1e12, "T"), (1e9, "B"), (1e6, "M"))
SMALLER = {  # unit: (below, size, name), the smallest first
    "s": ((0.1, 1e-3, "ms"),),
    "days": ((1 / 24, 1 / 1440, "minutes"), (1.0, 1 / 24, "hours")),
}
NOTHING = 1e-9  # sums that should be 0 may be this large by rounding, in any unit
STEP = ("step_time", "forward", "input_backward", "weight_backward", "pair", "bubble", "optimizer")
RUN = ("tokens_per_day", "tflops", "tflops_causal", "mfu", "mfu_causal", "memory", "gpu_hours", "dollars", "days")
POOLS = {"prefill": "reading prompts", "decode": "writing outputs", "limit": "what exchanges alone allow"}
MEMORY = ("weights", "gradients", "master_weights", "moments", "activations", "buffers")
OTHERS = 6  # of the next fastest layouts, at most so many are listed


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """A table to print. A column whose header starts with ">" is aligned right."""

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def tables(answer: Answer) -> list[Table]:
    """Return all tables of one plan, or the figures of several side by side."""
    if len(answer.choices) > 1:
        return [comparison(answer)]
    (choice,) = answer.choices
    head = Table(title=heading(answer, choice), header=("", ""), rows=tuple(_about(choice)))
    of_plan = (
        _training_tables(choice, choice.plan) if isinstance(choice.plan, TrainingPlan) else _serving_tables(choice)
    )
    return [head, *of_plan, *network_tables(choice.plan)]


def heading(answer: Answer, choice: Choice) -> str:
    """Return what is planned, and on which cluster."""
    verb = "training" if answer.request.goal == "train" else "serving"
    return f"{verb} {answer.request.model} on {choice.cluster.name}"


def comparison(answer: Answer) -> Table:
    """Return a table with a row for each figure and a column for each cluster."""
    of = [{figure.key: figure for figure in choice.figures()} for choice in answer.choices]
    keys = [figure.key for figure in summary(answer.choices[0])]
    keys += [each.key for choice in answer.choices[1:] for each in summary(choice) if each.key not in keys]
    rows = [("layout", *(_layouts_text(choice) for choice in answer.choices))]
    about = {
        "simulated on": [networks_text(choice.plan) for choice in answer.choices],
        "efficiency borrowed from": [" and ".join(_borrowed(choice).values()) for choice in answer.choices],
    }
    rows += [(name, *texts) for name, texts in about.items() if any(texts)]
    for key in keys:
        title = next(full_title(each[key]) for each in of if key in each)
        rows.append((title, *(_cell(each[key]) if key in each else "" for each in of)))
    names = (f">{choice.cluster.name}" for choice in answer.choices)
    verb = "training" if answer.request.goal == "train" else "serving"
    return Table(title=f"{verb} {answer.request.model}", header=("", *names), rows=tuple(rows))


def full_title(figure: Figure) -> str:
    """Return the figure's title with its pool, for where no table says it."""
    pool, dot, _ = figure.key.partition(".")
    return f"{pool}: {figure.title}" if dot and pool != "limit" else figure.title


def summary(choice: Choice) -> list[Figure]:
    """Return the figures that are always printed; the others are for --explain."""
    figures = choice.figures()
    if isinstance(choice.plan, TrainingPlan):
        by_key = {figure.key: figure for figure in figures}
        return [by_key[key] for key in (*STEP, *RUN) if key in by_key]
    return [figure for figure in figures if figure.band.high > NOTHING]


def explained(answer: Answer, key: str) -> list[str]:
    """Return formula, inputs and sources of the figure `key` on every cluster. Raises ValueError if it is unknown."""
    lines: list[str] = []
    for choice in answer.choices:
        if len(answer.choices) > 1:
            lines.append(f"{choice.cluster.name}:")
        lines += explanation(find_figure(choice.figures(), key))
    return lines


def markdown(answer: Answer) -> str:
    """Return the tables and the launch as Markdown."""
    parts = []
    for table in tables(answer):
        names = [name.removeprefix(">") for name in table.header]
        ruler = ["--:" if name.startswith(">") else "---" for name in table.header]
        lines = [names, ruler, *([cell.replace("|", "\\|") for cell in row] for row in table.rows)]
        parts.append(f"## {table.title}\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines))
    for launch in answer_launches(answer):
        body = "".join(f"```{each.kind}\n{each.text.rstrip()}\n```\n\n" for each in launch.blocks)
        parts.append(f"## {launch.title}\n\n{body}" + "\n\n".join(launch.notes))
    return "\n\n".join(part.rstrip() for part in parts)


def answer_launches(answer: Answer) -> list[Launch]:
    """Return what carries out the plan, if there is one; several plans are for comparing."""
    return launches(answer.request, answer.choices[0]) if len(answer.choices) == 1 else []


def printed_launch(launch: Launch) -> Iterator[str]:
    """Yield the lines of a launch for a terminal."""
    yield f"\n{launch.title}"
    for block in launch.blocks:
        yield from (f"  {line}".rstrip() for line in block.text.splitlines())
        yield ""
    yield from launch.notes


def shown(band: Band, unit: str) -> tuple[str, str]:
    """Return value and interval; large ones are in millions and the like, short times in smaller units."""
    scale, name = next(((size, each) for most, size, each in SMALLER.get(unit, ()) if band.value < most), (1.0, unit))
    scale, letter = next(((size, f" {each}") for size, each in SCALES if band.value >= size), (scale, ""))
    if abs(band.value) < NOTHING:
        return f"0 {unit}".rstrip(), ""
    value = f"{'$' if unit == '$' else ''}{number(band.value / scale)}{letter} {'' if unit == '$' else name}".rstrip()
    if band.low == band.high:
        return value, ""
    return value, f"{number(band.low / scale)} to {number(band.high / scale)}"


def layout_text(layout: Layout) -> str:
    """Return the layout in the words of the options."""
    text = f"pp {layout.pp}, ep {layout.ep}, tp {layout.tp}, dp {layout.dp}"
    if layout.redundant_experts:
        text += f", {layout.redundant_experts} redundant experts"
    return text


def candidate_text(work: Workload) -> str:
    """Return the layout, with what was varied."""
    return ", ".join(each for each in (work.label, training_layout_text(work.layout)) if each)


def training_layout_text(layout: Layout) -> str:
    """Return the layout with its schedule and micro-batches."""
    size = f" of {layout.microbatch_size}" if layout.microbatch_size > 1 else ""
    count = f"{layout.microbatches} micro-batch{'es' if layout.microbatches > 1 else ''}"
    shared = ", ZeRO-1" if layout.shares_optimizer else ""
    return f"{layout_text(layout)}, {layout.schedule}, {count}{size}{shared}"


def _cell(figure: Figure) -> str:
    value, interval = shown(figure.band, figure.unit)
    return f"{value} ({interval})" if interval else value


def _layouts_text(choice: Choice) -> str:
    if isinstance(choice.plan, TrainingPlan):
        return f"{choice.plan.gpus:,} GPUs: {candidate_text(choice.plan.work)}"
    prefill, decode = choice.plan.prefill.layout, choice.plan.decode.layout
    return f"prefill ep {prefill.ep}, tp {prefill.tp}; decode ep {decode.ep}, tp {decode.tp}"


def _about(choice: Choice) -> Iterator[tuple[str, str]]:
    plan, cluster = choice.plan, choice.cluster
    if isinstance(plan, ServingPlan):
        for name, pool in (("prefill pool", plan.prefill), ("decode pool", plan.decode)):
            own = pool.work.cluster
            yield name, f"{layout_text(pool.layout)}: {pool.layout.gpus} of {own.gpus:,} {own.gpu.name} of {own.name}"
        needed = plan.prefill.layout.gpus + plan.decode.layout.gpus
        if plan.prefill.work.cluster == plan.decode.work.cluster and needed > cluster.gpus:
            yield "", f"the cluster has {cluster.gpus} GPUs, one pool of each kind takes {needed}"
        goal = plan.goal
        yield "requests", f"mean context {goal.mean_context:,.0f} tokens, prompts of {goal.prompt:,.0f}"
    else:
        work = plan.work
        yield "layout", f"{training_layout_text(work.layout)} on {plan.gpus:,} of {cluster.gpus:,} {cluster.gpu.name}"
        if work.label:
            yield "varied", work.label
        yield "precision", work.recipe.name
        best = f"the fastest of {choice.tried:,} layouts, of which {choice.fitting:,} fit in memory"
        yield "found", best if choice.tried > 1 else "as given"
        most, has = plan.largest_memory.band[1] + cluster.gpu.runtime_bytes, cluster.gpu.memory_bytes
        if most > has:
            yield "memory", f"fits as expected, but not at the upper end: {most / 1e9:.1f} GB of {has / 1e9:.1f}"
    if networks := networks_text(plan):
        yield "network", f"simulated on {networks}{_by_closed_forms(plan)}"
    for name, lender in _borrowed(choice).items():
        yield "efficiency", f"{name} was not measured: its shares are those of {lender}, in a wider band"


def _by_closed_forms(plan: TrainingPlan | ServingPlan) -> str:
    if not isinstance(plan, TrainingPlan):
        return ""
    alone = evaluate(replace(plan.work, traffic=None), plan.goal).step_seconds
    return f"; by closed forms the step would take {shown(alone, 's')[0]}"


def _borrowed(choice: Choice) -> dict[str, str]:
    """Return the plan's GPUs without measurements of their own, and the GPUs whose shares they have."""
    plan = choice.plan
    works = (plan.work,) if isinstance(plan, TrainingPlan) else (plan.prefill.work, plan.decode.work)
    gpus = (work.cluster.gpu for work in works)
    return {gpu.name: gpu.efficiency.borrowed_from for gpu in gpus if gpu.efficiency.borrowed_from}


def _figure_rows(figures: Sequence[Figure], whole: float | None = None) -> tuple[tuple[str, ...], ...]:
    """Return a row for each figure. With `whole`, the last column is the figure's share of it."""
    rows = []
    for figure in figures:
        share = () if whole is None else (f"{max(0.0, figure.band.value) / whole:.1%}",)
        rows.append((figure.title, *shown(figure.band, figure.unit), *share, figure.key))
    return tuple(rows)


def _training_tables(choice: Choice, plan: TrainingPlan) -> Iterator[Table]:
    by_key = {figure.key: figure for figure in summary(choice)}
    step = [by_key[key] for key in STEP]
    header = ("", ">", ">expected", ">share", "--explain")
    yield Table(title="a step", header=header, rows=_figure_rows(step, plan.step_seconds.value))
    run = [by_key[key] for key in RUN if key in by_key]
    yield Table(title="the run", header=("", ">", ">expected", "--explain"), rows=_figure_rows(run))
    yield memory_table(plan)
    if choice.others:
        yield others_table(choice, plan)


def memory_table(plan: TrainingPlan) -> Table:
    """Return the GB of every pipeline rank; neighbours that hold the same are one row."""
    gpu = plan.work.cluster.gpu
    rows: list[tuple[str, ...]] = []
    for sizes, alike in groupby(plan.memory, key=lambda rank: _sizes(rank, gpu.runtime_bytes)):
        ranks = list(alike)
        first, last = ranks[0], ranks[-1]
        name = str(first.rank) if first is last else f"{first.rank} to {last.rank}"
        flights = [" + ".join(str(count) for _, count in rank.in_flight) for rank in (first, last)]
        rows.append((name, *sizes, " .. ".join(dict.fromkeys(flights))))
    names = (f">{name.replace('_', ' ')}" for name in MEMORY)
    title = f"memory per rank, GB of {gpu.memory_bytes / 1e9:.1f}"
    if gpu.runtime_bytes:
        title += f" (total with {gpu.runtime_bytes / 1e9:g} for the runtime)"
    return Table(title=title, header=(">rank", *names, ">total", ">in flight"), rows=tuple(rows))


def _sizes(rank: RankMemory, runtime: float) -> tuple[str, ...]:
    return (
        *(f"{getattr(rank, name) / 1e9:.2f}" for name in MEMORY),
        f"{(rank.total + runtime) / 1e9:.2f}",
    )


def others_table(choice: Choice, plan: TrainingPlan) -> Table:
    """Return the finalists after the best."""
    rows = []
    for other in choice.others[:OTHERS]:
        text = candidate_text(other.work)
        slower = max(0.0, other.step_seconds.value / plan.step_seconds.value - 1)  # never -0.0 %
        memory = (other.largest_memory.total + other.work.cluster.gpu.runtime_bytes) / 1e9
        rows.append((text, shown(other.step_seconds, "s")[0], f"{slower:+.1%}", f"{memory:.1f} GB"))
    return Table(title="the next fastest", header=("", ">step", ">", ">memory"), rows=tuple(rows))


def network_tables(plan: TrainingPlan | ServingPlan) -> Iterator[Table]:
    """Yield a table of each kind of exchange alone and all at once, if exchanges were simulated."""
    rows = []
    for each in simulated(plan):
        found = each.seconds
        times = (shown(Band.exact(seconds), "s")[0] for seconds in (found.alone, found.together))
        slower = f"{found.slowdown:.3f} x"
        rows.append((each.part, each.name, f"{found.groups:,} of {found.ranks}", *times, slower, found.busiest))
    header = ("", "", ">groups", ">one alone", ">all at once", ">", "busiest links")
    if networks := networks_text(plan):
        yield Table(
            title=f"exchanges simulated on {networks} (links only, no kernels)", header=header, rows=tuple(rows)
        )


def _serving_tables(choice: Choice) -> Iterator[Table]:
    figures = summary(choice)
    header = ("", ">", ">expected", "--explain")
    for prefix, title in POOLS.items():
        own = [figure for figure in figures if figure.key.startswith(f"{prefix}.")]
        if own:
            yield Table(title=title, header=header, rows=_figure_rows(own))
    rest = [figure for figure in figures if "." not in figure.key]
    if rest:
        yield Table(title="both pools", header=header, rows=_figure_rows(rest))
