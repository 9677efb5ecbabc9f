"""Writes a plan as one self-contained HTML page, and a step's trace.

The page needs no script, no font and no network, and is light or dark as the reader's system is. Every figure opens to
its formula, inputs and sources.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from html import escape
from pathlib import Path

from dovetail.atomic import check_new_file, write_bytes
from dovetail.planner.figure import Figure, number
from dovetail.planner.report import drawing
from dovetail.planner.report.drawing import GRID, IDLE, INK, MUTED, draw_svg
from dovetail.planner.report.pictures import Bar, Point, bars, memory_bars, pool_memory, scatter
from dovetail.planner.report.tables import (
    NOTHING,
    Table,
    answer_launches,
    candidate_text,
    comparison,
    full_title,
    heading,
    layout_text,
    memory_table,
    network_tables,
    others_table,
    shown,
    summary,
    tables,
)
from dovetail.planner.request import Answer, Choice, Request
from dovetail.planner.serving.decode import DecodePlan, decode_pool, step_of
from dovetail.planner.serving.plan import ServingPlan
from dovetail.planner.serving.prefill import PrefillPlan
from dovetail.planner.training.plan import TrainingPlan

PARTS = ("forward", "input_backward", "weight_backward", "pair", "bubble", "optimizer")
TILES = {
    "train": ("step_time", "tokens_per_day", "mfu_causal", "memory", "days", "dollars"),
    "serve": ("prefill.ttft", "decode.tpot", "decode.speed", "decode.tokens", "dollars_input", "dollars_output"),
}
REQUESTS = (
    1 / 32,
    1 / 16,
    1 / 8,
    1 / 4,
    3 / 8,
    1 / 2,
    5 / 8,
    3 / 4,
    7 / 8,
    1,
)  # points of the curve, as shares of the requests that fit

PAGE_STYLE = """
:root { color-scheme: light dark; --paper: #fbfbfa; --card: #ffffff; --ink: #1f2328; --muted: #667080; --grid: #e3e6ea;
  --accent: #1f6feb; --bad: #c0392b; --c0: #4878d0; --c1: #ee854a; --c2: #6acc64; --c3: #d65f5f; --c4: #956cb4;
  --c5: #8c613c; --c6: #a5adb8; --c7: #d5bb67; --c8: #82c6e2; }
@media (prefers-color-scheme: dark) { :root { --paper: #14171b; --card: #1c2127; --ink: #e6e8eb; --muted: #98a2b0;
  --grid: #323942; --accent: #6ea8ff; --bad: #ff8577; --c0: #6c9ae8; --c1: #f0a06c; --c2: #7fd379; --c3: #e57f7f;
  --c4: #b18fd0; --c5: #b58a63; --c6: #77818e; --c7: #dcc67d; --c8: #8fd0ea; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 15px/1.5 system-ui, "Segoe UI", Helvetica, Arial,
  sans-serif; }
main { max-width: 1060px; margin: 0 auto; padding: 28px 24px 60px; }
h1 { font-size: 25px; margin: 0 0 4px; font-weight: 650; }
h2 { font-size: 17px; margin: 0 0 12px; font-weight: 650; }
.about { color: var(--muted); margin: 0 0 20px; }
section { background: var(--card); border: 1px solid var(--grid); border-radius: 10px; padding: 18px 20px;
  margin: 0 0 18px; overflow-x: auto; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 12px; margin: 0 0 18px; }
.tile { background: var(--card); border: 1px solid var(--grid); border-radius: 10px; padding: 12px 14px; }
.tile span, .tile small { display: block; color: var(--muted); font-size: 12.5px; }
.tile { display: flex; flex-direction: column; justify-content: space-between; }
.tile b { font-size: 21px; font-weight: 650; line-height: 1.3; }
.tile i { font-size: 13px; font-weight: 500; font-style: normal; }
svg { display: block; width: 100%; height: auto; }
svg.picture text { font-size: 13px; fill: var(--ink); }
svg.picture text.muted { fill: var(--muted); } svg.picture text.strong { font-weight: 650; }
svg.picture text.over { fill: var(--bad); font-weight: 650; }
.whisker { stroke: var(--ink); stroke-width: 1.3; fill: none; opacity: 0.75; }
.grid { stroke: var(--grid); fill: none; } .line { stroke: var(--accent); stroke-width: 1.5; fill: none; opacity: .6; }
.dot { fill: var(--accent); } .plan { fill: var(--c1); stroke: var(--card); stroke-width: 2; }
.limit { stroke: var(--bad); stroke-width: 1.5; stroke-dasharray: 5 4; fill: none; }
.timeline { padding: 8px; } .timeline svg { min-width: 900px; fill: var(--ink); }
table { border-collapse: collapse; width: 100%; font-size: 14px; }
td, th { padding: 4px 12px 4px 0; text-align: left; border-bottom: 1px solid var(--grid); vertical-align: top; }
th { color: var(--muted); font-weight: 500; } .right { text-align: right; font-variant-numeric: tabular-nums; }
details { border-bottom: 1px solid var(--grid); padding: 5px 0; }
summary { cursor: pointer; display: grid; grid-template-columns: 12px 1fr 150px 210px; gap: 10px;
  align-items: baseline; }
summary::-webkit-details-marker { display: none; }
summary::before { content: "+"; color: var(--accent); } details[open] > summary::before { content: "-"; }
summary b { text-align: right; font-weight: 600; font-variant-numeric: tabular-nums; }
summary i { color: var(--muted); font-style: normal; font-size: 13px; }
.why { padding: 6px 0 8px 16px; font-size: 13px; } .why p { margin: 0 0 6px; }
.why td:first-child { white-space: nowrap; } .why td { font-size: 12.5px; } .why td:last-child { color: var(--muted); }
pre { background: var(--paper); border: 1px solid var(--grid); border-radius: 6px; padding: 10px 12px; overflow-x: auto;
  font-size: 13px; }
.note { color: var(--muted); font-size: 13.5px; margin: 6px 0 0; }
"""
# Everything in `drawing`'s picture except the cells and their numbers takes the page's colours.
DRAWING_STYLE = (
    "".join(
        f'.timeline [{attribute}="{colour}"] {{ {attribute}: var(--{name}); }}\n'
        for attribute, colour, name in (
            ("fill", "#ffffff", "card"),
            ("stroke", "#ffffff", "card"),
            ("fill", IDLE, "grid"),
            ("fill", MUTED, "muted"),
            ("stroke", GRID, "grid"),
        )
    )
    + f".timeline g {{ fill: {INK}; }}\n"
)


def check(request: Request, page: Path | None, trace: Path | None) -> None:
    """Raise ValueError, before there is a plan, for files that could not be written once there is one."""
    if trace is not None:
        drawing.check_timeline(request, "--trace")
    for option, path in (("--html", page), ("--trace", trace)):
        if path is None:
            continue
        if not path.absolute().parent.is_dir():
            raise ValueError(f"{option} {path}: there is no folder {path.parent}")
        try:
            check_new_file(path)
        except ValueError as error:
            raise ValueError(f"{option} {error}") from None


def write(answer: Answer, path: Path) -> None:
    """Write the page to `path`. Raises ValueError if no file can be written there."""
    _write(page(answer), path, "--html")


def write_trace(answer: Answer, path: Path) -> None:
    """Write the step's timeline, for chrome://tracing. Raises ValueError as `check` and `write` do."""
    check(answer.request, None, path)
    _write(drawing.chrome_trace(drawing.planned_timeline(answer)), path, "--trace")


def _write(text: str, path: Path, option: str) -> None:
    try:
        write_bytes(path, text.encode())
    except OSError as problem:
        raise ValueError(f"{option} {path}: {(problem.strerror or str(problem)).lower()}") from None


def page(answer: Answer) -> str:
    """Return the whole page."""
    choices = answer.choices
    title = heading(answer, choices[0]) if len(choices) == 1 else comparison(answer).title
    body = "".join(_one(answer) if len(choices) == 1 else _several(answer))
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{escape(title)}</title>\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<style>{PAGE_STYLE}{DRAWING_STYLE}</style>\n</head>\n"
        f"<body>\n<main>\n<h1>{escape(title)}</h1>\n{body}</main>\n</body>\n</html>\n"
    )


def _one(answer: Answer) -> Iterator[str]:
    (choice,) = answer.choices
    about = tables(answer)[0]
    yield f'<p class="about">{"<br>".join(escape(f"{name}: {text}") for name, text in about.rows)}</p>\n'
    yield from _pictures(answer, choice)
    others = [others_table(choice, choice.plan)] if isinstance(choice.plan, TrainingPlan) and choice.others else []
    yield from (_section(table.title, _table(table)) for table in (*others, *network_tables(choice.plan)))
    yield _section("every figure, and why", "".join(map(_figure, choice.figures())))
    for launch in answer_launches(answer):
        blocks = "".join(f"<pre>{escape(block.text.rstrip())}</pre>" for block in launch.blocks)
        yield _section(launch.title, blocks + "".join(f'<p class="note">{escape(note)}</p>' for note in launch.notes))


def _several(answer: Answer) -> Iterator[str]:
    yield _section("side by side", _table(comparison(answer)))
    for choice in answer.choices:
        yield f"<h1>{escape(choice.cluster.name)}</h1>\n"
        yield from _pictures(answer, choice)


def _pictures(answer: Answer, choice: Choice) -> Iterator[str]:
    by_key = {figure.key: figure for figure in summary(choice)}
    keys = TILES["train" if isinstance(choice.plan, TrainingPlan) else "serve"]
    yield f'<div class="tiles">{"".join(_tile(by_key[key]) for key in keys if key in by_key)}</div>\n'
    if isinstance(choice.plan, TrainingPlan):
        yield from _training(choice, choice.plan)
    else:
        yield from _serving(choice.plan)


def _training(choice: Choice, plan: TrainingPlan) -> Iterator[str]:
    by_key = {figure.key: figure for figure in choice.figures()}
    parts = [Bar(by_key[key].title, by_key[key].band, shown(by_key[key].band, "s")[0]) for key in PARTS]
    yield _section("where the time of a step goes", bars(parts))
    gpu = plan.work.cluster.gpu
    details = f'<details><summary>in numbers</summary><div class="why">{_table(memory_table(plan))}</div></details>'
    yield _section("memory per rank", memory_bars(plan.memory, gpu.memory_bytes, gpu.runtime_bytes) + details)
    if plan.work.layout.pp > 1:
        yield f'<section class="timeline">{draw_svg(plan.timeline)}</section>\n'
    if len(choice.front) > 1:
        dots = [
            Point(each.seconds, (each.memory + gpu.runtime_bytes) / 1e9, candidate_text(each.work))
            for each in choice.front
            if each.work != replace(plan.work, traffic=None)
        ]
        needed = (plan.largest_memory.total + gpu.runtime_bytes) / 1e9
        dots.append(Point(plan.step_seconds.value, needed, candidate_text(plan.work), is_plan=True))
        note = "Layouts that no other beats in both time and memory. Point at one to read it."
        if plan.work.traffic:
            note += " The plan is simulated, the others by closed forms."
        picture = scatter(dots, "seconds per step", "GB on the fullest rank")
        yield _section("time against memory", f'{picture}<p class="note">{note}</p>')


def _serving(plan: ServingPlan) -> Iterator[str]:
    pools: tuple[tuple[str, PrefillPlan | DecodePlan], ...] = (("prompts", plan.prefill), ("outputs", plan.decode))
    for name, pool in pools:
        uses = {use: band for use, band in pool.seconds_by_use.items() if band.high > NOTHING}
        parts = [Bar(use, band, shown(band, "s")[0]) for use, band in uses.items()]
        yield _section(f"where a step of {name} goes: {layout_text(pool.layout)}", bars(parts))
    prefill, decode = plan.prefill, plan.decode
    used = {
        "prefill": {"weights": prefill.memory.weights, "activations": prefill.activation_bytes},
        "decode": {"weights": decode.memory.weights, "latents": decode.cache_bytes, "buffers": decode.memory.buffers},
    }
    sizes = [
        (name, {use: float(size) for use, size in uses.items()} | {"runtime": pool.work.cluster.gpu.runtime_bytes})
        for (name, uses), (_, pool) in zip(used.items(), pools, strict=True)
    ]
    yield _section("memory per GPU", pool_memory(sizes, decode.work.cluster.gpu.memory_bytes))
    dots = [_point(other) for other in _curve(decode)] + [_point(decode, is_plan=True)]
    note = f'<p class="note">{escape(layout_text(decode.layout))}; from few requests at once to as many as fit.</p>'
    picture = scatter(dots, "tokens/s of one user", "output tokens/s per GPU")
    yield _section("speed against throughput", picture + note)


def _curve(plan: DecodePlan) -> Iterator[DecodePlan]:
    """Yield the same pool with other numbers of requests."""
    work = plan.work
    pool = replace(decode_pool(work.spec, work.cluster, plan.layout, work.recipe, plan.goal), traffic=work.traffic)
    for requests in sorted({max(1, int(share * plan.requests_that_fit)) for share in REQUESTS}):
        try:
            yield step_of(pool, requests)
        except ValueError:  # buffers grow with requests, so the last may not fit
            continue


def _point(plan: DecodePlan, is_plan: bool = False) -> Point:
    label = f"{plan.requests} requests: {number(plan.tokens_per_second.value)} tokens/s per GPU"
    return Point(plan.speed.value, plan.tokens_per_second.value, label, is_plan)


def _tile(figure: Figure) -> str:
    value, interval = shown(figure.band, figure.unit)
    size, *units = value.split()
    unit = " ".join(each for each in units if each not in figure.title.split())
    value = f"{escape(size)} <i>{escape(unit)}</i>"
    return f'<div class="tile"><span>{escape(figure.title)}</span><b>{value}</b><small>{escape(interval)}</small></div>'


def _figure(figure: Figure) -> str:
    value, interval = shown(figure.band, figure.unit)
    rows = "".join(
        f"<tr><td>{escape(each.name)}</td><td>{escape(each.value)}</td><td>{escape(each.source)}</td></tr>"
        for each in figure.inputs
    )
    table = f"<table>{rows}</table>" if rows else ""
    return (
        f"<details><summary><span>{escape(full_title(figure))}</span><b>{escape(value)}</b><i>{escape(interval)}</i>"
        f'</summary><div class="why"><p>= {escape(figure.formula)}</p>{table}</div></details>\n'
    )


def _section(title: str, body: str) -> str:
    return f"<section>\n<h2>{escape(title)}</h2>\n{body}\n</section>\n"


def _table(table: Table) -> str:
    def row(cells: Iterable[str], tag: str) -> str:
        styles = [' class="right"' if name.startswith(">") else "" for name in table.header]
        return "".join(f"<{tag}{style}>{escape(cell)}</{tag}>" for cell, style in zip(cells, styles, strict=True)).join(
            ("<tr>", "</tr>")
        )

    head = row((name.removeprefix(">") for name in table.header), "th")
    return f"<table>{head}{''.join(row(cells, 'td') for cells in table.rows)}</table>"
