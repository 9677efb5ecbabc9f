"""Short rows of some slots and chunks of others in one pass have the bits of passes of their own."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from dovetail.engine.steps.cache import PagedCache
from dovetail.engine.steps.rows import Chunk, Short
from dovetail.engine.steps.runner import Runner
from dovetail.model.transformer import Transformer
from dovetail.numerics import capability
from dovetail.spec.model import Mla, ModelSpec

SpecFactory = Callable[..., ModelSpec]
ModelFactory = Callable[..., Transformer]
DTYPES = [torch.float32, torch.bfloat16]
PROMPTS = (1, 17, 40, 64, 70)  # tokens of each slot that come in chunks;
GENERATED = 14  # more come as short rows
PAGE, CAPACITY = 16, 96
NARROW = {"num_attention_heads": 3, "kv_lora_rank": 20, "qk_nope_head_dim": 10, "qk_rope_head_dim": 6, "v_head_dim": 14}
MODELS: dict[str, dict[str, object]] = {
    "whole tiles": {
        "attention": Mla(
            num_attention_heads=2, kv_lora_rank=32, qk_nope_head_dim=24, qk_rope_head_dim=8, v_head_dim=32
        ),
    },
    "odd widths": {"hidden_size": 46, "intermediate_size": 34, "attention": Mla(q_lora_rank=18, **NARROW)},
}
Plan = list[list[tuple[int, int]]]  # of each pass: slots and how many of their tokens


def plan(seed: int) -> Plan:
    """Passes of some slots, each with a chunk of its prompt or one to three short rows, until all is computed."""
    rng, done, passes = random.Random(seed), [0] * len(PROMPTS), []
    while left := [slot for slot, prompt in enumerate(PROMPTS) if done[slot] < prompt + GENERATED]:
        row = []
        for slot in rng.sample(left, rng.randint(1, len(left))):
            rest = PROMPTS[slot] - done[slot]
            count = min(rest, rng.choice((1, 9, 33, 70))) if rest > 0 else min(rest + GENERATED, rng.randint(1, 3))
            done[slot] += count
            row.append((slot, count))
        passes.append(row)
    return passes


@dataclass
class Run:
    """What came out: hidden states and experts of each position, of the main model and of its modules."""

    model: Transformer
    rng: random.Random
    kernels: bool = True
    one_by_one: bool = True
    apart: bool = False  # each slot in passes of its own
    wants_all: bool = True
    as_prompts: bool = False  # short rows go the way of a chunk
    seen: dict[tuple[str, int, int], Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        pages = CAPACITY // PAGE
        dtype, slots = self.model.embed_tokens.weight.dtype, len(PROMPTS)
        cache = PagedCache(self.model.spec, slots, CAPACITY, (slots * pages, PAGE), dtype)
        mixed = self.rng.sample(range(slots * pages), slots * pages)
        for slot in range(slots):
            cache.assign(slot, mixed[slot * pages : (slot + 1) * pages])
        self.runner = Runner(self.model, cache, self.kernels)
        self.runner.one_by_one = self.one_by_one
        generator = torch.Generator().manual_seed(7)
        self.texts = torch.randint(0, self.model.spec.vocab_size, (slots, CAPACITY), generator=generator).tolist()
        self.done = [0] * slots

    def all(self, passes: Plan) -> Run:
        for each in passes:
            for group in [[one] for one in each] if self.apart else [each]:
                self.pass_of(group)
        for slot, count in enumerate(self.done):
            places = self.runner.cache.places(torch.tensor(slot), torch.arange(count))
            layers = len(self.runner.cache.data) if self.wants_all else self.model.spec.num_hidden_layers
            for layer in range(layers):
                self.seen["entries", slot, layer] = self.runner.cache.entries(layer)[places]
        return self

    def pass_of(self, group: list[tuple[int, int]]) -> None:
        chunks, short = [], Short([], [], [])
        for slot, count in group:
            start, text = self.done[slot], self.texts[slot]
            self.done[slot] += count
            if start < PROMPTS[slot] or self.as_prompts:
                chunks.append(Chunk(slot, start, text[start : start + count], start + count < PROMPTS[slot]))
            else:
                short.tokens.extend(text[start : start + count])
                short.slots.extend([slot] * count)
                short.positions.extend(range(start, start + count))
        places = [*zip(short.slots, short.positions, strict=True)]
        places += [(chunk.slot, position) for chunk in chunks for position in chunk.range]
        rows = range(len(places))
        wanted = None if self.wants_all else sorted(self.rng.sample(rows, self.rng.randint(0, len(rows))))
        chosen: list[Tensor] = []
        hidden = self.runner.run(short, chunks, wanted, chosen)
        if wanted is not None:
            self.keep("logits", [places[row] for row in wanted], self.runner.logits(hidden))
        else:
            self.keep("logits", places, self.runner.logits(hidden))
            self.keep("experts", places, torch.stack(chosen, dim=1))
            for k in range(len(self.model.mtp)):
                given = [self.texts[slot][position + 1 + k] for slot, position in places]
                hidden = self.runner.draft(k, short, chunks, hidden, given)
                self.keep(f"module {k}", places, hidden)
        for chunk in chunks:
            if not chunk.goes_on:
                self.runner.forget(chunk.slot)

    def keep(self, name: str, places: list[tuple[int, int]], values: Tensor) -> None:
        for place, value in zip(places, values, strict=True):
            self.seen[name, *place] = value


def differing(one: Run, other: Run) -> set[tuple[str, int]]:
    """Of which slots what is not the same bit for bit."""
    names = one.seen.keys() & other.seen.keys()
    assert len(names) >= len(PROMPTS) * one.model.spec.num_hidden_layers
    return {key[:2] for key in names if not torch.equal(one.seen[key], other.seen[key])}


def model_of(name: str, dtype: torch.dtype, spec_of: SpecFactory, random_model: ModelFactory) -> Transformer:
    return random_model(spec_of(max_position_embeddings=CAPACITY, **MODELS[name]), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("kernels", [True, False])
def test_a_mixed_pass_has_the_bits_of_separate_ones(
    kernels: bool, name: str, dtype: torch.dtype, engine_spec: SpecFactory, random_model: ModelFactory
) -> None:
    """Logits, experts, states of MTP modules and cache entries."""
    model = model_of(name, dtype, engine_spec, random_model)
    for seed in range(3 if kernels else 1):
        passes = plan(seed)
        assert any(len({slot_is_short(passes, number, slot) for slot, _ in passes[number]}) == 2 for number in range(9))
        together = Run(model, random.Random(seed), kernels).all(passes)
        assert not differing(together, Run(model, random.Random(9), kernels, apart=True).all(passes))
        if kernels:
            some = Run(model, random.Random(seed), wants_all=False).all(passes)
            assert not differing(together, some) and some.seen.keys() < together.seen.keys()


def slot_is_short(passes: Plan, number: int, slot: int) -> bool:
    return sum(count for each in passes[:number] for mine, count in each if mine == slot) >= PROMPTS[slot]


def test_torch_on_all_rows_at_once_has_other_bits(engine_spec: SpecFactory, random_model: ModelFactory) -> None:
    model, passes = model_of("whole tiles", torch.float32, engine_spec, random_model), plan(0)
    runs = [Run(model, random.Random(0), False, one_by_one=False, apart=apart).all(passes) for apart in (True, False)]
    assert differing(*runs)


@pytest.mark.skipif(not capability.has_bf16_instructions(), reason="chunks are rows like others")
def test_short_rows_that_go_the_way_of_a_chunk_have_other_bits(
    engine_spec: SpecFactory, random_model: ModelFactory
) -> None:
    """Attention is absorbed in one and expanded in the other; a prompt's own rows are the same in both."""
    model, passes = model_of("whole tiles", torch.bfloat16, engine_spec, random_model), plan(0)
    one, other = (Run(model, random.Random(0), as_prompts=each).all(passes) for each in (False, True))
    assert {slot for _, slot in differing(one, other)} == set(range(len(PROMPTS)))
    for slot, prompt in enumerate(PROMPTS):
        for position in range(prompt):
            assert torch.equal(one.seen["logits", slot, position], other.seen["logits", slot, position])


def test_short_rows_in_fp32_are_a_chunks(engine_spec: SpecFactory, random_model: ModelFactory) -> None:
    model, passes = model_of("whole tiles", torch.float32, engine_spec, random_model), plan(0)
    assert not differing(*(Run(model, random.Random(0), as_prompts=each).all(passes) for each in (False, True)))
