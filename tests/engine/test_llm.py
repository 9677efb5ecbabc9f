import itertools
import json

import pytest
import torch

from dovetail.engine import core, loaded
from dovetail.engine import llm as engine
from dovetail.engine.llm import LLM
from dovetail.engine.sampler import SamplingParams
from dovetail.engine.sequence import Sequence
from dovetail.engine.steps.rows import Short
from dovetail.engine.steps.runner import Runner
from dovetail.model.checkpoint.weights import export_hf
from dovetail.text.tokenizer import Tokenizer

PROMPTS = [[1, 2, 3], [4] * 11, [5, 6], [7, 8, 9, 10, 11], [12]]
GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
SAMPLED = SamplingParams(max_tokens=12, seed=3, top_p=0.95, ignore_eos=True)


@pytest.fixture(scope="module")
def llm(engine_spec, engine_model):
    spec = engine_spec()
    return LLM(engine_model(spec, seed=1), spec)


@pytest.fixture(scope="module")
def texts(engine_spec, engine_model):
    """An LLM with a tokenizer of single bytes, whose random model says all kinds of them."""
    tokenizer = Tokenizer.train([], 261)
    spec = engine_spec(vocab_size=261, eos_token_id=1)
    return LLM(engine_model(spec, seed=1), spec, tokenizer)


def seeded(params, count):
    """What prompts of one call draw with."""
    return [params.model_copy(update={"seed": params.seed + i}) for i in range(count)]


@pytest.mark.parametrize("params", [GREEDY, SAMPLED])
@pytest.mark.parametrize("speculate", [0, 2])
def test_a_completion_does_not_depend_on_its_batch(llm, monkeypatch, params, speculate):
    each = seeded(params, len(PROMPTS))
    together = llm.generate(PROMPTS, params, speculate)
    alone = [llm.generate([prompt], mine, speculate)[0] for prompt, mine in zip(PROMPTS, each, strict=True)]
    monkeypatch.setattr(engine, "MAX_BATCH", 2)
    few_slots = llm.generate(PROMPTS[::-1], each[::-1], speculate)[::-1]
    assert [c.token_ids for c in together] == [c.token_ids for c in alone]
    assert [c.token_ids for c in together] == [c.token_ids for c in few_slots]


def test_equal_prompts_draw_with_one_seed_after_another(llm):
    together = [c.token_ids for c in llm.generate([PROMPTS[0]] * 4, SAMPLED)]
    assert len(set(map(tuple, together))) == 4
    alone = [llm.generate([PROMPTS[0]], params)[0].token_ids for params in seeded(SAMPLED, 4)]
    assert together == alone == [c.token_ids for c in llm.generate([PROMPTS[0]] * 4, seeded(SAMPLED, 4))]
    assert len({tuple(c.token_ids) for c in llm.generate([PROMPTS[0]] * 2, [SAMPLED] * 2)}) == 1
    largest = SAMPLED.model_copy(update={"seed": 2**63 - 1})
    assert (
        llm.generate([PROMPTS[0]] * 2, largest)[1].token_ids
        == llm.generate([PROMPTS[0]], SAMPLED.model_copy(update={"seed": 0}))[0].token_ids
    )


def test_params_of_each_prompt(llm):
    each = [GREEDY.model_copy(update={"max_tokens": n}) for n in (1, 5, 12)]
    completions = llm.generate([PROMPTS[0]] * 3, each)
    assert [len(c.token_ids) for c in completions] == [1, 5, 12]
    assert completions[2].token_ids[:5] == completions[1].token_ids


@pytest.mark.parametrize("speculate", [0, 1, 2])
def test_eos_ends_a_sequence_and_max_tokens_another(llm, speculate):
    plain = llm.generate(PROMPTS, GREEDY)
    eos = plain[1].token_ids[4]
    stopping = LLM(llm.model, llm.spec.model_copy(update={"eos_token_id": eos}))
    completions = stopping.generate(PROMPTS, GREEDY.model_copy(update={"ignore_eos": False}), speculate)
    for before, after in zip(plain, completions, strict=True):
        is_in = eos in before.token_ids
        end = before.token_ids.index(eos) + 1 if is_in else 12
        assert after.token_ids == before.token_ids[:end]
        assert after.finish_reason == ("stop" if is_in else "length")
    assert {c.finish_reason for c in completions} == {"stop", "length"}
    assert [c.token_ids for c in stopping.generate(PROMPTS, GREEDY, speculate)] == [c.token_ids for c in plain]


@pytest.mark.parametrize("speculate", [0, 2])
def test_the_context_ends_at_max_position_embeddings(llm, speculate):
    params = GREEDY.model_copy(update={"max_tokens": 1000})
    prompts = [[3] * 120, [3] * 127]
    completions = llm.generate(prompts, params, speculate)
    assert [len(c.token_ids) for c in completions] == [8, 1]
    assert [c.finish_reason for c in completions] == ["length", "length"]
    assert [c.prompt_tokens for c in completions] == [120, 127]


def test_statistics(llm):
    plain, drafted = (llm.generate(PROMPTS[:2], GREEDY, speculate)[0].statistics for speculate in (0, 2))
    assert (plain.drafted, plain.accepted, plain.steps, plain.acceptance) == (0, 0, 11, 0)
    assert drafted.drafted == 2 * drafted.steps
    assert 0 <= drafted.accepted <= drafted.drafted
    assert drafted.prefill_seconds > 0
    assert drafted.decode_seconds > 0


def test_no_prompts(llm):
    assert llm.generate([], GREEDY) == []


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([[1], []], "prompt 1 is empty"),
        ([[1] * 128], "prompt 0 has 128 tokens; max_position_embeddings = 128"),
        ([[1, 64]], "prompt 0: 64 at position 1 is not a token; vocab_size = 64"),
        ([[-1]], "prompt 0: -1 at position 0"),
        (["text"], "prompt 0 is text, which needs a tokenizer"),
        ("text", "give a list of prompts"),
    ],
)
def test_prompts_are_checked(llm, prompts, message):
    with pytest.raises(ValueError, match=message):
        llm.generate(prompts, GREEDY)


def test_other_mistakes_are_named(llm):
    with pytest.raises(ValueError, match="2 prompts but 1 params"):
        llm.generate(PROMPTS[:2], [GREEDY])
    with pytest.raises(ValueError, match="stop strings need a tokenizer"):
        llm.generate(PROMPTS[:1], SamplingParams(stop=["a"]))
    with pytest.raises(ValueError, match="stream gives text"):
        llm.stream([1, 2], GREEDY)


def test_text_prompts_begin_as_documents_do(texts):
    completions = texts.generate(["ab", [0, *texts.tokenizer.encode("ab")]], GREEDY)
    assert completions[0].token_ids == completions[1].token_ids
    assert completions[0].prompt_tokens == 3
    assert completions[0].text == texts.tokenizer.decode(completions[0].token_ids)


@pytest.mark.parametrize("speculate", [0, 2])
@pytest.mark.parametrize("params", [GREEDY, SAMPLED])
def test_stream_is_generate_in_parts(texts, params, speculate):
    params = params.model_copy(update={"max_tokens": 40})
    whole = texts.generate(["ab"], params, speculate)[0]
    parts = list(texts.stream("ab", params, speculate))
    assert "".join(parts) == whole.text
    assert len(parts) > 5
    assert "" not in parts


@pytest.mark.parametrize("speculate", [0, 2])
def test_stop_strings_end_text_and_sequence(texts, speculate):
    params = GREEDY.model_copy(update={"max_tokens": 40})
    whole = texts.generate(["ab"], params)[0]
    stop = next(whole.text[i : i + 2] for i in range(10, 30) if "\ufffd" not in whole.text[i : i + 2])
    params = params.model_copy(update={"stop": ("nowhere", stop)})
    completion = texts.generate(["ab"], params, speculate)[0]
    assert completion.text == whole.text[: whole.text.index(stop)]
    assert completion.finish_reason == "stop"
    assert completion.token_ids == whole.token_ids[: len(completion.token_ids)]
    assert texts.tokenizer.decode(completion.token_ids).endswith(stop)
    assert "".join(texts.stream("ab", params, speculate)) == completion.text


def test_an_abandoned_stream_and_an_error_leave_nothing_behind(texts, monkeypatch):
    prompts = ["ab", "c", "def"]
    before = [c.token_ids for c in texts.generate(prompts, GREEDY, speculate=2)]
    abandoned = texts.stream("ab", GREEDY, speculate=2)
    next(abandoned)
    abandoned.close()
    left_open = texts.stream("ab", GREEDY)
    first = next(left_open)
    extend = Sequence.extend

    def fail_on_one(sequence, *drawn):
        if sequence.prompt_tokens == 2 and sequence.completion_tokens > 3:
            raise RuntimeError("one sequence fails")
        return extend(sequence, *drawn)

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="one sequence fails"):
        patch.setattr(Sequence, "extend", fail_on_one)
        texts.generate(prompts, GREEDY, speculate=2)
    assert [c.token_ids for c in texts.generate(prompts, GREEDY, speculate=2)] == before
    assert first + "".join(left_open) == texts.generate(["ab"], GREEDY)[0].text


@pytest.mark.parametrize("speculate", [0, 2])
def test_compiling_is_in_no_completions_seconds(engine_spec, engine_model, monkeypatch, speculate):
    """Each part of the engine, with short rows and without, takes an hour when it is first run."""
    clock = itertools.count()
    seen, passed = set(), [0]

    def slow_at_first(name, method):
        def run(*arguments):
            part = (name, *(bool(each.tokens) for each in arguments if isinstance(each, Short)))
            passed[0] += 3600 * (part not in seen)
            seen.add(part)
            return method(*arguments)

        return run

    for name in ("run", "draft", "logits"):
        monkeypatch.setattr(Runner, name, slow_at_first(name, getattr(Runner, name)))
    monkeypatch.setattr(core.time, "perf_counter", lambda: passed[0] + next(clock))
    spec = engine_spec()
    statistics = LLM(engine_model(spec), spec).generate([[1], [2, 3, 4]], GREEDY, speculate)[0].statistics
    assert passed[0] == (3 if speculate == 0 else 5) * 3600
    assert 0 < statistics.prefill_seconds < 3600 > statistics.decode_seconds > 0


def test_errors_of_stream_come_with_the_call(texts):
    with pytest.raises(ValueError, match="not a token"):
        texts.stream([400], GREEDY)


def test_load_a_checkpoint(texts, tmp_path):
    texts.tokenizer.save(tmp_path)
    export_hf(texts.model, texts.spec, tmp_path / "model", tokenizer_files=tmp_path.glob("*.json"))
    again = LLM.load(tmp_path / "model", dtype=torch.float32)
    before, after = (each.generate(["def "], GREEDY, speculate=1)[0] for each in (texts, again))
    assert after.token_ids == before.token_ids
    assert after.text == before.text


def test_bfloat16(texts, tmp_path):
    texts.tokenizer.save(tmp_path)
    export_hf(texts.model, texts.spec, tmp_path / "model", tokenizer_files=tmp_path.glob("*.json"))
    again = LLM.load(tmp_path / "model", dtype=torch.bfloat16)
    assert len(again.generate(["def "], GREEDY, speculate=2)[0].token_ids) == 12


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("fused", [True, False])
def test_rows_beyond_the_tokenizer_are_never_drawn(engine_spec, engine_model, monkeypatch, tied, fused):
    """As in published models, whose vocabulary is padded: the model would say nothing else."""
    spec = engine_spec(vocab_size=272, eos_token_id=1, tie_word_embeddings=tied)
    model = engine_model(spec, seed=1)
    with torch.no_grad():
        model.head_weight[261:] = 40 * model.head_weight[100:111]
    if not fused:
        monkeypatch.setattr("dovetail.engine.steps.runner.takes", lambda model: False)
    llm = LLM(model, spec, Tokenizer.train([], 261))
    assert max(LLM(model, spec).generate([[0, 5]], GREEDY)[0].token_ids) >= 261
    for params in (GREEDY, SAMPLED):
        for speculate in (0, 2):
            completion = llm.generate(["ab"], params, speculate)[0]
            assert max(completion.token_ids) < 261 and len(completion.token_ids) == 12
            assert completion.text == llm.tokenizer.decode(completion.token_ids)
    plain, drafted = (llm.generate(["ab"], GREEDY, speculate)[0].token_ids for speculate in (0, 2))
    assert plain == drafted
    assert llm.model is model and len(model.head_weight) == 272  # the caller's is as it was


def test_an_end_token_beyond_the_tokenizer_can_be_drawn_and_is_no_text(engine_spec, engine_model):
    spec = engine_spec(vocab_size=272, eos_token_id=265)
    model = engine_model(spec, seed=1)
    with torch.no_grad():
        model.head_weight[265] = 40 * model.head_weight[100]
    llm = LLM(model, spec, Tokenizer.train([], 261))
    completion = llm.generate(["ab"], GREEDY)[0]
    assert 265 in completion.token_ids and "265" not in completion.text
    stopped = llm.generate(["ab"], GREEDY.model_copy(update={"ignore_eos": False}))[0]
    assert stopped.token_ids[-1] == 265 and stopped.finish_reason == "stop"


def test_a_tokenizer_with_more_ids_than_the_model_is_refused_before_weights_are_read(texts, tmp_path, monkeypatch):
    message = "the tokenizer has 300 ids and the model vocab_size = 261"
    larger = Tokenizer.train(["abc abd abe " * 9, *(f"xyz{i}" for i in range(99))], 300)
    with pytest.raises(ValueError, match=message):
        LLM(texts.model, texts.spec, larger)
    larger.save(tmp_path)
    export_hf(texts.model, texts.spec, tmp_path / "model", tokenizer_files=tmp_path.glob("*.json"))
    monkeypatch.setattr(loaded, "import_hf", lambda *arguments, **named: pytest.fail("weights were read"))
    with pytest.raises(ValueError, match=message):
        LLM.load(tmp_path / "model")


@pytest.mark.parametrize("speculate", [0, 2])
def test_any_end_token_of_either_file_stops(texts, tmp_path, speculate):
    whole = texts.generate(["ab"], GREEDY)[0].token_ids
    kinds = list(dict.fromkeys(whole))
    texts.tokenizer.save(tmp_path)
    spec = texts.spec.model_copy(update={"eos_token_id": (1, kinds[5])})
    export_hf(texts.model, spec, tmp_path / "model", tokenizer_files=tmp_path.glob("*.json"))
    params = GREEDY.model_copy(update={"ignore_eos": False})

    def stopped() -> list[int]:
        return LLM.load(tmp_path / "model", dtype=torch.float32).generate(["ab"], params, speculate)[0].token_ids

    file = tmp_path / "model" / "generation_config.json"
    assert json.loads(file.read_text())["eos_token_id"] == [1, kinds[5]]
    assert stopped() == whole[: whole.index(kinds[5]) + 1]
    file.write_text(json.dumps({"eos_token_id": [2, kinds[3]]}))
    assert stopped() == whole[: whole.index(kinds[3]) + 1]
    file.write_text(json.dumps({"eos_token_id": 261}))
    with pytest.raises(ValueError, match="generation_config.json: eos_token_id = 261 is not a token: vocab_size = 261"):
        stopped()


@pytest.mark.parametrize(("has_bf16", "dtype"), [(True, torch.bfloat16), (False, torch.float32)])
def test_weights_are_in_what_the_cpu_multiplies(texts, tmp_path, monkeypatch, has_bf16, dtype):
    texts.tokenizer.save(tmp_path)
    export_hf(texts.model, texts.spec, tmp_path / "model", tokenizer_files=tmp_path.glob("*.json"))
    monkeypatch.setattr(loaded.capability, "has_bf16_instructions", lambda: has_bf16)
    assert LLM.load(tmp_path / "model", device="cpu").model.embed_tokens.weight.dtype == dtype
    assert LLM.load(tmp_path / "model", torch.float32, "cpu").model.embed_tokens.weight.dtype == torch.float32
    assert loaded.fastest_dtype(torch.device("cuda")) == torch.bfloat16
