import math

import pytest
import torch
from transformers.generation.logits_process import RepetitionPenaltyLogitsProcessor

from dovetail.engine import drawing, speculative
from dovetail.engine.drawing import draw_all, pick
from dovetail.engine.llm import LLM
from dovetail.engine.sampler import SamplingParams, probabilities, sample
from dovetail.engine.sequence import Sequence
from dovetail.engine.steps.cache import contiguous_cache
from dovetail.engine.steps.rows import Chunk
from dovetail.engine.steps.runner import Runner
from dovetail.engine.stream import Token

ERROR_RATE = 1e-6  # chance that a right sampler fails one of the chi-square tests
GREEDY = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
VOCAB = 4


def sequence_of(tokens, params, slot=0):
    return Sequence(
        tokens=list(tokens),
        prompt_tokens=len(tokens),
        max_tokens=99,
        params=params,
        end_tokens=frozenset(),
        text=None,
        slot=slot,
    )


def drawn_ids(logits, sequence, drafts):
    """Tokens of logits [D + 1, V] for one sequence, and how many were drafts."""
    [drawn] = draw_all(logits[None], [sequence], [list(drafts)], None)
    return [each.id for each in drawn], len(drawn) - 1


def pairs(decide, params, count=2000):
    """How often each pair of first tokens [V, V] comes out, by seed, and how often it should.

    One draft per step; the main model's logits for the second token depend on the first.
    """
    generator = torch.Generator().manual_seed(7)
    first, drafter = torch.randn(2, VOCAB, generator=generator)
    second = torch.randn(VOCAB, VOCAB, generator=generator)
    counts = torch.zeros(VOCAB, VOCAB)
    for seed in range(count):
        sequence = sequence_of([0], params.model_copy(update={"seed": seed}))
        draft = pick(2 * drafter, int(drafter.argmax()), sequence, [])
        emitted, _ = decide(torch.stack((first, second[draft])), sequence, [draft])
        if len(emitted) == 1:
            sequence.tokens.append(emitted[0])
            emitted.append(pick(second[emitted[0]], -1, sequence, []))
        counts[emitted[0], emitted[1]] += 1
    return counts, probabilities(first, params)[:, None] * probabilities(second, params) * count


def accept_always(logits, sequence, drafts):
    return [*drafts, pick(logits[-1], -1, sequence, drafts)], 1


def resample_from_target(logits, sequence, drafts):
    """What was drawn where the draft was rejected comes from another race, so that two have a chance to win."""
    emitted, kept = drawn_ids(logits, sequence, drafts)
    if kept:
        return emitted, kept
    return [sample(probabilities(logits[0], sequence.params), sequence.params.seed, 10**6)], 0


@pytest.mark.parametrize("params", [SamplingParams(), SamplingParams(temperature=0.7, top_k=3, min_p=0.1)])
def test_steps_with_drafts_have_the_targets_distribution(params, p_value):
    assert p_value(*pairs(drawn_ids, params)) > ERROR_RATE


@pytest.mark.parametrize("wrong", [accept_always, resample_from_target])
def test_wrong_acceptance_rules_fail_the_same_test(wrong, p_value):
    assert p_value(*pairs(wrong, SamplingParams())) < ERROR_RATE


def test_one_race_for_two_positions_fails_the_same_test(p_value, monkeypatch):
    monkeypatch.setattr(drawing, "sample", lambda distribution, seed, position: sample(distribution, seed, 0))
    assert p_value(*pairs(drawn_ids, SamplingParams())) < ERROR_RATE


def test_drafts_agree_as_often_as_two_races_with_the_same_numbers():
    """Token i wins both with probability 1 / sum_j max(p_j / p_i, q_j / q_i): at least (1 - d) / (1 + d) in all."""
    p, q = torch.randn(2, 6, generator=torch.Generator().manual_seed(3)).softmax(dim=-1)
    ratios = torch.maximum(p / p[:, None], q / q[:, None])
    expected, distance, count = float((1 / ratios.sum(dim=1)).sum()), float((p - q).abs().sum() / 2), 4000
    assert (1 - distance) / (1 + distance) <= expected < 1 - distance
    agreed = sum(sample(p, seed, 5) == sample(q, seed, 5) for seed in range(count))
    assert abs(agreed - count * expected) < 5 * (count * expected * (1 - expected)) ** 0.5  # wrong once in 2 million


def test_drafts_are_kept_where_draft_and_target_agree():
    logits = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
    for seed in range(50):
        sequence, drafts = sequence_of([1, 2], SamplingParams(seed=seed)), []
        for row in logits[:2]:
            drafts.append(pick(row, -1, sequence, drafts))
        emitted, kept = drawn_ids(logits, sequence, drafts)
        assert len(emitted) == 3 and kept == 2
        assert emitted[:2] == drafts


def test_what_the_target_excludes_is_never_kept():
    logits = torch.tensor([[0.0, 0.0, float("-inf")], [0.0, 0.0, 0.0]])
    for seed in range(20):
        emitted, kept = drawn_ids(logits, sequence_of([1], SamplingParams(seed=seed)), [2])
        assert len(emitted) == 1 and kept == 0
        assert emitted[0] in (0, 1)


def test_greedy_acceptance_stops_at_the_first_difference():
    logits = torch.eye(5)[[3, 1, 4]]
    for drafts, expected in (([3, 1], [3, 1, 4]), ([3, 2], [3, 1]), ([0, 1], [3])):
        emitted, kept = drawn_ids(logits, sequence_of([0], SamplingParams(temperature=0)), drafts)
        assert emitted == expected and kept == len(expected) - 1


def grown(model, prompt, count, params, depth):
    """`count` sequences that have one prompt and seeds of their own, with their first token (one prompt, copied)."""
    spec = model.spec
    runner = Runner(model, contiguous_cache(spec, count, len(prompt) + 2 * depth + 2, torch.float32))
    sequences = [sequence_of(prompt, params.model_copy(update={"seed": slot}), slot) for slot in range(count)]
    chunks = [Chunk(0, 0, prompt)]
    hidden = runner.prompt(chunks)
    speculative.fill_prompts(runner, sequences[:1], chunks, hidden, depth)
    runner.cache.data[:] = runner.cache.data[:, :1].clone()
    logits = runner.logits(hidden[-1])
    for sequence in sequences:
        sequence.hidden = sequences[0].hidden
        token = pick(logits, int(logits.argmax()), sequence, [])
        sequence.extend([Token(id=token)])
    return runner, sequences


def step(runner, sequences, depth):
    drafts = speculative.draft(runner, sequences, depth)
    hidden = runner.run(speculative.rows_of(sequences, drafts), [])
    return speculative.conclude(runner, sequences, drafts, hidden, None)


def their_distribution(logits, params, prompt, generated):
    """Of the token after `generated`: transformers' penalty, and those of OpenAI's manual."""
    penalty = RepetitionPenaltyLogitsProcessor(params.repetition_penalty)
    logits = penalty(torch.tensor([[*prompt, *generated]]), logits[None].clone())[0]
    for token in set(generated):
        logits[token] -= params.presence_penalty + params.frequency_penalty * generated.count(token)
    return probabilities(logits, params)


PENALTIES = {"repetition_penalty": 1.7, "presence_penalty": 1.0, "frequency_penalty": 1.5}
CHOOSY = SamplingParams(temperature=1.5, top_p=0.9, top_k=5, **PENALTIES)


def same_race_at_all_positions(patch):
    patch.setattr(drawing, "sample", lambda distribution, seed, position: sample(distribution, seed, 0))


def penalties_forget_the_draft(patch):
    changed = drawing.changed
    patch.setattr(drawing, "changed", lambda logits, sequence, drafts: changed(logits, sequence, []))


def nothing(patch):
    pass


@pytest.mark.parametrize(
    ("depth", "params", "wrong"),
    [
        (1, SamplingParams(temperature=1.5), nothing),
        (2, SamplingParams(temperature=1.5), nothing),
        (1, CHOOSY, nothing),
        (2, CHOOSY, nothing),
        (2, CHOOSY, same_race_at_all_positions),
        (2, CHOOSY, penalties_forget_the_draft),
    ],
)
def test_whole_steps_have_the_models_distribution(
    engine_spec, engine_model, p_value, monkeypatch, depth, params, wrong
):
    """Three completion tokens of 1500 sequences, as many as the steps gave, against the full forward."""
    spec = engine_spec(vocab_size=6, initializer_range=0.25)
    model, prompt, count = engine_model(spec, seed=4), [1, 2, 3, 4, 5, 0], 1500
    wrong(monkeypatch)
    runner, sequences = grown(model, prompt, count, params, depth)
    counts = torch.zeros(6, 6, 6)
    while growing := [sequence for sequence in sequences if sequence.completion_tokens < 3]:
        for sequence, drawn in zip(growing, step(runner, growing, depth), strict=True):
            sequence.extend(drawn)
    for sequence in sequences:
        counts[tuple(sequence.tokens[len(prompt) :][:3])] += 1
    with torch.no_grad():
        pairs_of = [[first, second] for first in range(6) for second in range(6)]
        hidden = model(torch.tensor([[*prompt, *pair] for pair in pairs_of])).hidden[:, -3:]
        logits = model.logits(hidden)
    expected = torch.zeros(6, 6, 6)
    for (first, second), rows in zip(pairs_of, logits, strict=True):
        one, two, three = (
            their_distribution(row, params, prompt, generated)
            for row, generated in zip(rows, ([], [first], [first, second]), strict=True)
        )
        expected[first, second] = one[first] * two[second] * three
    assert float(expected.sum()) == pytest.approx(1)
    assert (p_value(counts, expected * count) > ERROR_RATE) == (wrong is nothing)
    uniform = (expected > 0) * float(count) / float((expected > 0).sum())
    assert p_value(counts, uniform) < ERROR_RATE, "the test can tell distributions apart"


@pytest.mark.parametrize("depth", [1, 2])
def test_greedy_speculation_gives_the_greedy_tokens(engine_spec, engine_model, depth):
    spec = engine_spec(vocab_size=10)
    llm = LLM(engine_model(spec, seed=2), spec)
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(0, 10, (n,), generator=generator).tolist() for n in (1, 2, 5, 17)]
    plain = llm.generate(prompts, GREEDY)
    drafted = llm.generate(prompts, GREEDY, speculate=depth)
    assert [c.token_ids for c in drafted] == [c.token_ids for c in plain]
    assert len({tuple(c.token_ids) for c in plain}) == 4
    assert sum(c.statistics.accepted for c in drafted) > 0


@pytest.mark.parametrize("depth", [1, 2])
def test_greedy_speculation_with_perfect_drafts(periodic, depth):
    llm = LLM(periodic.model, periodic.model.spec)
    prompts = [periodic.run(0, 14), periodic.run(13, 30), periodic.run(5, 3)]
    drafted = llm.generate(prompts, GREEDY, speculate=depth)
    for prompt, completion in zip(prompts, drafted, strict=True):
        assert completion.token_ids == periodic.run(prompt[-1], 25)[1:]
    assert [c.statistics.steps for c in drafted[:2]] == [math.ceil(23 / (depth + 1))] * 2
    assert drafted[0].statistics.acceptance == pytest.approx(1, abs=0.07)  # the last step is cut at 24 tokens
    assert 0 < drafted[2].statistics.acceptance < 1


def test_depth_is_checked(engine_spec, engine_model):
    spec = engine_spec(num_nextn_predict_layers=1)
    llm = LLM(engine_model(spec), spec)
    with pytest.raises(ValueError, match=r"speculate = 2 .* 1 MTP modules .* speculate <= 1"):
        llm.generate([[1, 2]], GREEDY, speculate=2)
    with pytest.raises(ValueError, match="speculate = -1"):
        llm.generate([[1, 2]], GREEDY, speculate=-1)
