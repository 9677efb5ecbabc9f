"""Text and picture of a network have its numbers in them."""

import json
from xml.etree import ElementTree

import pytest

from dovetail.catalog.fabrics import load_fabric
from dovetail.network.fabric.show import as_json, draw_svg, show
from dovetail.network.fabric.topology import build

SVG = "{http://www.w3.org/2000/svg}"


def test_text_has_layers_parts_and_checks() -> None:
    text = show(build(load_fabric("mpft")))
    for piece in (
        "16,384 GPUs in 2,048 nodes of 8, 768 switches",
        "plane 0 of 8",
        "32 up, 32 down",
        "2,048 NICs",
        "GPU i on plane i mod 8",
        "$72.00M, $4.39k per GPU",
        "64 of 64 used",
        "2 at most",
        "8,192 cables",
    ):
        assert piece in text, piece


def test_text_of_groups() -> None:
    assert "54 columns of 27 switches" in show(build(load_fabric("slim-fly")))
    text = show(build(load_fabric("dragonfly", endpoints=8192)))
    assert "16 groups of 32 switches" in text and "31 cables within its group, 16 to others, 16 NICs at most" in text


@pytest.mark.parametrize("name", ["mpft", "ft3", "mrft", "slim-fly", "h800-2048"])
def test_picture_is_xml_within_its_frame(name: str) -> None:
    root = ElementTree.fromstring(draw_svg(build(load_fabric(name)), width=900))
    height = float(root.attrib["height"])
    lines = root.findall(f"{SVG}line")
    assert root.attrib["width"] == "900" and lines
    for line in lines:
        assert all(0 <= float(line.attrib[key]) <= 900 for key in ("x1", "x2"))
        assert all(0 <= float(line.attrib[key]) <= height for key in ("y1", "y2"))


def test_picture_of_planes_colours_each_gpu_by_its_own() -> None:
    root = ElementTree.fromstring(draw_svg(build(load_fabric("mpft"))))
    wires = [line.attrib["stroke"] for line in root.findall(f"{SVG}line") if line.attrib["stroke-opacity"] == "0.9"]
    assert len(wires) == len(set(wires)) == 8
    with pytest.raises(ValueError, match="at least 400"):
        draw_svg(build(load_fabric("ft2")), width=100)


def test_json_is_plain() -> None:
    table = json.loads(json.dumps(as_json(build(load_fabric("ft2")))))
    assert table["switches"] == 96 and table["cables"]["switch"] == 2048
    assert table["graph"]["diameter"] == 2 and table["graph"]["bisection"]["share"] == 1
    assert sum(part["total"] for part in table["parts"]) == table["dollars"]
