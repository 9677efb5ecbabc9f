import math

import pytest
import torch

from dovetail.engine import speculative
from dovetail.engine.llm import LLM
from dovetail.engine.sampler import SamplingParams, probabilities, sample
from dovetail.engine.sequence import Sequence
from dovetail.engine.speculative import Draft, accept
from dovetail.engine.steps.cache import contiguous_cache
from dovetail.engine.steps.runner import Runner

ERROR_RATE = 1e-6  # chance that a right sampler fails one of the chi-square tests
GREEDY = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)


def p_value(counts, expected):
    """Chance of a deviation at least this large; Pearson's chi-square, cells of under 5 expected put together."""
    counts, expected = counts.double().flatten(), expected.double().flatten()
    is_small = expected < 5
    if bool(is_small.any()):
        counts = torch.cat((counts[~is_small], counts[is_small].sum()[None]))
        expected = torch.cat((expected[~is_small], expected[is_small].sum()[None]))
    expected = expected.clamp(min=1e-9)  # nothing expected and something seen is as wrong as can be
    statistic = ((counts - expected) ** 2 / expected).sum()
    return float(torch.special.gammaincc(torch.tensor((len(counts) - 1) / 2).double(), statistic / 2))


def pairs(decide, params, count=2000):
    """How often each pair of first tokens [V, V] comes out, and how often it should.

    One draft per step; the main model's logits for the second token depend on the first.
    """
    generator = torch.Generator().manual_seed(7)
    vocab = 4
    first, drafter = torch.randn(2, vocab, generator=generator)
    second = torch.randn(vocab, vocab, generator=generator)
    drawn_from = probabilities(drafter * 2, params)
    counts = torch.zeros(vocab, vocab)
    for _ in range(count):
        token = sample(drawn_from, generator)
        proposal = Draft(tokens=[token], distributions=[drawn_from])
        emitted = decide(torch.stack((first, second[token])), proposal, params, generator)
        if len(emitted) == 1:
            emitted.append(sample(probabilities(second[emitted[0]], params), generator))
        counts[emitted[0], emitted[1]] += 1
    return counts, probabilities(first, params)[:, None] * probabilities(second, params) * count


def accept_always(logits, proposal, params, generator):
    return [*proposal.tokens, sample(probabilities(logits[-1], params), generator)]


def resample_from_target(logits, proposal, params, generator):
    emitted = accept(logits, proposal, params, generator)
    return [sample(probabilities(logits[0], params), generator)] if len(emitted) == 1 else emitted


@pytest.mark.parametrize("params", [SamplingParams(), SamplingParams(temperature=0.7, top_k=3, min_p=0.1)])
def test_rejection_sampling_has_the_targets_distribution(params):
    assert p_value(*pairs(accept, params)) > ERROR_RATE


@pytest.mark.parametrize("wrong", [accept_always, resample_from_target])
def test_wrong_acceptance_rules_fail_the_same_test(wrong):
    assert p_value(*pairs(wrong, SamplingParams())) < ERROR_RATE


def test_accept_keeps_drafts_where_draft_and_target_agree():
    logits = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
    params, generator = SamplingParams(), torch.Generator().manual_seed(0)
    distributions = list(probabilities(logits[:2], params))
    for _ in range(50):
        tokens = [sample(q, generator) for q in distributions]
        emitted = accept(logits, Draft(tokens=tokens, distributions=distributions), params, generator)
        assert len(emitted) == 3
        assert emitted[:2] == tokens


def test_accept_never_keeps_what_the_target_excludes():
    logits = torch.tensor([[0.0, 0.0, float("-inf")], [0.0, 0.0, 0.0]])
    drawn_from = torch.tensor([0.0, 0.0, 1.0])
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        emitted = accept(logits, Draft(tokens=[2], distributions=[drawn_from]), SamplingParams(), generator)
        assert len(emitted) == 1
        assert emitted[0] in (0, 1)


def test_greedy_acceptance_stops_at_the_first_difference():
    logits = torch.eye(5)[[3, 1, 4]]
    for drafts, expected in (([3, 1], [3, 1, 4]), ([3, 2], [3, 1]), ([0, 1], [3])):
        emitted = accept(logits, Draft(tokens=drafts), SamplingParams(temperature=0), torch.Generator())
        assert emitted == expected


def grown(model, prompt, count, params, depth):
    """`count` sequences that have one prompt and seeds of their own, all prefilled (once, then copied)."""
    spec = model.spec
    runner = Runner(model, contiguous_cache(spec, count, len(prompt) + 2 * depth + 2, torch.float32))
    sequences = []
    for slot in range(count):
        sequences.append(
            Sequence(
                tokens=list(prompt),
                prompt_tokens=len(prompt),
                max_tokens=99,
                params=params,
                end_tokens=frozenset(),
                text=None,
                generator=torch.Generator().manual_seed(slot),
                slot=slot,
            )
        )
    hidden = runner.prefill(0, torch.tensor(prompt))
    speculative.fill_prompt(runner, sequences[0], hidden, depth)
    runner.cache.data[:] = runner.cache.data[:, :1].clone()
    distribution = probabilities(runner.logits(hidden[-1]), params)
    for sequence in sequences:
        sequence.hidden = sequences[0].hidden
        sequence.tokens.append(sample(distribution, sequence.generator))
    return runner, sequences


@pytest.mark.parametrize("depth", [1, 2])
def test_whole_steps_have_the_models_distribution(engine_spec, engine_model, depth):
    """The first two completion tokens of 1500 sequences, against the full forward."""
    spec = engine_spec(vocab_size=6, initializer_range=0.25)
    model, params, prompt, count = engine_model(spec, seed=4), SamplingParams(temperature=1.5), [1, 2, 3, 4, 5, 0], 1500
    runner, sequences = grown(model, prompt, count, params, depth)
    counts = torch.zeros(6, 6)
    for sequence, tokens in zip(sequences, speculative.step(runner, sequences, depth), strict=True):
        counts[sequence.tokens[-1], tokens[0]] += 1
    with torch.no_grad():
        tokens = torch.tensor([[*prompt, first] for first in range(6)])
        both = probabilities(model.logits(model(tokens).hidden[:, -2:]), params)
    expected = both[0, 0][:, None] * both[:, 1]
    assert p_value(counts, expected * count) > ERROR_RATE
    assert p_value(counts, torch.full_like(expected, count / 36)) < ERROR_RATE, "the test can tell distributions apart"


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
