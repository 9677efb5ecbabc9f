import math
import random

import pytest
import torch
from pydantic import ValidationError
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from dovetail.engine.sampler import SamplingParams, probabilities, sample
from dovetail.numerics.formats import errors

ERROR_RATE = 1e-6  # chance that a right sampler fails one of the chi-square tests


def warped(logits, params):
    """The same by transformers' warpers, in the order in which its `generate` applies them."""
    warpers = LogitsProcessorList([TemperatureLogitsWarper(params.temperature)])
    if params.top_k:
        warpers.append(TopKLogitsWarper(params.top_k))
    if params.top_p < 1:
        warpers.append(TopPLogitsWarper(params.top_p))
    if params.min_p > 0:
        warpers.append(MinPLogitsWarper(params.min_p))
    return warpers(None, logits.clone()).softmax(dim=-1)


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
@pytest.mark.parametrize("top_k", [0, 1, 20, 1000])
@pytest.mark.parametrize("top_p", [1.0, 0.9, 0.2])
@pytest.mark.parametrize("min_p", [0.0, 0.1])
def test_filters_equal_those_of_transformers(temperature, top_k, top_p, min_p):
    params = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    logits = 3 * torch.randn(5, 100, generator=torch.Generator().manual_seed(3))
    ours, theirs = probabilities(logits, params), warped(logits, params)
    assert torch.equal(ours > 0, theirs > 0)
    # An exponential of 2 units, sums of 100 terms, and on our side up to three divisions more.
    assert errors.elementwise_error(ours, theirs) <= errors.tolerance(torch.float32, roundings=12, terms=100)


def test_min_p_before_top_p_would_differ():
    """The order matters: without the small tokens the large one alone reaches top_p."""
    params = SamplingParams(top_p=0.6, min_p=0.5)
    logits = torch.tensor([0.55, 0.3, 0.15]).log()
    assert probabilities(logits, params)[1] == pytest.approx(0.3 / 0.85)
    first = probabilities(logits, params.model_copy(update={"top_p": 1.0}))
    assert probabilities(first.log(), params.model_copy(update={"min_p": 0.0}))[1] == 0


def test_greedy_is_the_lowest_of_the_best():
    distribution = probabilities(torch.tensor([1.0, 4.0, 4.0, 0.0]), SamplingParams(temperature=0))
    assert distribution.tolist() == [0, 1, 0, 0]


def test_ties_at_the_edge_go_to_lower_ids():
    assert probabilities(torch.zeros(4), SamplingParams(top_k=2)).tolist() == [0.5, 0.5, 0, 0]
    assert probabilities(torch.zeros(4), SamplingParams(top_p=0.5)).tolist() == [0.5, 0.5, 0, 0]


def test_extreme_logits():
    for params in (SamplingParams(temperature=1e-4, top_p=0.9), SamplingParams(top_k=2, min_p=1.0)):
        distribution = probabilities(torch.tensor([1e4, 0.0, -1e30, float("-inf")]), params)
        assert distribution.tolist() == [1, 0, 0, 0]


SKEWED = torch.tensor([0.0, 3.0, -1.0, 1.5, float("-inf"), 0.3, 2.0, -4.0])
FILTERED = SamplingParams(temperature=1.3, top_k=6, top_p=0.95)


def places(count):
    """Seeds and positions: many positions of one seed, many seeds at one position, both, and large ones."""
    root = math.isqrt(count)
    yield [(5, position) for position in range(count)]
    yield [(seed, 3) for seed in range(count)]
    yield [(seed, position) for seed in range(root) for position in range(root)]
    yield [(2**63 - 1 - seed, 2**30 + seed) for seed in range(count)]


@pytest.mark.parametrize("params", [SamplingParams(), FILTERED])
@pytest.mark.parametrize("which", range(4))
def test_draws_have_the_distribution(params, which, p_value):
    distribution = probabilities(SKEWED, params)
    seen = list(places(4096))[which]
    counts = torch.zeros(len(SKEWED))
    for seed, position in seen:
        counts[sample(distribution, seed, position)] += 1
    assert p_value(counts, distribution * len(seen)) > ERROR_RATE


@pytest.mark.parametrize("step", [(1, 0), (0, 1), (1, 1), (1, -1)])
def test_draws_of_neighbouring_seeds_and_positions_are_independent(step, p_value):
    distribution = probabilities(SKEWED, FILTERED)
    counts = torch.zeros(len(SKEWED), len(SKEWED))
    for number in range(4096):
        seed, position = 10**6 + 2 * number, 10**4
        counts[sample(distribution, seed, position), sample(distribution, seed + step[0], position + step[1])] += 1
    assert p_value(counts, distribution[:, None] * distribution * 4096) > ERROR_RATE


def first_with(times):
    """A race in which token i arrives at times(u_i, p_i)."""

    def draw(distribution, seed, position):
        numbers = random.Random(seed * 10**6 + position)
        u = torch.tensor([numbers.random() for _ in distribution], dtype=torch.float64)
        return int(times(u, distribution.double()).masked_fill(distribution == 0, math.inf).argmin())

    return draw


@pytest.mark.parametrize(
    ("times", "is_right"),
    [
        (lambda u, p: -u.log() / p, True),
        (lambda u, p: u / p, False),
        (lambda u, p: -u.log() * (1 - p), False),
        (lambda u, p: -u.log() - p.log(), False),
    ],
)
def test_other_races_have_another_distribution(times, is_right, p_value):
    distribution, draw = probabilities(SKEWED, SamplingParams()), first_with(times)
    counts = torch.zeros(len(SKEWED))
    for seed in range(4096):
        counts[draw(distribution, seed, 0)] += 1
    assert (p_value(counts, distribution * 4096) > ERROR_RATE) == is_right


def test_a_draw_is_a_function_of_seed_position_and_distribution():
    distribution = probabilities(SKEWED, SamplingParams())
    before = [sample(distribution, 7, position) for position in range(50)]
    torch.manual_seed(1)
    assert [sample(distribution, 7, position) for position in reversed(range(50))] == before[::-1]
    assert [sample(4 * distribution, 7, position) for position in range(50)] == before  # need not be normalised
    assert [sample(distribution, 8, position) for position in range(50)] != before


def test_what_has_probability_0_is_never_drawn():
    distribution = torch.tensor([0.0, 1e-30, 0.0, 1e-38, 0.0])
    assert {sample(distribution, seed, 0) for seed in range(200)} == {1}
    for token in range(5):
        alone = torch.zeros(5)
        alone[token] = 1
        assert sample(alone, 3, 4) == token


def test_logits_that_are_no_numbers_give_a_token_of_the_vocabulary():
    """A model may overflow, and -1 is the row before the first of its embedding."""
    logits = torch.full((4,), float("nan"))
    for params in (SamplingParams(), SamplingParams(temperature=0), SamplingParams(top_p=0.5, min_p=0.1)):
        assert 0 <= sample(probabilities(logits, params), 1, 2) < 4


def test_a_large_vocabulary(p_value):
    """Eighths of 100,000 tokens."""
    counts = torch.zeros(8)
    for seed in range(400):
        counts[sample(torch.full((100_000,), 1e-5), seed, 1) // 12_500] += 1
    assert p_value(counts, torch.full((8,), 50.0)) > ERROR_RATE


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -1},
        {"temperature": float("nan")},
        {"temperature": 1e-9},
        {"top_k": -1},
        {"top_p": 0},
        {"top_p": 1.1},
        {"min_p": -0.1},
        {"max_tokens": 0},
        {"stop": [""]},
        {"stop": "abc"},
        {"seed": -1},
        {"seed": 2**63},
        {"min_tokens": -1},
        {"min_tokens": 5, "max_tokens": 4},
        {"presence_penalty": 2.1},
        {"frequency_penalty": -2.1},
        {"repetition_penalty": 0},
        {"repetition_penalty": float("inf")},
        {"logit_bias": {3: 101}},
        {"logit_bias": {3: float("nan")}},
        {"logprobs": -1},
        {"prompt_logprobs": -1},
        {"topk": 1},
    ],
)
def test_params_are_checked(wrong):
    with pytest.raises(ValidationError):
        SamplingParams(**wrong)


def test_params_take_a_list_of_stop_strings():
    assert SamplingParams(stop=["a", "b"]).stop == ("a", "b")
