"""The catalog listed: every name with its figures and source, and what recipes quantise in words."""

import json
import subprocess
import sys

import pytest

from dovetail.catalog.fabrics import fabric_names
from dovetail.catalog.hardware import cluster_names, gpu_names
from dovetail.catalog.precision import load_recipe, recipe_names
from dovetail.catalog.presets import model_names
from dovetail.listing import KINDS, as_json, listings, quantised
from dovetail.parallel.schedules.pipelines import SCHEDULES
from dovetail.train.step.schedule import schedule_names

NAMES = {
    "models": model_names(),
    "clusters": cluster_names(),
    "gpus": gpu_names(),
    "fabrics": fabric_names(),
    "recipes": recipe_names(),
    "schedules": schedule_names(),
    "pipelines": list(SCHEDULES),
}


def test_every_name_of_every_kind_is_listed_with_its_source() -> None:
    found = json.loads(json.dumps(as_json(listings())))
    assert {kind: [entry["name"] for entry in entries] for kind, entries in found.items()} == NAMES
    assert all(entry["source"] for entries in found.values() for entry in entries)


@pytest.mark.parametrize("kind", KINDS)
def test_one_kind_alone_is_what_all_have_of_it(kind: str) -> None:
    (alone,) = listings(kind)
    assert alone.entries == next(each for each in listings() if each.kind == kind).entries
    assert {len(row) for row in alone.rows} == {len(alone.header)}


def test_figures_are_in_base_units_and_printed_short() -> None:
    (models,), (gpus,) = listings("models"), listings("gpus")
    v3 = next(index for index, entry in enumerate(models.entries) if entry["name"] == "deepseek-v3")
    assert models.entries[v3]["parameters"] == 671_026_419_200
    assert models.rows[v3][:6] == ("deepseek-v3", "671.0B", "36.6B", "61", "256", "163,840")
    a100 = next(index for index, entry in enumerate(gpus.entries) if entry["name"] == "a100")
    assert gpus.entries[a100]["bf16"] == 312e12 and gpus.entries[a100]["fp8"] is None
    assert gpus.rows[a100][1:5] == ("80", "2,039", "312", "-")


def test_recipes_in_words() -> None:
    assert quantised(load_recipe("bf16")) == "nothing"
    v3 = "inputs E4M3 1x128, weights E4M3 128x128, gradients E4M3 1x128"
    assert quantised(load_recipe("deepseek-v3")) == v3
    assert quantised(load_recipe("deepseek-v3.1")) == f"{v3}, scales powers of two"
    assert quantised(load_recipe("v3-e5m2-gradients")).endswith("gradients E5M2 1x128")
    assert quantised(load_recipe("v3-no-promotion")) == f"{v3}, sums of Hopper's Tensor Core, unpromoted"
    assert quantised(load_recipe("combine-e4m3")) == "outputs of experts sent as E4M3"


def test_an_unknown_kind_gets_near_matches() -> None:
    with pytest.raises(ValueError, match="the catalog has no 'recipe'; did you mean recipes"):
        listings("recipe")


def test_listing_loads_neither_torch_nor_numba() -> None:
    code = "import sys; from dovetail.listing import listings; listings()"
    code += "; assert not {'torch', 'numba'} & set(sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
