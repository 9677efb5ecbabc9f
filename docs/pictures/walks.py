"""walks.svg: the walks of docs/tour.md side by side: which code hands what to which, and on which layer it is.

The layers are those of pyproject.toml. Before anything is drawn, every name is looked up in the source, and so is how
the walk comes to it: a module that stands before it imports it, or imports one that does.
"""

from __future__ import annotations

import ast
import tomllib
from functools import cache
from pathlib import Path
from typing import NamedTuple

from canvas import BLUE, GREEN, GREY, MARGIN, MUTED, ORANGE, PURPLE, RED, Canvas, Tint

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "src" / "dovetail"
TEAL = Tint("#d8efef", "#3fa3a3", "#1d7272")
YELLOW = Tint("#fff6bf", "#c9a800", "#6f5c00")
TINTS = {
    "cli": GREY,
    "train | engine | planner": BLUE,
    "parallel": RED,
    "model": ORANGE,
    "numerics | text | network | cluster": GREEN,
    "cost": PURPLE,
    "catalog": TEAL,
    "spec": YELLOW,
}
WIDTH, GUTTER = 1060.0, 22.0
COLUMN = (WIDTH - 2 * MARGIN - 2 * GUTTER) / 3
TOP, BOX, STEP = 180.0, 36.0, 58.0
INDENT = 13.0  # of a box, for each layer below the first


class Walk(NamedTuple):
    """A command and its steps: a name, and what it hands on, which is a class where it has a capital letter."""

    title: str
    command: str
    steps: tuple[tuple[str, str], ...]


WALKS = (
    Walk(
        "Text to loss",
        "dovetail train RUN.toml",
        (
            ("cli.train.train", "RunConfig"),
            ("train.run.loop.train", "ModelSpec"),
            ("model.transformer.initialize", "Transformer"),
            ("text.corpus.read_batch", "Batch"),
            ("train.step.step.train_step", "tokens"),
            ("model.transformer.Transformer", "Context"),
            ("model.attention.mla.MultiHeadLatentAttention", "hidden states"),
            ("model.experts.gate.route", "Routing"),
            ("model.experts.moe.Experts", "rows of each expert"),
            ("numerics.products.grouped.fprop", "hidden states"),
            ("train.step.loss.token_loss", "loss, then gradients"),
            ("train.step.optim.AdamW", "new weights"),
            ("cost.count.training_flop_per_token", "StepMetrics"),
            ("train.report.metrics.MetricsLog", "metrics.jsonl, and checkpoints"),
        ),
    ),
    Walk(
        "Prompt to tokens",
        "dovetail generate CHECKPOINT --prompt TEXT",
        (
            ("cli.generate.generate", "SamplingParams"),
            ("engine.llm.LLM", "directory"),
            ("model.checkpoint.weights.import_hf", "Transformer, ModelSpec"),
            ("text.tokenizer.Tokenizer", "token ids"),
            ("engine.sequence.Sequence", "Sequence"),
            ("engine.core.Core", "the sequences at work"),
            ("engine.scheduling.scheduler.Scheduler", "Work, and pages for it"),
            ("engine.speculative.draft", "drafts"),
            ("engine.steps.runner.Runner", "rows of prompts and of steps, in one pass"),
            ("engine.steps.tiled.TiledSteps", "latents and rotary keys"),
            ("engine.steps.cache.PagedCache", "those of all tokens so far"),
            ("engine.drawing.draw_all", "probabilities"),
            ("engine.sampler.sample", "tokens, and drafts that are kept"),
            ("engine.completion_text.CompletionText", "text, as it becomes sure"),
        ),
    ),
    Walk(
        "Model and hardware to plan",
        "dovetail plan MODEL --cluster NAME",
        (
            ("cli.plan.plan", "Request"),
            ("planner.request.answer", "name"),
            ("catalog.presets.find_model", "ModelSpec"),
            ("catalog.hardware.load_cluster", "Cluster"),
            ("planner.training.search.search_all", "Layout"),
            ("cost.memory.rank.pipeline_memory", "RankMemory"),
            ("cost.ops.layer.layer_ops", "Op"),
            ("planner.operation.operation_time", "what one GPU does"),
            ("cost.roofline.op_time", "what goes between GPUs"),
            ("network.demands.closed_forms.exchange_time", "StageSeconds"),
            ("planner.training.plan.evaluate", "Durations"),
            ("parallel.schedules.pipelines.make_schedule", "Schedule"),
            ("planner.training.timeline.replay", "TrainingPlan"),
            ("planner.report.tables.tables", "time, memory, money"),
        ),
    ),
)


def draw(directory: Path) -> Path:
    for walk in WALKS:
        check(walk)
    canvas = Canvas(
        WIDTH,
        TOP + STEP * max(len(walk.steps) for walk in WALKS) + 74,
        "Three walks through the package",
        "Three columns of boxes, top to bottom: "
        + " ".join(f"{walk.title}: {', '.join(name for name, _ in walk.steps)}." for walk in WALKS),
    )
    _legend(canvas)
    for index, walk in enumerate(WALKS):
        _column(canvas, MARGIN + index * (COLUMN + GUTTER), walk)
    canvas.caption(
        "At each arrow stands what the walk has in its hands there, yellow where it is a description of spec, which "
        "all others read. The tour goes the same ways function by function."
    )
    return canvas.save(directory / "walks.svg")


def check(walk: Walk) -> None:
    """Raises ValueError for a name that is none, for one that nothing before it leads to, and for a class that
    neither giver nor taker knows."""
    reached: set[str] = set()
    modules = [name.rpartition(".")[0] for name, _ in walk.steps]
    for index, (name, handed) in enumerate(walk.steps):
        module, _, item = name.rpartition(".")
        if item not in _defined(module):
            raise ValueError(f"{walk.title}: {name} is not in the package")
        if index and module not in reached:
            raise ValueError(f"{walk.title}: nothing before {name} imports {module}")
        reached |= _imported(module).union(*(_imported(each) for each in _imported(module)))
        known = _words(module) | _words(modules[min(index + 1, len(modules) - 1)])
        for word in handed.split(", "):
            if word[0].isupper() and word not in known:
                raise ValueError(f"{walk.title}: {name} hands on {word}, which neither it nor the next step knows")


@cache
def _tree(module: str) -> ast.Module | None:
    path = SOURCE / f"{module.replace('.', '/')}.py"
    return ast.parse(path.read_text("utf-8")) if path.exists() else None


def _defined(module: str) -> set[str]:
    tree = _tree(module)
    return {each.name for each in tree.body if isinstance(each, ast.FunctionDef | ast.ClassDef)} if tree else set()


@cache
def _imported(module: str) -> frozenset[str]:
    """Modules of the package that `module` imports, inside of functions too."""
    tree = _tree(module)
    found = [each for each in ast.walk(tree) if isinstance(each, ast.ImportFrom)] if tree else []
    names = {f"{each.module}" for each in found} | {
        f"{each.module}.{name.name}" for each in found for name in each.names
    }
    return frozenset(name.removeprefix("dovetail.") for name in names if name.startswith("dovetail."))


def _words(module: str) -> set[str]:
    tree = _tree(module)
    assert tree is not None
    names = {each.id for each in ast.walk(tree) if isinstance(each, ast.Name)}
    return names | _defined(module)


@cache
def _descriptions() -> frozenset[str]:
    """Classes of spec."""
    return frozenset().union(*(_defined(f"spec.{path.stem}") for path in (SOURCE / "spec").glob("*.py")))


@cache
def _layers() -> tuple[str, ...]:
    """Of TINTS, in the order of pyproject.toml, which has to be the same."""
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["importlinter"]["contracts"]
    listed = [layer.replace("dovetail.", "") for layer in contracts[0]["layers"]]
    if [layer for layer in listed if layer in TINTS] != list(TINTS):
        raise ValueError(f"pyproject.toml has the layers {listed}, this picture {list(TINTS)}")
    return tuple(TINTS)


def _layer(name: str) -> int:
    return next(index for index, layer in enumerate(_layers()) if name.split(".")[0] in layer.split(" | "))


def _legend(canvas: Canvas) -> None:
    canvas.text(MARGIN, 66, "Layers of the package; imports go to the right only:", anchor="start", fill=MUTED)
    x = MARGIN
    for layer in _layers():
        tint = TINTS[layer]
        name = layer.replace(" | ", ", ")
        width = 24 + 7.4 * len(name)
        canvas.box(x, 78, width, 26, tint, name, size=12.5)
        x += width + 10


def _column(canvas: Canvas, left: float, walk: Walk) -> None:
    deepest = INDENT * (len(TINTS) - 1)
    canvas.text(left, 138, walk.title, size=15, anchor="start", bold=True)
    canvas.text(left, 156, walk.command, size=12, anchor="start", fill=MUTED)
    for index, (name, handed) in enumerate(walk.steps):
        module, _, item = name.rpartition(".")
        layer = _layer(name)
        x, y, width = left + INDENT * layer, TOP + index * STEP, COLUMN - deepest
        tint = TINTS[_layers()[layer]]
        canvas.rectangle(x, y, width, BOX, fill=tint.fill, stroke=tint.border, radius=5)
        canvas.text(x + 10, y + 15, item, size=12.5, anchor="start", bold=True)
        canvas.text(x + 10, y + 29, module, size=11, anchor="start", fill=MUTED)
        middle = left + deepest + 16
        if set(handed.split(", ")) & _descriptions():
            canvas.rectangle(middle + 4, y + BOX + 3, 8 + 7.2 * len(handed), 16, fill=YELLOW.fill, radius=3)
        canvas.arrow((middle, y + BOX), (middle, y + STEP))
        canvas.text(middle + 8, y + BOX + 15, handed, size=11.5, anchor="start")
