"""Loads a precision recipe by name, from a user's file, or from a table of a run file.

`precision/NAME.toml` and a user's file say what a recipe changes: of another one (`like = "deepseek-v3"`), or, without
`like`, of plain BF16.

    [every]              every site's operands: input = { format = "e5m2" }, and what adds its products
    [sites.expert_up]    one site's, after these; "none" in place of a table leaves the site in the model's own dtype
    [saved_swiglu]       "none" in place of a table: SwiGLU's inputs are kept in the model's own dtype

What is not said of an operand is as in the recipe that this one is like, else as in `spec.precision.GemmPrecision`.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, get_args

from dovetail.config import Record, near_matches, read_toml, validate
from dovetail.spec.precision import GemmPrecision, Recipe, Site

SITES: tuple[Site, ...] = get_args(Site)
ABSENT = {"saved_swiglu": "none", "saved_input": "none", "promotion": "never"}  # for None, which TOML does not have
_RECIPES = Path(__file__).parent / "precision"


class RecipeTable(Record):
    """A recipe as TOML has it: what it changes of another one."""

    name: str  # of a file: its path as it was given
    source: str
    like: str | None = None  # a recipe of the catalog
    every: dict[str, Any] | None = None  # keys of `GemmPrecision`
    sites: dict[str, Any] = {}  # the same by site
    saved_swiglu: Any = None
    expert_output: str | None = None
    moments: str | None = None


def recipe_names() -> list[str]:
    """Names that `load_recipe` takes, sorted."""
    return sorted(path.stem for path in _RECIPES.glob("*.toml"))


def load_recipe(recipe: str | Path | RecipeTable) -> Recipe:
    """The recipe of the catalog with that name, of the TOML file at that path (which ends in .toml or has a separator
    in it), or of a table. Raises ValueError, one line, for an unknown name and for what is wrong in a file."""
    if isinstance(recipe, RecipeTable):
        return _whole(recipe, recipe.name)
    if is_file(text := str(recipe)):
        return _whole(read_recipe(text), text)
    if text not in recipe_names():
        raise ValueError(f"{text!r} is no precision recipe; {near_matches(text, recipe_names())}")
    return _catalog(text)


def is_file(recipe: str) -> bool:
    """Whether this is the path of a recipe file, not a name of the catalog."""
    return recipe.endswith(".toml") or "/" in recipe


def read_recipe(path: str) -> RecipeTable:
    """The table of a user's file; the recipe's name is the path."""
    table = read_toml(path)
    if "name" in table:
        raise ValueError(f"{path}: name = {table['name']!r}: a recipe file is named by its path; leave name out")
    return validate(RecipeTable, {"name": path, **table}, where=path)


@cache
def _catalog(name: str) -> Recipe:
    where = f"precision/{name}.toml"
    return _whole(validate(RecipeTable, {"name": name, **read_toml(_RECIPES / f"{name}.toml")}, where), where)


def _whole(table: RecipeTable, where: str) -> Recipe:
    """The recipe that a table describes."""
    if table.like is not None and table.like not in recipe_names():
        remedy = near_matches(table.like, recipe_names())
        raise ValueError(f"{where}: like = {table.like!r} is no recipe of the catalog; {remedy}")
    base = Recipe(name=table.name, source=table.source) if table.like is None else _catalog(table.like)
    changes = table.model_dump(exclude={"like", "every", "sites"}, exclude_none=True)
    merged = _merged(base.model_dump(exclude={"sites"}), changes, where)
    return validate(Recipe, {**merged, "sites": _sites(base, table, where)}, where)


def _sites(base: Recipe, table: RecipeTable, where: str) -> dict[Site, GemmPrecision]:
    """The sites of `base` with what the table says of every one, and then of single ones."""
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
    """`base` with the values of `change`, key by key also in the tables inside."""
    merged = dict(base)
    for key, value in change.items():
        if key in ABSENT and isinstance(value, str) and value != ABSENT[key]:
            raise ValueError(f'{where}: {key} = {value!r}: the only word that it takes is "{ABSENT[key]}"')
        if isinstance(value, Mapping) and isinstance(merged.get(key), Mapping):
            value = {**merged[key], **value}
        merged[key] = None if value == ABSENT.get(key) else value
    return merged
