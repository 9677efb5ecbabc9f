"""Greedy tokens and MTP drafts, step by step, against `generate` of transformers.

Its `generate(use_mtp=True)` takes one sequence and always drafts one token per module, so that depth is the
number of modules there. It finds the modules' weights in the checkpoint by a pattern that fits 61 layers only;
the test gives it the right one. It rotates MTP positions from i + 1 + k on, which changes no score.
"""

import pytest
import torch
from transformers import DeepseekV3ForCausalLM
from transformers.generation.candidate_generator import MTPCandidateGenerator

from dovetail.engine import speculative
from dovetail.engine.llm import LLM
from dovetail.engine.sampler import SamplingParams
from dovetail.model.checkpoint.weights import export_hf


def theirs(model, directory):
    export_hf(model, model.spec, directory)
    loaded = DeepseekV3ForCausalLM.from_pretrained(directory, dtype=torch.float32)
    layers = range(model.spec.num_hidden_layers, model.spec.num_hidden_layers + model.spec.num_nextn_predict_layers)
    loaded._keys_to_ignore_on_load_unexpected = [rf"model\.layers\.{layer}\." for layer in layers]
    return loaded


def their_steps(monkeypatch, loaded, prompt, max_tokens):
    """Tokens, and of each step its drafts and how many of them were accepted."""
    get_candidates, drafts, accepted = MTPCandidateGenerator.get_candidates, [], []

    def record(self, input_ids, **arguments):
        candidates, logits = get_candidates(self, input_ids, **arguments)
        if not arguments["is_first_iteration"]:
            drafts.append(candidates[0, input_ids.shape[1] :].tolist())
        return candidates, logits

    def count(self, input_ids, scores, num_matches):
        accepted.append(int(num_matches))

    monkeypatch.setattr(MTPCandidateGenerator, "get_candidates", record)
    monkeypatch.setattr(MTPCandidateGenerator, "update_candidate_strategy", count)
    output = loaded.generate(
        torch.tensor([prompt]), use_mtp=True, do_sample=False, max_new_tokens=max_tokens, eos_token_id=None
    )
    return output[0, len(prompt) :].tolist(), drafts, accepted[1:]  # the first "step" is the prompt


def our_steps(monkeypatch, model, prompt, max_tokens, depth):
    draft, conclude, drafts, accepted = speculative.draft, speculative.conclude, [], []
    llm = LLM(model, model.spec)
    llm.warm_up(depth)

    def record(runner, sequences, depth):
        drafts.append(draft(runner, sequences, depth)[0])
        return draft(runner, sequences, depth)  # a second time: it only writes what it wrote

    def count(*arguments):
        results = conclude(*arguments)
        accepted.append(len(results[0]) - 1)
        return results

    monkeypatch.setattr(speculative, "draft", record)
    monkeypatch.setattr(speculative, "conclude", count)
    params = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)
    completion = llm.generate([prompt], params, speculate=depth)[0]
    return completion.token_ids, drafts, accepted


def compared(monkeypatch, tmp_path, model, prompt, depth):
    """The number of accepted drafts of each step, equal on both sides."""
    tokens, drafts, accepted = their_steps(monkeypatch, theirs(model, tmp_path / "model"), prompt, 40)
    own_tokens, own_drafts, own_accepted = our_steps(monkeypatch, model, prompt, 40, depth)
    assert own_tokens == tokens
    assert own_drafts == drafts
    # Where the last step is cut to 40 tokens they count one of its tokens as their own.
    assert own_accepted[:-1] == accepted[:-1]
    return own_accepted


@pytest.mark.parametrize("depth", [1, 2])
def test_drafts_and_acceptance_random_weights(engine_spec, engine_model, monkeypatch, tmp_path, depth):
    spec = engine_spec(vocab_size=16, num_nextn_predict_layers=depth)
    accepted = compared(monkeypatch, tmp_path, engine_model(spec, seed=depth), [3, 1, 4, 1, 5, 9, 2, 6, 5], depth)
    assert len(accepted) > 10


@pytest.mark.parametrize("depth", [1, 2])
def test_drafts_and_acceptance_partly_accepted(noisy, monkeypatch, tmp_path, depth):
    if depth == 1:
        noisy = without_last_module(noisy)
    accepted = compared(monkeypatch, tmp_path, noisy, [3, 4, 5, 6, 7, 8], depth)
    assert set(accepted) == set(range(depth + 1)), "every number of accepted drafts occurs"


def without_last_module(model):
    spec = model.spec.model_copy(update={"num_nextn_predict_layers": 1})
    smaller = type(model)(spec, torch.float32)
    smaller.load_state_dict({name: w for name, w in model.state_dict().items() if not name.startswith("mtp.1.")})
    return smaller


def test_greedy_tokens(engine_spec, engine_model, tmp_path):
    spec = engine_spec(num_nextn_predict_layers=0)
    model = engine_model(spec, seed=5)
    loaded = theirs(model, tmp_path / "model")
    prompts = [[5, 6, 7], list(range(20)), [63]]
    params = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
    for prompt, completion in zip(prompts, LLM(model, spec).generate(prompts, params), strict=True):
        output = loaded.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=24, eos_token_id=None)
        assert completion.token_ids == output[0, len(prompt) :].tolist()
