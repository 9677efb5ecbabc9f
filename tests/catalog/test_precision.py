"""Recipes by name: what each of the ablations changes, and nothing else."""

from __future__ import annotations

import pytest

from dovetail.catalog.precision import load_recipe, recipes
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


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("deepseek-v3", set()),
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
    sums = {
        name: {(site.accumulator, site.promotion) for site in each.sites.values()} for name, each in recipes().items()
    }
    others = {"v3-hopper": {("hopper", 128)}, "v3-no-promotion": {("hopper", None)}}
    for name, found in sums.items():
        assert found == others.get(name, {("fp32", 128)} if load_recipe(name).sites else set())


def test_moments_are_bf16_but_in_their_ablation() -> None:
    assert [name for name, each in recipes().items() if each.moments == "float32"] == ["bf16-fp32-moments"]
    plain, ours = load_recipe("bf16"), load_recipe("bf16-fp32-moments")
    assert ours.model_copy(update={"moments": plain.moments, "name": plain.name, "source": plain.source}) == plain


@pytest.mark.parametrize("name", recipes())
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
