"""On a CPU a completion is bit for bit the same with drafts and without, in a batch and alone."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from dovetail.catalog.precision import load_recipe
from dovetail.engine import drawing
from dovetail.engine.llm import LLM
from dovetail.engine.sampler import SamplingParams
from dovetail.engine.steps.cache import contiguous_cache
from dovetail.engine.steps.rows import Chunk
from dovetail.engine.steps.runner import Runner, _groups
from dovetail.model.precision import apply_recipe
from dovetail.model.transformer import Transformer
from dovetail.numerics import capability

DTYPES = [torch.bfloat16, torch.float32]
GREEDY = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True)
SAMPLED = GREEDY.model_copy(update={"temperature": 0.8, "top_p": 0.95, "seed": 5})
PENALIZED = SAMPLED.model_copy(update={"repetition_penalty": 1.2, "frequency_penalty": 0.3, "logit_bias": {7: 2.0}})
STEPS = 12
PROMPT = Runner.prompt
Trained = tuple[dict[torch.dtype, Transformer], list[int]]
Patch = pytest.MonkeyPatch


def pieces(text: list[int], count: int) -> list[list[int]]:
    """Of 1 to 60 tokens, from all over the text."""
    starts = [i * (len(text) - 60) // count for i in range(count)]
    return [text[start : start + 1 + i * 13 % 60] for i, start in enumerate(starts)]


def run(model: Transformer, texts: list[list[int]], rows: int) -> tuple[list[Tensor], list[Tensor]]:
    """Logits and cache of each text, whose last STEPS tokens are run `rows` at a time, together with the others'."""
    longest, dtype = max(map(len, texts)), model.embed_tokens.weight.dtype
    runner = Runner(model, contiguous_cache(model.spec, len(texts), longest + 5, dtype))
    whole = [Chunk(slot, 0, text[:-STEPS]) for slot, text in enumerate(texts)]
    ends = torch.tensor([len(chunk.tokens) for chunk in whole]).cumsum(0) - 1
    if rows == 1:
        hidden = runner.prompt(whole, ends.tolist())  # as without drafts
    else:
        hidden = runner.prompt(whole)[ends]
    seen = [[row] for row in runner.logits(hidden).split(1)]
    for done in range(0, STEPS, rows):
        places = [len(text) - STEPS + done + i for text in texts for i in range(rows)]
        slots = torch.arange(len(texts)).repeat_interleave(rows)
        tokens = [texts[slot][place] for slot, place in zip(slots.tolist(), places, strict=True)]
        hidden = runner.step(torch.tensor(tokens), slots, torch.tensor(places))
        for parts, new in zip(seen, runner.logits(hidden).split(rows), strict=True):
            parts.append(new)
    layers = model.spec.num_hidden_layers
    caches = [runner.cache.data[:layers, slot, : len(text)] for slot, text in enumerate(texts)]
    return [torch.cat(parts) for parts in seen], caches


def differing(model: Transformer, texts: list[list[int]]) -> int:
    """How often logits or cache entries of a text are not those of one row at a time: many texts, by two and three."""
    alone = [run(model, [text], 1) for text in texts]
    count = 0
    for rows in (2, 3):
        for (logits, cache), other_logits, other_cache in zip(alone, *run(model, texts, rows), strict=True):
            count += not (torch.equal(logits[0], other_logits) and torch.equal(cache[0], other_cache))
    return count


def completions(model: Transformer, prompts: list[list[int]], params: SamplingParams) -> list[list[list[int]]]:
    """Tokens of the prompts' completions: plain, with drafts, and each prompt by itself."""
    llm = LLM(model, model.spec)
    together = [llm.generate(prompts, params, speculate) for speculate in (0, 1, 2)]
    each = [params.model_copy(update={"seed": params.seed + i}) for i in range(len(prompts))]
    alone = [
        [llm.generate([prompt], mine, speculate)[0] for prompt, mine in zip(prompts, each, strict=True)]
        for speculate in (0, 2)
    ]
    drafted = [completion.statistics for completion in together[2]]
    least = 0.2 if params.is_greedy else 0.1  # two races agree less often than two arg maxima
    assert least < sum(each.accepted for each in drafted) / sum(each.drafted for each in drafted) < 0.9
    return [[completion.token_ids for completion in each] for each in (*together, *alone)]


def assert_lossless(trained: Trained, dtype: torch.dtype, num_prompts: int, apart: int) -> None:
    """Logits, cache and completions are those without drafts."""
    models, text = trained
    assert differing(models[dtype], [text[i * apart :][: STEPS + 1 + i] for i in range(num_prompts)]) == 0
    for params in (SAMPLED, PENALIZED, GREEDY):
        plain, *others = completions(models[dtype], pieces(text, num_prompts), params)
        assert all(each == plain for each in others)
        assert len(set(map(tuple, plain))) > 0.75 * num_prompts


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_drafts_and_neighbours_change_no_bit(dtype: torch.dtype, trained: Trained) -> None:
    assert_lossless(trained, dtype, 40, apart=97)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_drafts_change_no_bit_of_hundreds(dtype: torch.dtype, trained: Trained) -> None:
    assert_lossless(trained, dtype, 400, apart=17)


@pytest.mark.parametrize(("dtype", "recipe"), [*((dtype, "bf16") for dtype in DTYPES), (torch.bfloat16, "deepseek-v3")])
def test_the_reference_computes_row_by_row(
    dtype: torch.dtype, recipe: str, trained: Trained, monkeypatch: Patch
) -> None:
    models, text = trained
    model, texts = copy.deepcopy(models[dtype]), [text[i * 97 :][: STEPS + 1 + 7 * i] for i in range(6)]
    apply_recipe(model, load_recipe(recipe))
    monkeypatch.setattr("dovetail.engine.steps.runner.takes", lambda model: False)
    assert differing(model, texts) == 0
    for params in (GREEDY, SAMPLED):
        plain, *others = completions(model, pieces(text, 6), params.model_copy(update={"max_tokens": 8}))
        assert all(each == plain for each in others)


def test_rows_run_together_by_the_reference_change_bits(trained: Trained, monkeypatch: Patch) -> None:
    models, text = trained
    monkeypatch.setattr("dovetail.engine.steps.runner.takes", lambda model: False)
    monkeypatch.setattr("dovetail.engine.steps.runner._single_rows", _groups)
    assert differing(models[torch.float32], [text[i * 97 :][: STEPS + 1 + 7 * i] for i in range(6)]) > 0


def last_rows_as_a_step(self: Runner, chunks: list[Chunk], wanted: list[int] | None = None) -> Tensor:
    """Without drafts the last token of a prompt goes the way of a step, and with them that of its prompt."""
    hidden = PROMPT(self, chunks)
    if wanted is None:
        return hidden
    lasts = [(chunk.tokens[-1], chunk.slot, chunk.range[-1]) for chunk in chunks]
    return self.step(*torch.tensor(lasts).T.contiguous())


@pytest.mark.skipif(not capability.has_bf16_instructions(), reason="prompts go the way of a step")
def test_a_last_token_that_goes_another_way_would_change_bits(trained: Trained, monkeypatch: Patch) -> None:
    models, text = trained
    monkeypatch.setattr(Runner, "prompt", last_rows_as_a_step)
    assert differing(models[torch.bfloat16], [text[i * 97 :][: STEPS + 1 + i] for i in range(8)]) > 8


def test_draws_from_a_generator_that_steps_share_differ(trained: Trained, monkeypatch: Patch) -> None:
    models, text = trained
    generator = torch.Generator().manual_seed(0)
    monkeypatch.setattr(drawing, "sample", lambda p, *place: int(torch.multinomial(p, 1, generator=generator)))
    plain, *others = completions(models[torch.float32], pieces(text, 6), SAMPLED)
    assert all(each != plain for each in others)
