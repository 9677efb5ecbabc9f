"""Prompts in chunks, in pages, beside others, behind pages that others filled: each row has the bits that it has alone.

The kernels of `tiled` need AVX-512 BF16; elsewhere, and in FP32, rows go through `fused`.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field

import numba
import pytest
import torch
from torch import Tensor

from dovetail.engine.steps import block_numba
from dovetail.engine.steps.cache import PagedCache
from dovetail.engine.steps.rows import NONE, Chunk
from dovetail.engine.steps.runner import Runner
from dovetail.engine.steps.tiled import TiledSteps
from dovetail.model.experts.moe import MoeMlp
from dovetail.model.transformer import Transformer
from dovetail.numerics import capability
from dovetail.numerics.cpu.kernels import array
from dovetail.numerics.formats.errors import network_terms, normwise_error, tolerance
from dovetail.spec.model import Mla, ModelSpec

SpecFactory = Callable[..., ModelSpec]
ModelFactory = Callable[..., Transformer]
CAPACITY = 150
DTYPES = [torch.float32] + [torch.bfloat16] * capability.has_bf16_instructions()
MOE = {
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 20,
    "first_k_dense_replace": 1,
    "n_group": 2,
    "topk_group": 1,
}
SOFTMAX = {**MOE, "scoring_func": "softmax", "topk_method": "group_limited_greedy", "n_shared_experts": 0}
NARROW = {"num_attention_heads": 3, "kv_lora_rank": 20, "qk_nope_head_dim": 10, "qk_rope_head_dim": 6, "v_head_dim": 14}
MODELS: dict[str, dict[str, object]] = {
    "sigmoid": {"moe": MOE},
    "softmax, compressed queries": {"moe": SOFTMAX, "attention": Mla(q_lora_rank=18, **NARROW)},
    "dense, odd widths": {
        "moe": None,
        "hidden_size": 46,
        "intermediate_size": 34,
        "attention": Mla(**NARROW),
        "num_nextn_predict_layers": 1,
    },
}


def model_of(name: str, dtype: torch.dtype, spec_of: SpecFactory, random_model: ModelFactory) -> Transformer:
    return random_model(spec_of(max_position_embeddings=CAPACITY, **MODELS[name]), dtype)


@dataclass
class Prompts:
    """Texts being computed, each in its slot and pages of its own but for shared ones."""

    model: Transformer
    texts: list[list[int]]
    page_size: int
    rng: random.Random = field(default_factory=lambda: random.Random(0))
    most_bytes: int | None = None
    kernels: bool = True

    def __post_init__(self) -> None:
        per_slot = -(-CAPACITY // self.page_size)
        count = per_slot * len(self.texts) + 3
        dtype = self.model.embed_tokens.weight.dtype
        cache = PagedCache(self.model.spec, len(self.texts), CAPACITY, (count, self.page_size), dtype)
        cache.data.uniform_(-9, 9, generator=torch.Generator().manual_seed(1))  # what others have left there
        pages = self.rng.sample(range(count), per_slot * len(self.texts))
        for slot in range(len(self.texts)):
            cache.assign(slot, pages[slot * per_slot : (slot + 1) * per_slot])
        self.runner = Runner(self.model, cache, self.kernels)
        self.runner.one_by_one = self.kernels
        if isinstance(self.runner.kernels, TiledSteps) and self.most_bytes is not None:
            self.runner.kernels.most_bytes = self.most_bytes
        self.done = [0] * len(self.texts)
        self.hidden: list[dict[int, Tensor]] = [{} for _ in self.texts]
        self.drafted: list[list[Tensor]] = [[] for _ in self.texts]

    def share(self, slot: int, other: int, pages: int) -> None:
        """The slot begins behind the other's first pages."""
        self.runner.cache.assign(slot, self.runner.cache.tables[other, :pages].tolist())
        self.done[slot] = pages * self.page_size

    def run(self, longest: int, wants_all: bool = True) -> Prompts:
        """Chunks of 1 to `longest` tokens of some of the texts at a time, until all are done."""
        while left := [slot for slot, text in enumerate(self.texts) if self.done[slot] < len(text)]:
            slots = self.rng.sample(left, self.rng.randint(1, len(left)))
            self.pass_of([self.chunk(slot, self.rng.randint(1, longest)) for slot in slots], wants_all)
        return self

    def run_whole(self) -> Prompts:
        self.pass_of([self.chunk(slot, len(text)) for slot, text in enumerate(self.texts)], True)
        return self

    def chunk(self, slot: int, length: int) -> Chunk:
        start, text = self.done[slot], self.texts[slot]
        tokens = text[start : start + length]
        return Chunk(slot, start, tokens, goes_on=start + len(tokens) < len(text))

    def pass_of(self, chunks: list[Chunk], wants_all: bool) -> None:
        places = [(chunk.slot, position) for chunk in chunks for position in chunk.range]
        rows = list(range(len(places)))
        wanted = None if wants_all else sorted(self.rng.sample(rows, self.rng.randint(0, len(rows))))
        hidden = self.runner.prompt(chunks, wanted)
        for row, state in zip(rows if wanted is None else wanted, hidden, strict=True):
            slot, position = places[row]
            self.hidden[slot][position] = state
        if wants_all:
            self.draft(chunks, hidden)
        for chunk in chunks:
            self.done[chunk.slot] = chunk.range.stop
            if not chunk.goes_on:
                self.runner.forget(chunk.slot)

    def draft(self, chunks: list[Chunk], hidden: Tensor) -> None:
        for k in range(len(self.model.mtp)):
            given = [
                [*self.texts[chunk.slot], 1, 2, 3][position + 1 + k] for chunk in chunks for position in chunk.range
            ]
            hidden = self.runner.draft(k, NONE, chunks, hidden, given)
            for chunk, part in zip(chunks, hidden.split([len(chunk.tokens) for chunk in chunks]), strict=True):
                self.drafted[chunk.slot].append(part)

    def entries(self, slot: int) -> Tensor:
        """Of all layers, at the positions of the text."""
        places = self.runner.cache.places(torch.tensor(slot), torch.arange(len(self.texts[slot])))
        layers = len(self.runner.cache.data) if self.drafted[slot] else self.model.spec.num_hidden_layers
        return torch.stack([self.runner.cache.entries(layer)[places] for layer in range(layers)])


def whole(model: Transformer, texts: list[list[int]]) -> list[Prompts]:
    """Each alone, in one chunk, in one page."""
    return [Prompts(model, [text], CAPACITY).run_whole() for text in texts]


def some_texts(spec: ModelSpec, *lengths: int) -> list[list[int]]:
    rng = random.Random(5)
    return [[rng.randrange(spec.vocab_size) for _ in range(length)] for length in lengths]


def differing(run: Prompts, alone: list[Prompts]) -> int:
    """Texts of whose hidden states, entries and states of modules a bit is another."""
    count = 0
    for slot, one in enumerate(alone):
        same = all(torch.equal(state, one.hidden[0][position]) for position, state in run.hidden[slot].items())
        layers = run.entries(slot)
        same &= torch.equal(layers, one.entries(0)[: len(layers)])
        count += not same
    return count


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_chunks_pages_and_neighbours_change_no_bit(
    name: str, dtype: torch.dtype, engine_spec: SpecFactory, random_model: ModelFactory
) -> None:
    """With keys and values of earlier chunks kept, not kept, and kept as far as there is room."""
    model = model_of(name, dtype, engine_spec, random_model)
    texts = some_texts(model.spec, 1, 2, 33, 64, 65, 140)
    alone = whole(model, texts)
    for number, page_size in enumerate((1, 16, 7, 64, CAPACITY)):
        for most_bytes in (None, 0, 20_000):
            run = Prompts(model, texts, page_size, random.Random(number), most_bytes)
            assert differing(run.run((3, 20, 70, 90, 140)[number]), alone) == 0
            kernels = run.runner.kernels
            assert not isinstance(kernels, TiledSteps) or not (kernels.kept or kernels.kept_bytes)
            for slot, one in enumerate(alone):
                for k in range(len(model.mtp)):
                    parts = run.drafted[slot][k :: len(model.mtp)]
                    assert torch.equal(torch.cat(parts), one.drafted[0][k])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_that_are_not_wanted_change_no_bit(
    dtype: torch.dtype, engine_spec: SpecFactory, random_model: ModelFactory
) -> None:
    """None, some or all rows of a pass; the last layer's entries are complete whatever was wanted."""
    model = model_of("sigmoid", dtype, engine_spec, random_model)
    texts = some_texts(model.spec, 1, 5, 40, 70)
    alone = whole(model, texts)
    for seed in range(8):
        run = Prompts(model, texts, 16, random.Random(seed), most_bytes=(None, 0)[seed % 2])
        assert differing(run.run(40, wants_all=False), alone) == 0
        assert any(run.hidden)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_prompt_behind_pages_of_another_has_its_own_bits(
    dtype: torch.dtype, engine_spec: SpecFactory, random_model: ModelFactory
) -> None:
    model = model_of("softmax, compressed queries", dtype, engine_spec, random_model)
    long, short = some_texts(model.spec, 70, 9)
    texts = [long, long[:50] + short, long[:33]]
    alone = whole(model, texts)
    run = Prompts(model, texts, 16)
    run.pass_of([run.chunk(0, 70)], wants_all=True)
    run.share(1, 0, 3)
    run.share(2, 0, 2)
    run.run(7)
    assert len(run.hidden[1]) == 59 - 48 and len(run.hidden[2]) == 1
    for slot in (1, 2):
        layers = model.spec.num_hidden_layers  # entries of modules at a shared page's end belong to the other's text
        assert torch.equal(run.entries(slot)[:layers], alone[slot].entries(0)[:layers])
        for position, state in run.hidden[slot].items():
            assert torch.equal(state, alone[slot].hidden[0][position])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_steps_beside_others_change_no_bit(
    name: str, dtype: torch.dtype, engine_spec: SpecFactory, random_model: ModelFactory
) -> None:
    model = model_of(name, dtype, engine_spec, random_model)
    texts = some_texts(model.spec, 40, 40, 40)
    seen = []
    for together in (1, 2, 5, 40):
        run = Prompts(model, texts, 16, random.Random(together))
        parts: list[list[Tensor]] = [[] for _ in texts]
        for start in range(0, 40, together):
            slots = [[slot] for slot in range(3)] if together == 1 else [[0, 1, 2]]
            for group in slots:
                rows = [(texts[s][i], s, i) for s in group for i in range(start, start + together)]
                hidden = run.runner.step(*torch.tensor(rows).T.contiguous())
                for s, part in zip(group, hidden.split(together), strict=True):
                    parts[s].append(part)
        logits = run.runner.logits(torch.stack([torch.cat(part) for part in parts]))
        seen.append((logits, torch.stack([run.entries(slot) for slot in range(3)])))
    for logits, entries in seen[1:]:
        assert torch.equal(logits, seen[0][0]) and torch.equal(entries, seen[0][1])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_torch_would_change_bits(dtype: torch.dtype, engine_spec: SpecFactory, random_model: ModelFactory) -> None:
    model = model_of("sigmoid", dtype, engine_spec, random_model)
    texts = some_texts(model.spec, 33, 64, 65, 100)
    alone = [Prompts(model, [text], CAPACITY, kernels=False).run_whole() for text in texts]
    assert differing(Prompts(model, texts, 16, kernels=False).run(30), alone) > 0


@pytest.mark.skipif(torch.bfloat16 not in DTYPES, reason="the CPU has no AVX-512 BF16")
def test_a_slot_is_forgotten_before_its_next_prompt(engine_spec: SpecFactory, random_model: ModelFactory) -> None:
    """A prompt that was given up leaves keys and values of its first positions."""
    model = model_of("sigmoid", torch.bfloat16, engine_spec, random_model)
    one, other = some_texts(model.spec, 60, 50)
    [alone] = whole(model, [other])
    for forgets in (True, False):
        run = Prompts(model, [one], 16, most_bytes=10**6)
        run.pass_of([run.chunk(0, 40)], wants_all=True)
        assert isinstance(run.runner.kernels, TiledSteps) and run.runner.kernels.kept
        if forgets:
            run.runner.forget(0)
        hidden = run.runner.prompt([Chunk(0, 0, other[:45], goes_on=True)])
        assert torch.equal(hidden, torch.stack([alone.hidden[0][position] for position in range(45)])) == forgets


@pytest.mark.skipif(torch.bfloat16 not in DTYPES, reason="the CPU has no AVX-512 BF16")
def test_the_number_of_threads_changes_no_bit(engine_spec: SpecFactory, random_model: ModelFactory) -> None:
    model = model_of("sigmoid", torch.bfloat16, engine_spec, random_model)
    texts = some_texts(model.spec, 140, 65)
    threads, alone = numba.get_num_threads(), whole(model, texts)
    try:
        for count in range(1, threads + 1):
            numba.set_num_threads(count)
            assert differing(Prompts(model, texts, 16).run(100), alone) == 0
    finally:
        numba.set_num_threads(threads)


def bound_of(model: Transformer, length: int) -> float:
    """FP32: angles and sums; BF16: ten roundings in a row per layer, scores of up to 8 or so among them."""
    layers = model.spec.num_hidden_layers + model.spec.num_nextn_predict_layers
    terms = network_terms(model.spec, length)
    if model.embed_tokens.weight.dtype == torch.float32:
        return tolerance(torch.float32, roundings=length, terms=terms)
    return tolerance(torch.bfloat16, roundings=layers * (10 + 8), terms=terms)


@torch.no_grad()
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_prompts_are_the_models_forward_up_to_rounding(
    name: str, dtype: torch.dtype, engine_spec: SpecFactory, random_model: ModelFactory
) -> None:
    """All experts are chosen, so that none changes sides by a rounding."""
    changes = dict(MODELS[name])
    if changes["moe"] is not None:
        changes["moe"] = {**changes["moe"], "num_experts_per_tok": 4, "n_group": 1, "topk_group": 1}  # type: ignore[dict-item]
    model = random_model(engine_spec(max_position_embeddings=CAPACITY, **changes), dtype)
    true = Transformer(model.spec, torch.float32)
    true.load_state_dict({key: tensor.float() for key, tensor in model.state_dict().items()})
    [text] = some_texts(model.spec, 100)
    run = Prompts(model, [text], 16).run(40)
    ours = torch.stack([run.hidden[0][position] for position in range(100)])
    hidden = true(torch.tensor([text])).hidden
    bound = bound_of(model, 100)
    assert normwise_error(ours, hidden[0]) < bound
    assert normwise_error(ours[1:], hidden[0, :-1]) > bound, "the test can tell rows apart"
    for k in range(len(model.mtp)):
        hidden = true.mtp_forward(k, hidden, torch.tensor([[*text, 1, 2, 3][1 + k : 101 + k]])).hidden
        assert normwise_error(torch.cat(run.drafted[0][k :: len(model.mtp)]), hidden[0]) < bound


@torch.no_grad()
@pytest.mark.skipif(torch.bfloat16 not in DTYPES, reason="the CPU has no AVX-512 BF16")
@pytest.mark.parametrize("renormalises", [False, True])
@pytest.mark.parametrize("scoring_func", ["sigmoid", "softmax"])
@pytest.mark.parametrize("topk_method", ["noaux_tc", "group_limited_greedy"])
def test_experts_are_the_gates(
    topk_method: str, scoring_func: str, renormalises: bool, engine_spec: SpecFactory, random_model: ModelFactory
) -> None:
    gate = {"scoring_func": scoring_func, "topk_method": topk_method, "norm_topk_prob": renormalises}
    moe = {**MOE, **gate, "n_routed_experts": 12, "num_experts_per_tok": 3, "n_group": 4, "topk_group": 2}
    model = random_model(engine_spec(moe=moe), torch.bfloat16)
    steps = TiledSteps(model, PagedCache(model.spec, 1, 8, (1, 8)))
    block, mlp = steps.blocks[1], model.layers["1"].mlp
    assert isinstance(mlp, MoeMlp)
    x = torch.randn(50, model.spec.hidden_size, generator=torch.Generator().manual_seed(2)).bfloat16() * 2**-6
    normed = model.layers["1"].post_attention_layernorm(x)
    theirs, _ = mlp(normed[None], model.dispatcher)
    ids = torch.empty(50, 3, dtype=torch.int64)
    ours = x.clone()
    block_numba.experts(array(ours), steps.eps, *block.mlp, ids.numpy(), block.gate, numba.get_num_threads())
    assert torch.equal(ids.sort(dim=-1).values, mlp.gate(normed).expert_ids.sort(dim=-1).values)
    assert normwise_error(ours, x + theirs[0]) < tolerance(torch.bfloat16, roundings=8, terms=200)
    assert normwise_error(x, x + theirs[0]) > 0.5, "what the experts add is most of it"


def test_beyond_the_capacity_is_an_error(engine_spec: SpecFactory, random_model: ModelFactory) -> None:
    for dtype in DTYPES:
        model = model_of("sigmoid", dtype, engine_spec, random_model)
        run = Prompts(model, [[1] * (CAPACITY + 1)], 16)
        with pytest.raises(ValueError, match=rf"position {CAPACITY} .* capacity >= {CAPACITY + 1}"):
            run.runner.prompt([Chunk(0, CAPACITY, [1])])
