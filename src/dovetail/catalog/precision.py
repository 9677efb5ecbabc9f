"""Loads precision recipes by name, from a user's file, or from a table of a run file.

`precision/NAME.toml` and a user's file say what a recipe changes in another one (`like = "deepseek-v3"`) or, without
`like`, in plain BF16.

    [every]              changes all sites: input = { format = "e5m2" } changes an operand
    [sites.expert_up]    changes one site after that; "none" in place of a table leaves the site in the model's dtype
    [saved_swiglu]       is an operand; "none" in place of a table keeps SwiGLU's inputs in the model's dtype

A key that is left out has the value of the recipe that this one is like, or else the default of
`spec.precision.GemmPrecision`.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, get_args

from dovetail.config import Record, near_matches, read_toml, validate
from dovetail.spec.precision import GemmPrecision, Recipe, Site

SITES: tuple[Site, ...] = get_args(Site)
ABSENT = {"saved_swiglu": "none", "saved_input": "none", "promotion": "never"}  # words for None, which TOML lacks
_RECIPES = Path(__file__).parent / "precision"


class RecipeTable(Record):
    """A recipe as TOML has it: what it changes in another recipe."""

    name: str  # of a file: its path as it was given
    source: str
    like: str | None = None  # a recipe of the catalog
    every: dict[str, Any] | None = None  # keys of `GemmPrecision`
    sites: dict[str, Any] = {}  # the same by site
    saved_swiglu: Any = None
    expert_output: str | None = None
    moments: str | None = None


def recipe_names() -> list[str]:
    """Return the names that `load_recipe` takes, sorted."""
    return sorted(path.stem for path in _RECIPES.glob("*.toml"))


def load_recipe(recipe: str | Path | RecipeTable) -> Recipe:
    """Load the recipe of that name, the TOML file at that path, or the recipe that a table describes.

    What ends in .toml or has a path separator in it is a path. Raises ValueError, one line, for an unknown name and
    for a file that is wrong.
    """
    if isinstance(recipe, RecipeTable):
        return _whole(recipe, recipe.name)
    if is_file(text := str(recipe)):
        return _whole(read_recipe(text), text)
    if text not in recipe_names():
        raise ValueError(f"{text!r} is no precision recipe; {near_matches(text, recipe_names())}")
    return _catalog(text)


def is_file(recipe: str) -> bool:
    """Return whether `recipe` is the path of a file, and not a name of the catalog."""
    return recipe.endswith(".toml") or "/" in recipe


def read_recipe(path: str) -> RecipeTable:
    """Read a user's file. The path becomes the recipe's name."""
    table = read_toml(path)
    if "name" in table:
        raise ValueError(f"{path}: name = {table['name']!r}: a recipe file is named by its path; leave name out")
    return validate(RecipeTable, {"name": path, **table}, where=path)


@cache
def _catalog(name: str) -> Recipe:
    where = f"precision/{name}.toml"
    return _whole(validate(RecipeTable, {"name": name, **read_toml(_RECIPES / f"{name}.toml")}, where), where)


def _whole(table: RecipeTable, where: str) -> Recipe:
    """Return the recipe that a table describes. Errors begin with `where`."""
    if table.like is not None and table.like not in recipe_names():
        remedy = near_matches(table.like, recipe_names())
        raise ValueError(f"{where}: like = {table.like!r} is no recipe of the catalog; {remedy}")
    base = Recipe(name=table.name, source=table.source) if table.like is None else _catalog(table.like)
    changes = table.model_dump(exclude={"like", "every", "sites"}, exclude_none=True)
    merged = _merged(base.model_dump(exclude={"sites"}), changes, where)
    return validate(Recipe, {**merged, "sites": _sites(base, table, where)}, where)


def _sites(base: Recipe, table: RecipeTable, where: str) -> dict[Site, GemmPrecision]:
    """Return the sites of `base`, changed as the table says: first all of them, then single ones."""
    sites = dict(base.sites)
    if table.every is not None:
        sites = {site: _changed(sites.get(site), table.every, f"{where}: every") for site in SITES}
    for site, change in table.sites.items():
        if site not in SITES:
            raise ValueError(f"{where}: sites.{site} is no site of a model; {near_matches(site, SITES)}")
        if change == "none":
            sites.pop(site, None)
        else:
            sites[site] = _changed(sites.get(site), change, f"{where}: sites.{site}")
    return sites


def _changed(site: GemmPrecision | None, change: Any, where: str) -> GemmPrecision:
    if not isinstance(change, Mapping):
        raise ValueError(f'{where} = {change!r}: expected a table of operands, or "none"')
    return validate(GemmPrecision, _merged({} if site is None else site.model_dump(), change, where), where)


def _merged(base: Mapping[str, Any], change: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return `base` with the values of `change`. A table inside is merged in the same way."""
    merged = dict(base)
    for key, value in change.items():
        if key in ABSENT and isinstance(value, str) and value != ABSENT[key]:
            raise ValueError(f'{where}: {key} = {value!r}: the only word that it takes is "{ABSENT[key]}"')
        if isinstance(value, Mapping) and isinstance(merged.get(key), Mapping):
            value = {**merged[key], **value}
        merged[key] = None if value == ABSENT.get(key) else value
    return merged
