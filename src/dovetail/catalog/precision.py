"""Named precision recipes."""

from __future__ import annotations

from dovetail.config import near_matches
from dovetail.spec.precision import GemmPrecision, Quantization, Recipe, Site

POWER_OF_TWO = Quantization(power_of_two=True)
SITES: tuple[Site, ...] = (
    "attention_down",
    "attention_up",
    "attention_out",
    "mlp_up",
    "mlp_down",
    "expert_up",
    "expert_down",
    "mtp_join",
)


def _deepseek_v3() -> Recipe:
    """Tiles and blocks of E4M3 [V3 §3.3.2]; powers of two where a value is requantised along the other side or sent:
    the input of the projection after attention, kept in E5M6, and what is dispatched to experts, forward and back
    [V3 §3.3.3]."""
    sites: dict[Site, GemmPrecision] = {site: GemmPrecision() for site in SITES}
    saved = Quantization(format="e5m6", power_of_two=True)
    sites["attention_out"] = GemmPrecision(input=POWER_OF_TWO, saved_input=saved)
    sites["expert_up"] = GemmPrecision(input=POWER_OF_TWO)
    sites["expert_down"] = GemmPrecision(grad=POWER_OF_TWO)
    return Recipe(name="deepseek-v3", source="V3 §3.3", sites=sites, saved_swiglu=Quantization())


def _everywhere_powers_of_two(recipe: Recipe) -> Recipe:
    """UE8M0 scales everywhere, as V3.1 was trained [its config.json: scale_fmt = ue8m0]."""

    def powers(precision: GemmPrecision) -> GemmPrecision:
        operands = {name: getattr(precision, name) for name in GemmPrecision.model_fields}
        changed = {name: q.model_copy(update={"power_of_two": True}) for name, q in operands.items() if q is not None}
        return precision.model_copy(update=changed)

    sites = {site: powers(precision) for site, precision in recipe.sites.items()}
    source = "V3.1 config.json: scale_fmt = ue8m0"
    return recipe.model_copy(
        update={"name": "deepseek-v3.1", "source": source, "sites": sites, "saved_swiglu": POWER_OF_TWO}
    )


def recipes() -> dict[str, Recipe]:
    plain = Recipe(name="bf16", source="no quantisation")
    v3 = _deepseek_v3()
    return {recipe.name: recipe for recipe in (plain, v3, _everywhere_powers_of_two(v3))}


def load_recipe(name: str) -> Recipe:
    """Raises `ValueError` with near matches for a name that is none."""
    known = recipes()
    if name not in known:
        raise ValueError(f"{name!r} is no precision recipe; {near_matches(name, known)}")
    return known[name]
