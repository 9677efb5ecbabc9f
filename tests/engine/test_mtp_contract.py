"""Each point of the contract in `engine.speculative`, by what breaking it costs: output stays right, drafts do not."""

import copy

import pytest
import torch

from dovetail.engine import speculative
from dovetail.engine.llm import LLM
from dovetail.engine.sampler import SamplingParams
from dovetail.engine.steps.rows import Short
from dovetail.engine.steps.runner import Runner
from dovetail.model.transformer import Mtp

LENGTH = 49  # one token of the prefill and 48 of steps, which 2 and 3 divide


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
    assert accepted(periodic, depth, prompt_tokens=16) == (all_accepted(depth), 48 // (depth + 1))


def all_accepted(depth):
    return depth * (48 // (depth + 1))


def hidden_before_the_final_norm(patch, periodic):
    weight = periodic.model.norm.weight.detach()  # the scale that the norm took away hnorm takes away anyhow
    on_drafts(patch, lambda depth, hidden, tokens: (hidden / weight if depth == 0 else hidden, tokens))


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
    weight = periodic.model.mtp[0].norm.weight.detach()
    draft = Runner.draft
    patch.setattr(Runner, "draft", lambda *arguments: draft(*arguments) / weight)


def prompt_not_filled(patch, periodic):
    draft = Runner.draft

    def short_rows_only(self, depth, short, chunks, hidden, next_tokens):
        return hidden if chunks else draft(self, depth, short, chunks, hidden, next_tokens)

    patch.setattr(Runner, "draft", short_rows_only)


def accepted_drafts_not_refilled(patch, periodic):
    draft = Runner.draft

    def newest_only(self, depth, short, chunks, hidden, next_tokens):
        if chunks:
            return draft(self, depth, short, chunks, hidden, next_tokens)
        output = torch.zeros_like(hidden)
        lasts = [row for row, slot in enumerate(short.slots) if slot not in short.slots[row + 1 :]]
        of_lasts = ([each[row] for row in lasts] for each in (short.tokens, short.slots, short.positions))
        output[lasts] = draft(self, depth, Short(*of_lasts), [], hidden[lasts], [next_tokens[row] for row in lasts])
        return output

    patch.setattr(Runner, "draft", newest_only)


def on_drafts(patch, change):
    """Let `change(depth, hidden, tokens)` spoil what the modules are given."""
    draft = Runner.draft

    def changed(self, depth, short, chunks, hidden, tokens):
        hidden, tokens = change(depth, hidden, torch.tensor(tokens))
        return draft(self, depth, short, chunks, hidden, tokens.tolist())

    patch.setattr(Runner, "draft", changed)


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
    breach(monkeypatch, periodic)
    assert accepted(periodic, depth, prompt_tokens=16)[0] < all_accepted(depth)


@pytest.mark.parametrize("depth", [1, 2])
def test_halves_of_eh_proj_swapped(periodic, depth):
    model = copy.deepcopy(periodic.model)
    with torch.no_grad():
        for module in model.mtp:
            module.eh_proj.weight.copy_(module.eh_proj.weight.roll(model.spec.hidden_size, dims=1))
    assert accepted(periodic, depth, prompt_tokens=16, model=model)[0] < all_accepted(depth)


def test_rejected_drafts_not_rewritten(periodic, monkeypatch):
    """Drafts are wrong for the first period; module 1 then has wrong tokens in its cache, if not fed again."""
    kept, _ = accepted(periodic, 2, prompt_tokens=4)
    conclude = speculative.conclude

    def without_old_positions(runner, sequences, *rest):
        results = conclude(runner, sequences, *rest)
        for sequence, drawn in zip(sequences, results, strict=True):
            sequence.hidden = sequence.hidden[-len(drawn) :]
        return results

    monkeypatch.setattr(speculative, "conclude", without_old_positions)
    assert accepted(periodic, 2, prompt_tokens=4)[0] < kept


def test_position_0_has_an_embedding(periodic, monkeypatch):
    """The first draft after a prompt of one period rests on the entry of position 0. The reference fills it."""
    monkeypatch.setattr("dovetail.engine.steps.runner.takes", lambda model: False)
    assert accepted(periodic, 1, prompt_tokens=12)[1] == 24
    forward = Mtp.forward

    def zeroed(self, hidden, embedding, context, dispatcher):
        embedding = embedding * (context.positions != 0)[..., None]
        return forward(self, hidden, embedding, context, dispatcher)

    monkeypatch.setattr(Mtp, "forward", zeroed)
    assert accepted(periodic, 1, prompt_tokens=12)[1] == 25


def drafts_checked(monkeypatch, model, depth):
    """Generate, each draft compared with what the modules say of the whole sequence with no cache at all."""
    draft = speculative.draft

    @torch.no_grad()
    def check(runner, sequences, depth):
        drafts = draft(runner, sequences, depth)
        for sequence, proposal in zip(sequences, drafts, strict=True):
            count = len(sequence.tokens) - 1
            hidden = model(torch.tensor([sequence.tokens[:-1]])).hidden
            for k, token in enumerate(proposal):
                given = (sequence.tokens + proposal)[1 + k : 1 + k + count]
                hidden = model.mtp_forward(k, hidden, torch.tensor([given])).hidden
                assert int(model.logits(hidden[0, -1]).argmax()) == token
        return drafts

    monkeypatch.setattr(speculative, "draft", check)
    params = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
    return LLM(model, model.spec).generate([[1, 2, 3, 4, 5, 6, 7], [9], [3, 4]], params, speculate=depth)


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_drafts_equal_a_forward_over_everything_random(engine_spec, engine_model, monkeypatch, depth):
    model = engine_model(engine_spec(vocab_size=10, num_nextn_predict_layers=3), seed=2)
    drafts_checked(monkeypatch, model, depth)


@pytest.mark.parametrize("depth", [1, 2])
def test_drafts_equal_a_forward_over_everything_partly_accepted(noisy, monkeypatch, depth):
    completions = drafts_checked(monkeypatch, noisy, depth)
    assert 0.1 < sum(c.statistics.accepted for c in completions) / sum(c.statistics.drafted for c in completions) < 0.9


@pytest.mark.parametrize("breach", [accepted_drafts_not_refilled, prompt_not_filled])
def test_drafts_equal_a_forward_over_everything_notices_a_breach(noisy, monkeypatch, periodic, breach):
    breach(monkeypatch, periodic)
    with pytest.raises(AssertionError):
        drafts_checked(monkeypatch, noisy, 2)
