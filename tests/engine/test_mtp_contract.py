"""Each point of the contract in `engine.speculative`, by what breaking it costs: output stays right, drafts do not."""

import copy

import pytest
import torch

from dovetail.engine import speculative
from dovetail.engine.llm import LLM
from dovetail.engine.runner import Runner
from dovetail.engine.sampler import SamplingParams
from dovetail.model.transformer import Mtp

LENGTH = 48


def accepted(periodic, depth, prompt_tokens, model=None):
    """(accepted, steps) of one greedy completion, which is right whatever the drafts are."""
    model = model or periodic.model
    prompt = periodic.run(3, prompt_tokens)
    params = SamplingParams(temperature=0, max_tokens=LENGTH)
    completion = LLM(model, model.spec).generate([prompt], params, speculate=depth)[0]
    assert completion.token_ids == periodic.run(prompt[-1], LENGTH + 1)[1:]
    return completion.statistics.accepted, completion.statistics.steps


@pytest.mark.parametrize("depth", [1, 2])
def test_kept_contract_accepts_every_draft(periodic, depth):
    kept, steps = accepted(periodic, depth, prompt_tokens=16)
    assert steps == -(-(LENGTH - 1) // (depth + 1))
    assert kept == LENGTH - 1 - steps or kept == LENGTH - steps  # the last step may be cut before its own token


def hidden_before_the_final_norm(patch, periodic):
    signs = periodic.model.norm.weight.detach()  # hnorm takes away the scale; the weights it cannot
    on_drafts(patch, lambda depth, hidden, tokens: (hidden * signs if depth == 0 else hidden, tokens))


def hidden_of_the_main_model_for_every_module(patch, periodic):
    first = {}

    def unchained(depth, hidden, tokens):
        if depth == 0:
            first["hidden"] = hidden
        return first["hidden"][: len(hidden)], tokens

    on_drafts(patch, unchained)


def tokens_not_shifted(patch, periodic):
    before = torch.tensor(periodic.follows).argsort()
    on_drafts(patch, lambda depth, hidden, tokens: (hidden, before[tokens]))


def tokens_shifted_twice(patch, periodic):
    after = torch.tensor(periodic.follows)
    on_drafts(patch, lambda depth, hidden, tokens: (hidden, after[tokens]))


def without_the_modules_own_norm(patch, periodic):
    signs = periodic.model.mtp[0].norm.weight.detach()
    draft, prefill = Runner.draft, Runner.prefill_draft
    patch.setattr(Runner, "draft", lambda *arguments: draft(*arguments) * signs)
    patch.setattr(Runner, "prefill_draft", lambda *arguments: prefill(*arguments) * signs)


def prompt_not_filled(patch, periodic):
    patch.setattr(Runner, "prefill_draft", lambda self, depth, slot, hidden, next_tokens: hidden)


def accepted_drafts_not_refilled(patch, periodic):
    draft = Runner.draft

    def newest_only(self, depth, hidden, next_tokens, slots, positions):
        output = torch.zeros_like(hidden)
        output[-1:] = draft(self, depth, hidden[-1:], next_tokens[-1:], slots[-1:], positions[-1:])
        return output

    patch.setattr(Runner, "draft", newest_only)


def on_drafts(patch, change):
    """Let `change(depth, hidden, tokens)` spoil what the modules are given."""
    draft, prefill = Runner.draft, Runner.prefill_draft
    patch.setattr(
        Runner,
        "draft",
        lambda self, depth, hidden, tokens, *rows: draft(self, depth, *change(depth, hidden, tokens), *rows),
    )
    patch.setattr(
        Runner,
        "prefill_draft",
        lambda self, depth, slot, hidden, tokens: prefill(self, depth, slot, *change(depth, hidden, tokens)),
    )


@pytest.mark.parametrize(
    ("breach", "depth"),
    [
        (hidden_before_the_final_norm, 1),
        (hidden_before_the_final_norm, 2),
        (hidden_of_the_main_model_for_every_module, 2),
        (tokens_not_shifted, 1),
        (tokens_not_shifted, 2),
        (tokens_shifted_twice, 1),
        (without_the_modules_own_norm, 1),
        (without_the_modules_own_norm, 2),
        (prompt_not_filled, 1),
        (prompt_not_filled, 2),
        (accepted_drafts_not_refilled, 1),
        (accepted_drafts_not_refilled, 2),
    ],
)
def test_a_breach_lowers_acceptance(periodic, monkeypatch, breach, depth):
    kept, _ = accepted(periodic, depth, prompt_tokens=16)
    breach(monkeypatch, periodic)
    kept_by_wrong, _ = accepted(periodic, depth, prompt_tokens=16)
    assert kept_by_wrong < 0.8 * kept


@pytest.mark.parametrize("depth", [1, 2])
def test_halves_of_eh_proj_swapped(periodic, depth):
    model = copy.deepcopy(periodic.model)
    with torch.no_grad():
        for module in model.mtp:
            module.eh_proj.weight.copy_(module.eh_proj.weight.roll(model.spec.hidden_size, dims=1))
    assert accepted(periodic, depth, prompt_tokens=16, model=model)[0] == 0


def test_rejected_drafts_not_rewritten(periodic, monkeypatch):
    """Drafts are wrong for the first period; module 1 then has wrong tokens in its cache, if not fed again."""
    kept, _ = accepted(periodic, 2, prompt_tokens=4)
    step = speculative.step

    def without_old_positions(runner, sequences, depth):
        results = step(runner, sequences, depth)
        for sequence, tokens in zip(sequences, results, strict=True):
            sequence.hidden = sequence.hidden[-len(tokens) :]
        return results

    monkeypatch.setattr(speculative, "step", without_old_positions)
    assert accepted(periodic, 2, prompt_tokens=4)[0] < 0.8 * kept


def test_position_0_has_an_embedding(periodic, monkeypatch):
    """The first draft after a prompt of one period rests on the entry of position 0."""
    kept, steps = accepted(periodic, 1, prompt_tokens=12)
    forward = Mtp.forward

    def zeroed(self, hidden, embedding, context, dispatcher):
        embedding = embedding * (context.positions != 0)[..., None]
        return forward(self, hidden, embedding, context, dispatcher)

    monkeypatch.setattr(Mtp, "forward", zeroed)
    kept_by_wrong, steps_of_wrong = accepted(periodic, 1, prompt_tokens=12)
    assert kept_by_wrong < kept
    assert steps_of_wrong == steps + 1


@torch.no_grad()
@pytest.mark.parametrize("depth", [1, 2, 3])
def test_drafts_equal_those_of_a_forward_over_everything(engine_spec, engine_model, monkeypatch, depth):
    """Random weights: each draft is what the modules say of the whole sequence with no cache at all."""
    spec = engine_spec(vocab_size=10, num_nextn_predict_layers=3)
    model = engine_model(spec, seed=2)
    draft, checked = speculative.draft, []

    def check(runner, sequences, depth):
        drafts = draft(runner, sequences, depth)
        for sequence, proposal in zip(sequences, drafts, strict=True):
            hidden = model(torch.tensor([sequence.tokens[:-1]])).hidden
            for k, token in enumerate(proposal.tokens):
                given = torch.tensor([sequence.tokens[1 + k :] + proposal.tokens[:k]])
                hidden = model.mtp_forward(k, hidden, given).hidden
                assert int(model.logits(hidden[0, -1]).argmax()) == token
            checked.append(len(proposal.tokens))
        return drafts

    monkeypatch.setattr(speculative, "draft", check)
    prompts = [[1, 2, 3, 4, 5, 6, 7], [9], [3, 1]]
    completions = LLM(model, spec).generate(
        prompts, SamplingParams(temperature=0, max_tokens=20, ignore_eos=True), speculate=depth
    )
    assert sum(c.statistics.accepted for c in completions) > 0
    assert 0 < min(c.statistics.acceptance for c in completions) < 1
    assert len(checked) == sum(c.statistics.steps for c in completions)
