"""mla.svg: what multi-head latent attention keeps of a token, and the two forms in which it is computed.

Widths are those of the preset, heads and widths of the attention core those of the operations that plans are made of.
"""

from __future__ import annotations

from pathlib import Path

from canvas import BLUE, GREEN, GREY, INK, MARGIN, MUTED, ORANGE, PURPLE, Canvas

from dovetail.catalog.precision import load_recipe
from dovetail.catalog.presets import load_model
from dovetail.cost.count import cache_bytes_per_token
from dovetail.cost.ops.attention import absorbed_forward, attention_work, expanded_forward
from dovetail.cost.ops.ops import Attention, Op
from dovetail.spec.layout import Layout
from dovetail.spec.model import Gqa, Mla, ModelSpec

PANEL = 468.0  # width of each form


def draw(directory: Path) -> Path:
    spec = load_model("deepseek-v3")
    mla = spec.attention
    assert isinstance(mla, Mla)
    canvas = Canvas(
        1000,
        712,
        "Multi-head latent attention: what DeepSeek-V3 keeps of a token",
        "Each token is compressed to a latent and a rotary key, which are all that the KV cache keeps. Training and "
        "prefill expand the latent to keys and values of every head; decoding moves these projections to queries and "
        "outputs and reads the cache as it is.",
    )
    _down(canvas, spec, mla)
    _cache(canvas, spec, mla)
    works = [attention_work(spec, Layout(), load_recipe("bf16"), 1, 1, 1, is_training) for is_training in (True, False)]
    expanded, absorbed = _core(expanded_forward(works[0])), _core(absorbed_forward(works[1]))
    _expanded(canvas, MARGIN, 252, mla, expanded)
    _absorbed(canvas, 1000 - MARGIN - PANEL, 252, mla, expanded, absorbed)
    canvas.caption(
        "Both forms give the same output. The expanded one takes fewer multiplications, which counts where many "
        "queries share the keys; the absorbed one reads little memory, which counts where one new token looks back at "
        "thousands."
    )
    return canvas.save(directory / "mla.svg")


def _core(ops: list[Op]) -> Attention:
    (core,) = [op for op in ops if isinstance(op, Attention)]
    return core


def _down(canvas: Canvas, spec: ModelSpec, mla: Mla) -> None:
    """From the hidden state to the two latents."""
    canvas.text(MARGIN, 68, "Compressed once per token", size=14, anchor="start", bold=True)
    canvas.box(MARGIN, 112, 96, 52, GREY, "hidden", f"{spec.hidden_size:,}")
    canvas.rectangle(262, 134, 132, 106, fill="none", stroke=INK, radius=7)
    rows = ((84, BLUE, "query latent", mla.q_lora_rank), (140, ORANGE, "latent", mla.kv_lora_rank))
    for y, tint, name, width in (*rows, (190, PURPLE, "rotary key", mla.qk_rope_head_dim)):
        canvas.box(268, y, 120, 44, tint, name, f"{width:,}")
        canvas.arrow((MARGIN + 96, 138), (132, 138), (132, y + 22), (268, y + 22))
    canvas.text(200, 98, "q_a_proj", size=11.5, fill=MUTED)
    canvas.text(197, 191, "kv_a_proj_with_mqa", size=11.5, fill=MUTED)
    canvas.text(402, 191, "cached", size=12.5, anchor="start", bold=True)


def _cache(canvas: Canvas, spec: ModelSpec, mla: Mla) -> None:
    """What is cached, as lengths, beside what ordinary attention with as many heads caches."""
    heads, width = mla.num_attention_heads, mla.v_head_dim
    ordinary = Gqa(num_attention_heads=heads, num_key_value_heads=heads, head_dim=width)
    left, room = 470.0, 1000 - MARGIN - 470.0
    scale = room / ordinary.cache_dim
    canvas.text(left, 68, "Numbers in the KV cache, per token and layer", size=14, anchor="start", bold=True)
    canvas.rectangle(left, 86, room, 26, fill=GREY.fill, stroke=GREY.border)
    text = f"ordinary multi-head attention: 2 x {heads} heads x {width} = {ordinary.cache_dim:,}"
    canvas.text(left + room / 2, 104, text)
    latent, rotary = mla.kv_lora_rank * scale, mla.qk_rope_head_dim * scale
    canvas.rectangle(left, 130, latent, 26, fill=ORANGE.border)
    canvas.rectangle(left + latent, 130, rotary, 26, fill=PURPLE.border)
    fewer = ordinary.cache_dim / mla.cache_dim
    text = f"latent and rotary key: {mla.kv_lora_rank} + {mla.qk_rope_head_dim} = {mla.cache_dim}"
    canvas.text(left + 18, 148, f"{text}, {fewer:.0f} times fewer", anchor="start", bold=True)
    size = cache_bytes_per_token(spec)
    canvas.paragraph(
        left,
        184,
        (
            f"All {spec.num_hidden_layers} layers in BF16 keep {size:,} bytes of a token,",
            f"where ordinary attention would keep {2 * ordinary.cache_dim * spec.num_hidden_layers:,}.",
        ),
        fill=MUTED,
    )


def _expanded(canvas: Canvas, x: float, y: float, mla: Mla, core: Attention) -> None:
    note = f"every token has a key and a value for each of {core.heads} heads"
    _panel(canvas, x, y, "Expanded: training and prefill", note)
    nope, rope = mla.qk_nope_head_dim, mla.qk_rope_head_dim
    left, middle, right = (x + 16 + 150 * column for column in range(3))
    canvas.box(left, y + 60, 136, 44, BLUE, "query latent", f"{mla.q_lora_rank:,}")
    canvas.box(middle, y + 60, 136, 44, PURPLE, "rotary key", f"{rope}, one for all heads")
    canvas.box(right, y + 60, 136, 44, ORANGE, "latent", f"{mla.kv_lora_rank}")
    for place, tint, name, width in (
        (left, BLUE, "queries", f"{nope} + {rope} wide"),
        (middle, ORANGE, "keys", f"{nope} + {rope} wide"),
        (right, ORANGE, "values", f"{core.v_dim} wide"),
    ):
        canvas.box(place, y + 144, 136, 44, tint, f"{core.heads} {name}", width)
        canvas.arrow((place + 68, y + 104), (place + 68, y + 144))
    canvas.arrow((right + 20, y + 104), (middle + 116, y + 144))
    canvas.text(left + 76, y + 129, "q_b_proj", size=11.5, anchor="start", fill=MUTED)
    canvas.text(right + 76, y + 129, "kv_b_proj", size=11.5, anchor="start", fill=MUTED)
    canvas.arrow((middle + 68, y + 188), (middle + 68, y + 226))
    canvas.arrow((right + 68, y + 188), (right + 68, y + 226))
    _mixed(canvas, x, y, core, "values")
    _output(canvas, right, y + 292, "o_proj", f"{core.heads} x {core.v_dim} to hidden")
    canvas.arrow((right + 68, y + 264), (right + 68, y + 292))
    numbers = core.heads * (core.qk_dim + core.v_dim)
    lines = (
        f"numbers read of an earlier token: {core.heads} x ({core.qk_dim} + {core.v_dim}) = {numbers:,}",
        f"multiplications with it, over all heads: {numbers:,}",
    )
    canvas.paragraph(x + 16, y + 362, lines, size=12.5)


def _absorbed(canvas: Canvas, x: float, y: float, mla: Mla, expanded: Attention, core: Attention) -> None:
    note = f"the cache itself serves as one key and value for all {core.heads} heads"
    _panel(canvas, x, y, "Absorbed: decoding", note)
    nope, rope, rank = mla.qk_nope_head_dim, mla.qk_rope_head_dim, mla.kv_lora_rank
    left, middle, right = (x + 16 + 150 * column for column in range(3))
    canvas.box(left, y + 60, 136, 44, BLUE, f"{core.heads} queries", f"{nope} + {rope} wide")
    canvas.box(left, y + 144, 136, 44, BLUE, f"{core.heads} queries", f"{rank} + {rope} wide")
    canvas.arrow((left + 68, y + 104), (left + 68, y + 144))
    canvas.text(left + 76, y + 129, "kv_b_proj, rows of keys", size=11.5, anchor="start", fill=MUTED)
    canvas.rectangle(middle + 32, y + 54, 260, 56, fill="none", stroke=INK, radius=7)
    canvas.box(middle + 38, y + 60, 176, 44, ORANGE, "latents", f"{rank} of each token")
    canvas.box(middle + 218, y + 60, 68, 44, PURPLE, "rotary", f"{rope}")
    canvas.text(right + 142, y + 128, "KV cache", size=12.5, anchor="end", bold=True)
    canvas.arrow((middle + 116, y + 110), (middle + 116, y + 226))
    canvas.arrow((right + 36, y + 110), (right + 36, y + 226))
    _mixed(canvas, x, y, core, "latents")
    note = f"{core.heads} x {core.v_dim} to {core.heads} x {mla.v_head_dim}"
    _output(canvas, left, y + 292, "kv_b_proj, rows of values", note, width=286)
    _output(canvas, right, y + 292, "o_proj", f"{core.heads} x {mla.v_head_dim} to hidden")
    canvas.arrow((right + 68, y + 264), (right + 68, y + 276), (left + 143, y + 276), (left + 143, y + 292))
    canvas.arrow((left + 286, y + 312), (right, y + 312))
    products = core.heads * (core.qk_dim + core.v_dim)
    more = products / (expanded.heads * (expanded.qk_dim + expanded.v_dim))
    lines = (
        f"numbers read of an earlier token: {core.qk_dim}",
        f"multiplications with it, over all heads: {products:,}, {more:.1f} times as many",
    )
    canvas.paragraph(x + 16, y + 362, lines, size=12.5)


def _mixed(canvas: Canvas, x: float, y: float, core: Attention, of: str) -> None:
    """Scores and weighted sum, the same in both forms."""
    canvas.arrow((x + 84, y + 188), (x + 84, y + 226))
    canvas.box(x + 16, y + 226, 286, 38, GREEN, f"softmax of {core.heads} products, {core.qk_dim} wide", size=12.5)
    canvas.box(x + 316, y + 226, 136, 38, GREEN, f"sum of {of}", size=12.5)
    canvas.arrow((x + 302, y + 245), (x + 316, y + 245))


def _output(canvas: Canvas, x: float, y: float, name: str, note: str, width: float = 136.0) -> None:
    canvas.box(x, y, width, 40, GREY, name, note, size=12.5)


def _panel(canvas: Canvas, x: float, y: float, name: str, note: str) -> None:
    canvas.rectangle(x, y, PANEL, 392, fill="#f8f9fb", stroke="#d1d5db", radius=8)
    canvas.text(x + 16, y + 26, name, size=15, anchor="start", bold=True)
    canvas.text(x + 16, y + 44, note, size=12.5, anchor="start", fill=MUTED)
