"""The precision recipes, by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from dovetail.config import Record, near_matches
from dovetail.spec.precision import GemmPrecision, Quantization, Recipe, Site

RecordT = TypeVar("RecordT", bound=Record)
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
    """Return V3's own recipe: E4M3 in tiles and blocks [V3 §3.3.2].

    Scales are powers of two where a value is sent or quantised again along the other side: for the input of the
    projection after attention, which is kept in E5M6, and for what is dispatched to experts, forward and backward
    [V3 §3.3.3].
    """
    sites: dict[Site, GemmPrecision] = {site: GemmPrecision() for site in SITES}
    saved = Quantization(format="e5m6", power_of_two=True)
    sites["attention_out"] = GemmPrecision(input=POWER_OF_TWO, saved_input=saved)
    sites["expert_up"] = GemmPrecision(input=POWER_OF_TWO)
    sites["expert_down"] = GemmPrecision(grad=POWER_OF_TWO)
    return Recipe(name="deepseek-v3", source="V3 §3.3", sites=sites, saved_swiglu=Quantization())


def _v3_1(v3: Recipe) -> Recipe:
    """Return V3's recipe with UE8M0 scales everywhere, as V3.1 was trained [its config.json: scale_fmt = ue8m0]."""
    return _varied(v3, "deepseek-v3.1", "V3.1 config.json: scale_fmt = ue8m0", lambda operand: {"power_of_two": True})


def _per_tensor(v3: Recipe) -> Recipe:
    """Return V3's recipe with one scale for a whole tensor in place of tiles and blocks.

    This was usual before V3. A single outlier makes all other values less precise.
    """
    return _varied(
        v3, "v3-per-tensor", "ablation of V3 §3.3.2: no fine-grained scales", lambda operand: {"tile": "tensor"}
    )


def _e5m2_gradients(v3: Recipe) -> Recipe:
    """Return V3's recipe with gradients of outputs in E5M2, as hybrid recipes before V3 had them.

    E5M2 has more range and one mantissa bit less than E4M3, which V3 uses throughout [V3 §3.3.2].
    """
    changes = {"grad": {"format": "e5m2"}, "wgrad_grad": {"format": "e5m2"}}
    return _varied(v3, "v3-e5m2-gradients", "ablation of V3 §3.3.2: hybrid formats", lambda name: changes.get(name, {}))


def _block_gradients(v3: Recipe) -> Recipe:
    """Return V3's recipe with the gradient in dgrad quantised in 128x128 blocks.

    With these a model of 16B parameters diverged after some 300B tokens [V3 App. B.2].
    """
    changes = {"grad": {"tile": "block"}}
    return _varied(v3, "v3-block-gradients", "ablation of V3 App. B.2", lambda name: changes.get(name, {}))


def _hopper(v3: Recipe) -> Recipe:
    """Return V3's recipe with the H800's sums: its Tensor Core's, promoted to FP32 every 128 terms [V3 §3.3.2]."""
    return _summed(v3, "v3-hopper", "V3 §3.3.2 with the Tensor Core's own sums", 128)


def _no_promotion(v3: Recipe) -> Recipe:
    """Return V3's recipe with sums that are never promoted: the Tensor Core adds all scaled products."""
    return _summed(v3, "v3-no-promotion", "ablation of V3 §3.3.2: no promotion", None)


def _fp32_moments(plain: Recipe) -> Recipe:
    """Return the recipe with AdamW's moments in FP32, where V3 has BF16 [V3 §3.3.3]."""
    source = "ablation of V3 §3.3.3: FP32 moments"
    return plain.model_copy(update={"name": f"{plain.name}-fp32-moments", "source": source, "moments": "float32"})


def _combine(expert_output: str) -> Recipe:
    """Return BF16 with the outputs of routed experts sent back in a narrow format, as studied in [ISCA §3.2]."""
    return Recipe(name=f"combine-{expert_output}", source="ISCA §3.2", expert_output=expert_output)


def _varied(recipe: Recipe, name: str, source: str, change: Callable[[str], dict[str, Any]]) -> Recipe:
    """Return `recipe` with `change(name)` made to each operand of every site, and to `saved_swiglu`."""

    def varied(record: RecordT) -> RecordT:
        operands = {key: getattr(record, key) for key in type(record).model_fields}
        changed = {key: q.model_copy(update=change(key)) for key, q in operands.items() if isinstance(q, Quantization)}
        return record.model_copy(update=changed)

    sites = {site: varied(precision) for site, precision in recipe.sites.items()}
    return varied(recipe).model_copy(update={"name": name, "source": source, "sites": sites})


def _summed(recipe: Recipe, name: str, source: str, promotion: int | None) -> Recipe:
    """Return `recipe` with the sums of Hopper's Tensor Core at every site."""
    changes = {"accumulator": "hopper", "promotion": promotion}
    sites = {site: precision.model_copy(update=changes) for site, precision in recipe.sites.items()}
    return recipe.model_copy(update={"name": name, "source": source, "sites": sites})


def recipes() -> dict[str, Recipe]:
    plain = Recipe(name="bf16", source="no quantisation")
    v3 = _deepseek_v3()
    varying = (_v3_1, _per_tensor, _e5m2_gradients, _block_gradients, _hopper, _no_promotion)
    variants = [vary(v3) for vary in varying]
    combines = map(_combine, ("e4m3", "e5m2", "logfmt-8", "logfmt-10"))
    return {recipe.name: recipe for recipe in (plain, v3, *variants, _fp32_moments(plain), *combines)}


def load_recipe(name: str) -> Recipe:
    """Return the recipe `name`. Raises ValueError with near matches for an unknown one."""
    known = recipes()
    if name not in known:
        raise ValueError(f"{name!r} is no precision recipe; {near_matches(name, known)}")
    return known[name]
