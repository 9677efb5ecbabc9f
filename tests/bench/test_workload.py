"""Seeded requests are the same again, and their lengths, prefixes and arrivals are those asked for."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from dovetail.bench.workload import (
    FIRST_ID,
    Ruler,
    Workload,
    draw_requests,
    prompt_ids,
    prompt_text,
    read_trace,
    warm_up_requests,
)
from dovetail.config import validate


def test_the_same_seed_asks_the_same_and_another_does_not() -> None:
    workload = Workload(requests=20, input_tokens=(20, 60), shared_prefix=10, shared_share=0.5, rate=3.0)
    first, again = draw_requests(workload), draw_requests(workload)
    other = draw_requests(workload.model_copy(update={"seed": 1}))
    assert first == again != other
    assert [prompt_ids(each, 0, 500) for each in first] == [prompt_ids(each, 0, 500) for each in again]
    assert prompt_ids(first[0], 0, 500) != prompt_ids(first[0], 1, 500)


def test_lengths_and_the_shared_prefix() -> None:
    workload = Workload(requests=30, input_tokens=(40, 50), output_tokens=(8, 8), shared_prefix=16, shared_share=1 / 3)
    requests = draw_requests(workload)
    lengths = {each.input_tokens for each in requests}
    assert lengths <= set(range(40, 51)) and len(lengths) > 4
    assert {each.output_tokens for each in requests} == {8}
    sharing = [each for each in requests if each.shared_tokens]
    assert len(sharing) == 10 and {each.shared_tokens for each in sharing} == {16}
    prompts = {each.index: prompt_ids(each, 0, 300) for each in requests}
    assert all(len(prompts[each.index]) == each.input_tokens for each in requests)
    assert all(FIRST_ID <= token < 300 for prompt in prompts.values() for token in prompt)
    assert len({tuple(prompts[each.index][:16]) for each in sharing}) == 1
    assert len({tuple(prompt[:16]) for prompt in prompts.values()}) == 21
    assert len({tuple(prompt[16:]) for prompt in prompts.values()}) == 30


def test_prompts_of_words_have_about_the_tokens_asked_for() -> None:
    ruler = Ruler(tokens_per_word=2.0, tokens_around=5.0)
    requests = draw_requests(Workload(requests=4, input_tokens=(105, 105), shared_prefix=40))
    texts = [prompt_text(each, 0, ruler) for each in requests]
    assert {len(text.split()) for text in texts} == {50}
    assert len({tuple(text.split()[:20]) for text in texts}) == 1 and len(set(texts)) == 4


def test_arrivals() -> None:
    many = Workload(requests=4000, rate=50.0)
    poisson, uniform, burst = (
        np.array([each.arrival for each in draw_requests(many.model_copy(update={"arrivals": kind}))])
        for kind in ("poisson", "uniform", "burst")
    )
    gaps = np.diff(poisson)
    assert poisson[0] == 0 and (gaps >= 0).all()
    # An exponential's mean and standard deviation are equal; of 4,000, means stray by 1/63 of that.
    assert abs(gaps.mean() * 50 - 1) < 4 / 63 and abs(gaps.std() * 50 - 1) < 6 / 63
    np.testing.assert_allclose(np.diff(uniform), 1 / 50)
    moments, counts = np.unique(burst, return_counts=True)
    assert set(counts) == {8} and moments[-1] == pytest.approx(3992 / 50)
    assert {each.arrival for each in draw_requests(Workload(requests=3))} == {None}


def test_a_trace_is_read_and_its_mistakes_named(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    line = '{"arrival": %s, "input_tokens": 9, "output_tokens": 2}\n'
    path.write_text(line % 2.5 + "\n" + line % 0.5)
    assert [(each.index, each.arrival, each.shared_tokens) for each in read_trace(path)] == [(0, 0.5, 0), (1, 2.5, 0)]
    for text, said in (
        ("", "holds no request"),
        ("{", "line 1: not valid JSON"),
        ("[1]", "line 1: not a JSON object"),
        (line % -1, "line 1: arrival = -1"),
        (line % 0 + '{"arrival": 0, "input": 9}', "line 2: unknown key 'input'; known: arrival, input_tokens"),
        (
            '{"arrival": 0, "input_tokens": 4, "output_tokens": 1, "shared_tokens": 4}',
            "shared_tokens 4 has to be",
        ),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=said):
            read_trace(path)


def test_mistakes_in_a_workload_are_one_line() -> None:
    for table, said in (
        ({"input_tokens": "many"}, "'many' is neither a number"),
        ({"output_tokens": "9:3"}, "9:3 has to go from 1"),
        ({"shared_prefix": 512}, "a shared prefix of 512 tokens leaves nothing"),
        ({"rate": 0}, "rate = 0"),
        ({"arrivals": "bursts"}, "arrivals = 'bursts'"),
    ):
        with pytest.raises(ValueError, match=said):
            validate(Workload, table, "here")


def test_prompts_that_warm_up_are_none_of_those_measured() -> None:
    requests = draw_requests(Workload(requests=3, input_tokens=(8, 8), shared_prefix=4))
    warm = warm_up_requests(requests, 5)
    assert len(warm) == 5 and {each.shared_tokens for each in warm} == {0}
    prompts = [tuple(prompt_ids(each, 0, 400)) for each in [*requests, *warm]]
    assert len({prompt[:4] for prompt in prompts}) == 6 and len(set(prompts)) == 8
