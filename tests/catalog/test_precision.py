"""Recipes by name: what each of the ablations changes, and nothing else. Recipes from files: all that can be wrong."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from dovetail.catalog.precision import SITES, RecipeTable, load_recipe, read_recipe, recipe_names
from dovetail.config import dump, load_toml
from dovetail.spec.precision import GemmPrecision, Quantization, Recipe

SUMS = {"accumulator", "promotion"}
OPERANDS = {*GemmPrecision.model_fields, "saved_swiglu"} - SUMS


def changed(name: str) -> set[tuple[str, str, object]]:
    """(operand, property, new value) of all that differs from deepseek-v3, over all sites, but for the sums."""
    v3, other = load_recipe("deepseek-v3"), load_recipe(name)
    kept = (v3.sites.keys(), v3.expert_output, v3.moments)
    assert (other.sites.keys(), other.expert_output, other.moments) == kept
    pairs = [("saved_swiglu", v3.saved_swiglu, other.saved_swiglu)]
    for site in v3.sites:
        for operand in OPERANDS - {"saved_swiglu"}:
            pairs.append((operand, getattr(v3.sites[site], operand), getattr(other.sites[site], operand)))
    found = set()
    for operand, before, after in pairs:
        assert (before is None) == (after is None)
        for field in Quantization.model_fields if before is not None else ():
            if getattr(before, field) != getattr(after, field):
                found.add((operand, field, getattr(after, field)))
    return found


def test_deepseek_v3_is_the_paper_s() -> None:
    """[V3 §3.3.2, §3.3.3]: tiles and blocks of E4M3, powers of two for what is requantised or sent."""
    two = Quantization(power_of_two=True)
    sites = {site: GemmPrecision() for site in SITES} | {
        "attention_out": GemmPrecision(input=two, saved_input=Quantization(format="e5m6", power_of_two=True)),
        "expert_up": GemmPrecision(input=two),
        "expert_down": GemmPrecision(grad=two),
    }
    expected = Recipe(name="deepseek-v3", source="V3 §3.3", sites=sites, saved_swiglu=Quantization())
    assert load_recipe("deepseek-v3") == expected
    assert load_recipe("bf16") == Recipe(name="bf16", source="no quantisation")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("deepseek-v3.1", {(operand, "power_of_two", True) for operand in OPERANDS - {"saved_input"}}),
        ("v3-per-tensor", {(operand, "tile", "tensor") for operand in OPERANDS}),
        ("v3-e5m2-gradients", {("grad", "format", "e5m2"), ("wgrad_grad", "format", "e5m2")}),
        ("v3-block-gradients", {("grad", "tile", "block")}),
        ("v3-hopper", set()),
        ("v3-no-promotion", set()),
    ],
)
def test_what_a_recipe_changes(name: str, expected: set[tuple[str, str, object]]) -> None:
    assert changed(name) == expected


def test_what_adds_the_products() -> None:
    recipes = {name: load_recipe(name) for name in recipe_names()}
    sums = {
        name: {(site.accumulator, site.promotion) for site in each.sites.values()} for name, each in recipes.items()
    }
    others = {"v3-hopper": {("hopper", 128)}, "v3-no-promotion": {("hopper", None)}}
    for name, found in sums.items():
        assert found == others.get(name, {("fp32", 128)} if recipes[name].sites else set())


def test_moments_are_bf16_but_in_their_ablation() -> None:
    assert [name for name in recipe_names() if load_recipe(name).moments == "float32"] == ["bf16-fp32-moments"]
    plain, ours = load_recipe("bf16"), load_recipe("bf16-fp32-moments")
    assert ours.model_copy(update={"moments": plain.moments, "name": plain.name, "source": plain.source}) == plain


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_has_its_name_and_a_source_and_is_valid(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe.name == name and recipe.source
    assert Recipe.model_validate_json(recipe.model_dump_json()) == recipe


@pytest.mark.parametrize("format", ["e4m3", "e5m2", "logfmt-8", "logfmt-10"])
def test_the_combine_study_is_bf16_but_for_expert_outputs(format: str) -> None:
    recipe = load_recipe(f"combine-{format}")
    assert recipe.expert_output == format
    plain = load_recipe("bf16")
    assert recipe.model_copy(update={"expert_output": None, "name": plain.name, "source": plain.source}) == plain


def test_a_name_with_a_typo() -> None:
    with pytest.raises(ValueError, match="'v3-per-tenser' is no precision recipe; did you mean v3-per-tensor"):
        load_recipe("v3-per-tenser")


@pytest.mark.parametrize(
    "name", ["e4m33", "e44m3", "fp8", "e4n3", "e4m3fn", "e8m3", "bf16", "e5m10", "e4m0", "e1m3", ""]
)
def test_a_format_that_operands_cannot_have_is_refused_with_the_possible_ones(name: str) -> None:
    """Misspelt, or of more bits than BF16 holds, or none that scales are for."""
    with pytest.raises(
        ValueError, match=f"format\n.*cannot be '{name}'.*2 to 7 exponent bits and 1 to 7 .*(did you mean|known:) e"
    ):
        Quantization(format=name)


def test_case_does_not_matter_in_a_format() -> None:
    assert Quantization(format="E4M3") == Quantization(format="e4m3")


OWN = """
source = "a thesis"
like = "v3-hopper"
moments = "float32"
saved_swiglu = "none"

[every]
grad = { format = "e5m2", tile = "block" }
promotion = "never"

[sites]
mtp_join = "none"

[sites.expert_up]
input = { power_of_two = false }
promotion = 64

[sites.attention_out]
saved_input = "none"
"""


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], str]:
    """`file(text)`: the path of a recipe file, as a user types it."""
    monkeypatch.chdir(tmp_path)

    def write(text: str) -> str:
        Path("mine.toml").write_text(text, "utf-8")
        return "mine.toml"

    return write


def test_a_file_changes_what_it_says_of_every_site_and_then_of_one(file: Callable[[str], str]) -> None:
    recipe, base = load_recipe(file(OWN)), load_recipe("v3-hopper")
    assert (recipe.name, recipe.source, recipe.moments, recipe.saved_swiglu) == (
        "mine.toml",
        "a thesis",
        "float32",
        None,
    )
    assert recipe.sites.keys() == base.sites.keys() - {"mtp_join"}
    for site, before in base.sites.items():
        if site == "mtp_join":
            continue
        grad = before.grad.model_copy(update={"format": "e5m2", "tile": "block"})
        changes: dict[str, object] = {"grad": grad, "promotion": None}
        if site == "expert_up":
            changes |= {"input": Quantization(), "promotion": 64}
        if site == "attention_out":
            changes |= {"saved_input": None}
        assert recipe.sites[site] == before.model_copy(update=changes)
    assert recipe.sites["expert_down"].grad == Quantization(format="e5m2", tile="block", power_of_two=True)


def test_without_like_a_recipe_starts_from_bf16(file: Callable[[str], str]) -> None:
    one = load_recipe(file('source = "x"\n[sites.expert_up.grad]\nformat = "e5m2"'))
    assert one.sites == {"expert_up": GemmPrecision(grad=Quantization(format="e5m2"))}
    assert load_recipe(file('source = "x"\n[every]')).sites == {site: GemmPrecision() for site in SITES}


def test_a_table_that_was_written_and_read_again_is_the_same_recipe(file: Callable[[str], str], tmp_path: Path) -> None:
    table = read_recipe(file(OWN))
    (tmp_path / "kept.toml").write_text(dump(table), "utf-8")
    kept = load_toml(tmp_path / "kept.toml", RecipeTable)
    assert kept == table and load_recipe(kept) == load_recipe("mine.toml")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "missing key 'source'"),
        ('lik = "deepseek-v3"', "unknown key 'lik'; did you mean like?"),
        ('like = "deepseek-v33"', "like = 'deepseek-v33' is no recipe of the catalog; did you mean deepseek-v3 or"),
        ('name = "mine"', "name = 'mine': a recipe file is named by its path"),
        ('moments = "fp32"', "moments = 'fp32': input should be 'bfloat16' or 'float32'"),
        ('expert_output = "logfm-8"', "expert_output = 'logfm-8': an operand cannot be 'logfm-8'"),
        ('saved_swiglu = "non"', "saved_swiglu = 'non': the only word that it takes is \"none\""),
        ("[evry]", "unknown key 'evry'; did you mean every?"),
        ("[every.gradd]", "every: unknown key 'gradd'; did you mean grad or wgrad_grad?"),
        ("[every.grad]\nformt = 1", "every: unknown key 'grad.formt'; did you mean format?"),
        ("[every.grad]\nformat = 'e4m33'", "every: grad.format = 'e4m33': .*did you mean e4m3?"),
        ("[every.grad]\ntile = 'colum'", "every: grad.tile = 'colum': input should be 'row', 'column', 'block' or"),
        ("[every.weight]\ntile = 'row'", "every: weight has row tiles, .* use block or tensor"),
        ("[sites.expert_upp]", "sites.expert_upp is no site of a model; did you mean expert_up or expert_down?"),
        ("[sites]\nexpert_up = 'non'", "sites.expert_up = 'non': expected a table of operands, or \"none\""),
        ("[sites.mlp_up]\npromotion = 'nevr'", "sites.mlp_up: promotion = 'nevr': the only word .* \"never\""),
        ("[sites.mlp_up]\npromotion = 'never'", "sites.mlp_up: promotion = never with accumulator fp32"),
    ],
)
def test_what_is_wrong_in_a_file_is_one_line(text: str, words: str, file: Callable[[str], str]) -> None:
    source = 'source = "x"\n' if text else ""
    with pytest.raises(ValueError, match=f"^mine.toml: {words}") as caught:
        load_recipe(file(source + text))
    assert "\n" not in str(caught.value)


def test_a_file_that_is_not_there() -> None:
    with pytest.raises(ValueError, match=r"^nowhere/mine.toml: no such file$"):
        load_recipe("nowhere/mine.toml")
