"""Speculative decoding with the MTP modules, without loss [V3 §5.4.3; ISCA §2.3.3].

Let t_0 .. t_n be the tokens so far and h_i the main model's hidden state at position i, known up to n - 1. A
step drafts d_1 .. d_D for positions n+1 .. n+D with modules 0 .. D-1, runs the main model once on t_n, d_1 ..
d_D, and keeps the drafts up to the first that it does not agree with, plus one token of its own.

Nearly every mistake with MTP is silent: the output stays right and only fewer drafts are accepted. So, the
contract [V3 eqs 21-23; published weights where the paper leaves it open]:

  hidden      Module 0 is given h_i *after* the main model's final norm; module k the output of module k - 1 after
              that module's own norm (shared_head.norm). That same output goes through the shared head.
  shift       Module k at position i is given the embedding of token i + 1 + k and predicts token i + 2 + k.
  order       eh_proj takes [enorm(embedding); hnorm(hidden)].
  position 0  is like any other: the embedding of token 1 + k with h_0. (One known engine zeroes it.)
  positions   Module k rotates with i, the position of its hidden state, as in training. Hugging Face's code counts
              i + 1 + k; rotary attention sees differences only, so the two agree.
  chain       Draft k comes from module k; module k + 1 is given the *draft* where no true token is known. Depth is
              at most the number of modules: recycling the last one is something it was not trained for, and
              `generate(use_mtp=True)` does not do it either.
  cache       Every module has its own layer of the latent cache, one entry per position i. An entry is final
              when its token i + 1 + k is true, hence so are all hidden states it came from. In a draft step
              module k writes entries up to n - 1 of which the last k hold drafts.
  regrow      When a step accepted m drafts, the next one feeds all modules the last max(m + 1, D) positions with true
              hidden states and tokens: m + 1 are new, and of the older ones no entry before the last D - 1 can
              hold a draft that was wrong. Skipping this leaves gaps (entries never written for accepted
              drafts) or stale entries (written for rejected ones).

Greedily, a draft is kept where it is the main model's choice. Otherwise by rejection sampling: draft d from q is
kept with probability min(1, p(d) / q(d)), else replaced by a draw from max(p - q, 0) renormalised; what comes out is
distributed as p whatever q is. After D kept drafts the main model's own next token is free.
"""

from __future__ import annotations

from collections.abc import Sequence as Sequences
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dovetail.engine.runner import Runner
from dovetail.engine.sampler import SamplingParams, probabilities, sample, uniform
from dovetail.engine.sequence import Sequence


@dataclass(frozen=True, slots=True, kw_only=True)
class Draft:
    """Tokens proposed for one sequence and, unless it is greedy, what each was drawn from ([V] FP32)."""

    tokens: list[int] = field(default_factory=list)
    distributions: list[Tensor] = field(default_factory=list)


def check_depth(depth: int, num_modules: int) -> None:
    """Raise `ValueError` unless this many drafts per step can be had."""
    if depth < 0:
        raise ValueError(f"speculate = {depth} drafts per step; use 0 for none")
    if depth > num_modules:
        raise ValueError(
            f"speculate = {depth} drafts per step, but the model has {num_modules} MTP modules and each drafts one "
            f"token: set speculate <= {num_modules}"
        )


def fill_prompt(runner: Runner, sequence: Sequence, hidden: Tensor, depth: int) -> None:
    """Write the modules' final entries for a prompt whose main hidden states are hidden [n, dim].

    Module k: positions 0 .. n - 2 - k, for those have a true token i + 1 + k. The rest follows with the first draft.
    """
    sequence.hidden = hidden[-depth:]
    tokens = torch.tensor(sequence.tokens, device=runner.device)
    for k in range(depth):
        count = len(tokens) - 1 - k
        if count < 1:
            break
        hidden = runner.prefill_draft(k, sequence.slot, hidden[:count], tokens[1 + k :])


def draft(runner: Runner, sequences: Sequences[Sequence], depth: int) -> list[Draft]:
    """`depth` proposals for each sequence; fills the modules' caches up to the newest hidden state."""
    counts = [len(sequence.hidden) for sequence in sequences]
    starts = [len(sequence.tokens) - 1 - count for sequence, count in zip(sequences, counts, strict=True)]
    spans = list(zip(sequences, starts, counts, strict=True))
    slots = _tensor(runner, [sequence.slot for sequence, _, count in spans for _ in range(count)])
    positions = _tensor(runner, [i for _, start, count in spans for i in range(start, start + count)])
    last = _tensor(runner, counts).cumsum(0) - 1
    hidden = torch.cat([sequence.hidden for sequence in sequences])
    drafts = [Draft() for _ in sequences]
    for k in range(depth):
        next_tokens: list[int] = []
        for (sequence, start, count), proposal in zip(spans, drafts, strict=True):
            known = sequence.tokens[start:] + proposal.tokens
            next_tokens += known[1 + k : 1 + k + count]
        hidden = runner.draft(k, hidden, _tensor(runner, next_tokens), slots, positions)
        logits = runner.logits(hidden[last])
        greedy = logits.argmax(dim=-1).tolist()
        for sequence, proposal, row, best in zip(sequences, drafts, logits, greedy, strict=True):
            _propose(proposal, row, best, sequence)
    return drafts


def _propose(proposal: Draft, logits: Tensor, greedy: int, sequence: Sequence) -> None:
    if sequence.params.is_greedy:
        proposal.tokens.append(greedy)
        return
    distribution = probabilities(logits, sequence.params)
    proposal.distributions.append(distribution)
    proposal.tokens.append(sample(distribution, sequence.generator))


def accept(logits: Tensor, proposal: Draft, params: SamplingParams, generator: torch.Generator) -> list[int]:
    """The drafts that are kept, and one token more; logits [D + 1, V] of the main model at t_n, d_1 .. d_D."""
    if params.is_greedy:
        return accept_greedy(logits.argmax(dim=-1).tolist(), proposal)
    targets = probabilities(logits, params)
    for i, (token, drawn_from) in enumerate(zip(proposal.tokens, proposal.distributions, strict=True)):
        target = targets[i]
        if uniform(generator) * float(drawn_from[token]) >= float(target[token]):
            residual = (target - drawn_from).clamp(min=0)
            # Nothing is left only where rounding made p and q equal: then either of them will do.
            replacement = sample(residual if bool(residual.any()) else target, generator)
            return [*proposal.tokens[:i], replacement]
    return [*proposal.tokens, sample(targets[-1], generator)]


def accept_greedy(choices: Sequences[int], proposal: Draft) -> list[int]:
    """As `accept`, from the main model's choices [D + 1]."""
    for i, token in enumerate(proposal.tokens):
        if token != choices[i]:
            return [*proposal.tokens[:i], choices[i]]
    return [*proposal.tokens, choices[-1]]


def step(runner: Runner, sequences: Sequences[Sequence], depth: int) -> list[list[int]]:
    """One step of every sequence: the new tokens of each, 1 to depth + 1 (none drafted for depth 0).

    The caller appends them. Sequences keep the hidden states that the next draft needs.
    """
    drafts = draft(runner, sequences, depth) if depth else [Draft() for _ in sequences]
    rows = [[sequence.tokens[-1], *proposal.tokens] for sequence, proposal in zip(sequences, drafts, strict=True)]
    slots = [sequence.slot for sequence in sequences for _ in range(depth + 1)]
    positions = [len(sequence.tokens) - 1 + i for sequence in sequences for i in range(depth + 1)]
    tokens = [token for row in rows for token in row]
    hidden = runner.step(_tensor(runner, tokens), _tensor(runner, slots), _tensor(runner, positions))
    logits = runner.logits(hidden).view(len(sequences), depth + 1, -1)
    hidden = hidden.view(len(sequences), depth + 1, -1)
    choices = logits.argmax(dim=-1).tolist()
    results = []
    for b, (sequence, proposal) in enumerate(zip(sequences, drafts, strict=True)):
        if sequence.params.is_greedy:
            emitted = accept_greedy(choices[b], proposal)
        else:
            emitted = accept(logits[b], proposal, sequence.params, sequence.generator)
        if depth:
            new = hidden[b, : len(emitted)]
            sequence.hidden = torch.cat((sequence.hidden, new))[-max(len(emitted), depth) :]
        results.append(emitted)
    return results


def _tensor(runner: Runner, values: list[int]) -> Tensor:
    return torch.tensor(values, device=runner.device)
