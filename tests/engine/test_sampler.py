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


def test_sample_inverts_the_cumulative_distribution():
    distribution = torch.tensor([0.0, 0.25, 0.0, 0.75, 0.0])
    generator, twin = torch.Generator().manual_seed(1), torch.Generator().manual_seed(1)
    for _ in range(200):
        expected = 1 if float(torch.rand((), generator=twin, dtype=torch.float64)) < 0.25 else 3
        assert sample(distribution, generator) == expected


def test_sample_at_the_ends(monkeypatch):
    distribution = torch.tensor([0.0, 0.1, 0.2, 0.0])
    monkeypatch.setattr("dovetail.engine.sampler.uniform", lambda generator: 0.0)
    assert sample(distribution, torch.Generator()) == 1
    monkeypatch.setattr("dovetail.engine.sampler.uniform", lambda generator: 1.0)  # as rounding might make it
    assert sample(distribution, torch.Generator()) == 2


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
        {"topk": 1},
    ],
)
def test_params_are_checked(wrong):
    with pytest.raises(ValidationError):
        SamplingParams(**wrong)


def test_params_take_a_list_of_stop_strings():
    assert SamplingParams(stop=["a", "b"]).stop == ("a", "b")
