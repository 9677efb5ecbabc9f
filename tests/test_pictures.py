"""The pictures of the documentation say what the code says: they are drawn anew and compared byte for byte. They can be
read by everyone: every label is inside of its picture and apart from the others, whatever the reader's font is."""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path
from types import ModuleType
from xml.etree import ElementTree

import pytest
from matplotlib.font_manager import FontProperties
from matplotlib.image import imread
from matplotlib.textpath import text_to_path

ROOT = Path(__file__).parents[1]
PICTURES = ROOT / "docs" / "pictures"
STORED = sorted(PICTURES.glob("*.svg"))
SVG = "{http://www.w3.org/2000/svg}"
TAKEN = {"page.png", "page-dark.png"}  # of a server that runs, by page.py
WIDE = {weight: FontProperties(family="DejaVu Sans", weight=weight) for weight in ("normal", "bold")}
Place = tuple[float, float, float, float]  # left, top, right, bottom


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with all pictures, as the command draws them."""
    out = tmp_path_factory.mktemp("pictures")
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    command = [sys.executable, str(PICTURES / "draw.py"), "--out", str(out)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return out


@pytest.fixture
def walks(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(PICTURES)
    return importlib.import_module("walks")


@pytest.mark.parametrize("picture", STORED, ids=lambda path: path.stem)
def test_what_is_stored_is_what_the_code_draws(picture: Path, drawn: Path) -> None:
    is_same = picture.read_bytes() == (drawn / picture.name).read_bytes()
    assert is_same, f"{picture.name} is of other code: look at what python docs/pictures/draw.py makes, and commit it"


def test_every_picture_is_stored_and_shown_on_a_page(drawn: Path) -> None:
    names = {path.name for path in drawn.iterdir()}
    stored = {path.name for path in PICTURES.iterdir() if path.suffix in (".svg", ".png")}
    assert names == stored - TAKEN
    pages = "".join(page.read_text("utf-8") for page in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])
    shown = {Path(path).name: words for words, path in re.findall(r"!\[([^\]]+)\]\(([^)]*pictures/[^)]+)\)", pages)}
    assert stored <= shown.keys() | {"quickstart.png"}
    assert all(len(words.split()) > 5 for words in shown.values())


def test_the_picture_of_a_run_is_drawn(drawn: Path) -> None:
    assert (PICTURES / "quickstart.jsonl").stat().st_size < 100_000
    for directory in (PICTURES, drawn):  # pixels depend on matplotlib, so they are not compared
        assert imread(directory / "quickstart.png").shape == (990, 1350, 4)


def test_pictures_of_the_page_are_small() -> None:
    for name in TAKEN:
        assert (PICTURES / name).stat().st_size < 200_000
        assert imread(PICTURES / name).shape[:2] == (900, 1280)


@pytest.mark.parametrize("picture", STORED, ids=lambda path: path.stem)
def test_pictures_need_nothing_else_and_can_be_listened_to(picture: Path) -> None:
    text = picture.read_text("utf-8")
    assert len(text.encode()) < 60_000
    assert not re.search(r"href|url\(|<(image|script|style|foreignObject)|\.\.|e[+-]\d", text)
    assert "http" not in text.replace("http://www.w3.org/2000/svg", "")
    root = ElementTree.fromstring(text)
    assert root.get("role") == "img" and (root.get("font-family") or "").endswith("sans-serif")
    title, description = (root.find(f"{SVG}{name}") for name in ("title", "desc"))
    assert title is not None and description is not None
    assert (title.text or "") in {text for text, _ in labels(root)} and len(description.text or "") > 100


def labels(root: ElementTree.Element) -> Iterator[tuple[str, Place]]:
    """Where every text is, set in a font wider than those that the pictures name."""
    for element, x, y, size, anchor in _with_place(root, 0, 0, 0, "start"):
        if element.tag == f"{SVG}text":
            text, font = element.text or "", WIDE[element.get("font-weight", "normal")]
            width = text_to_path.get_text_width_height_descent(text, font, ismath=False)[0]
            width *= size / font.get_size_in_points()
            left = x - {"start": 0, "middle": width / 2, "end": width}[anchor]
            yield text, (left, y - 0.73 * size, left + width, y + 0.2 * size)


def boxes(root: ElementTree.Element) -> Iterator[Place]:
    for element, x, y, _, _ in _with_place(root, 0, 0, 0, "start"):
        if element.tag == f"{SVG}rect":
            yield x, y, x + float(element.get("width", 0)), y + float(element.get("height", 0))


def _with_place(
    element: ElementTree.Element, x: float, y: float, size: float, anchor: str
) -> Iterator[tuple[ElementTree.Element, float, float, float, str]]:
    x, y = x + float(element.get("x", 0)), y + float(element.get("y", 0))
    size, anchor = float(element.get("font-size", size)), element.get("text-anchor", anchor)
    yield element, x, y, size, anchor
    for child in element:
        yield from _with_place(child, x, y, size, anchor)


def overlap(one: Place, other: Place) -> float:
    return min(min(one[2], other[2]) - max(one[0], other[0]), min(one[3], other[3]) - max(one[1], other[1]))


def collisions(root: ElementTree.Element) -> list[tuple[str, ...]]:
    """Texts that lie across an edge of the picture or of a box by more than a pixel, and pairs that do so over each
    other."""
    found = list(labels(root))
    out = [(one[0], other[0]) for one, other in combinations(found, 2) if overlap(one[1], other[1]) > 1]
    around = list(boxes(root))  # the first is the card itself
    for text, place in found:
        if overlap(place, around[0]) <= 1 or any(is_across(place, box) for box in around):
            out.append((text,))
    return out


def is_across(place: Place, box: Place) -> bool:
    is_inside = min(place[0] - box[0], place[1] - box[1], box[2] - place[2], box[3] - place[3]) > -1
    return overlap(place, box) > 1 and not is_inside


@pytest.mark.parametrize("picture", STORED, ids=lambda path: path.stem)
def test_labels_are_apart_and_inside(picture: Path) -> None:
    assert collisions(ElementTree.fromstring(picture.read_text("utf-8"))) == []


def test_labels_that_collide_are_found() -> None:
    text = (PICTURES / "walks.svg").read_text("utf-8")
    moved = re.sub(r'<text x="[\d.]+" y="[\d.]+"([^>]*)>MetricsLog<', r'<text x="1050" y="1000"\1>MetricsLog<', text)
    assert ("MetricsLog",) in collisions(ElementTree.fromstring(moved))
    moved = re.sub(r'y="[\d.]+"([^>]*)>train\.report\.metrics<', r'y="{}"\1>train.report.metrics<', text)
    above = re.search(r'y="([\d.]+)"[^>]*>MetricsLog<', text)
    assert above is not None
    assert ("MetricsLog", "train.report.metrics") in collisions(ElementTree.fromstring(moved.format(above[1])))


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        ((("train.run.loop.trian", "RunConfig"),), "train.run.loop.trian is not in the package"),
        ((("engine.llm.LLM", "text"), ("planner.request.answer", "text")), "nothing before planner.request.answer"),
        ((("train.run.loop.train", "Schedule"),), "hands on Schedule, which neither"),
    ],
)
def test_a_walk_that_the_code_does_not_go_is_refused(
    steps: tuple[tuple[str, str], ...], message: str, walks: ModuleType
) -> None:
    with pytest.raises(ValueError, match=message):
        walks.check(walks.Walk("a walk", "dovetail", steps))


def test_the_walks_are_those_of_the_tour(walks: ModuleType) -> None:
    headings = re.findall(r"^## (.+)$", (ROOT / "docs" / "tour.md").read_text("utf-8"), re.MULTILINE)
    for walk in walks.WALKS:
        assert f"{walk.title}: `{walk.command}`" in headings
