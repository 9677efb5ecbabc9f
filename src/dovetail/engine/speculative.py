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

A draft is kept where it is the token that the main model draws at its position. Draws depend on seed, position and
distribution alone (`sampler`), so that the completion is the one that would come without drafts, token by token, at any
temperature. Drafts are drawn with the same random numbers, which makes them agree as often as (1 - d) / (1 + d) at
least, where d is the distance in total variation of the two distributions. [Rejection sampling, as in Leviathan et al.
2023, keeps 1 - d, but what comes out then depends on whether there was a draft: on the load, where drafts are made only
when they pay.]
"""

from __future__ import annotations

from collections.abc import Sequence as Sequences
from itertools import pairwise

import torch
from torch import Tensor

from dovetail.engine.drawing import draw_all, propose
from dovetail.engine.sequence import Sequence
from dovetail.engine.steps.rows import NONE, Chunk, Short
from dovetail.engine.steps.runner import Chosen, Runner
from dovetail.engine.stream import Token


def check_depth(depth: int, num_modules: int) -> None:
    """Raise `ValueError` unless this many drafts per step can be had."""
    if depth < 0:
        raise ValueError(f"speculate = {depth} drafts per step; use 0 for none")
    if depth > num_modules:
        raise ValueError(
            f"speculate = {depth} drafts per step, but the model has {num_modules} MTP modules and each drafts one "
            f"token: set speculate <= {num_modules}"
        )


def fill_prompts(
    runner: Runner, sequences: Sequences[Sequence], chunks: Sequences[Chunk], hidden: Tensor, depth: int
) -> None:
    """Write the modules' final entries for chunks of prompts whose main hidden states are hidden [R, dim].

    Module k of a prompt of n tokens: positions up to n - 2 - k, for those have a true token i + 1 + k. The rest follows
    with the first draft. Sequences keep the last `depth` hidden states.
    """
    rows = list(pairwise([0, *torch.tensor([len(chunk.tokens) for chunk in chunks]).cumsum(0).tolist()]))
    for sequence, chunk, (begin, end) in zip(sequences, chunks, rows, strict=True):
        before = sequence.hidden if chunk.start > sequence.cached else hidden[:0]
        sequence.hidden = torch.cat((before, hidden[begin:end]))[-depth:]
    parts = [hidden[begin:end] for begin, end in rows]
    for k in range(depth):
        next_tokens: list[int] = []
        cut: list[Chunk] = []
        inputs, mine = [], []
        for number, (sequence, chunk) in enumerate(zip(sequences, chunks, strict=True)):
            count = min(len(chunk.tokens), sequence.prompt_tokens - 1 - k - chunk.start)
            if count > 0:
                first = chunk.start + 1 + k
                next_tokens += sequence.tokens[first : first + count]
                cut.append(Chunk(chunk.slot, chunk.start, chunk.tokens[:count], chunk.goes_on))
                inputs.append(parts[number][:count])
                mine.append(number)
        if not cut:
            return
        output = runner.draft(k, NONE, cut, torch.cat(inputs), next_tokens)
        for number, part in zip(mine, output.split([len(each) for each in inputs]), strict=True):
            parts[number] = part


def draft(runner: Runner, sequences: Sequences[Sequence], depth: int) -> list[list[int]]:
    """`depth` proposals for each sequence; fills the modules' caches up to the newest hidden state."""
    counts = [len(sequence.hidden) for sequence in sequences]
    starts = [len(sequence.tokens) - 1 - count for sequence, count in zip(sequences, counts, strict=True)]
    spans = list(zip(sequences, starts, counts, strict=True))
    short = Short(
        [token for sequence, start, count in spans for token in sequence.tokens[start : start + count]],
        [sequence.slot for sequence, _, count in spans for _ in range(count)],
        [i for _, start, count in spans for i in range(start, start + count)],
    )
    last = torch.tensor(counts, device=runner.device).cumsum(0) - 1
    hidden = torch.cat([sequence.hidden for sequence in sequences])
    drafts: list[list[int]] = [[] for _ in sequences]
    for k in range(depth):
        next_tokens: list[int] = []
        for (sequence, start, count), proposal in zip(spans, drafts, strict=True):
            known = sequence.tokens[start:] + proposal
            next_tokens += known[1 + k : 1 + k + count]
        hidden = runner.draft(k, short, [], hidden, next_tokens)
        logits = runner.logits(hidden[last])
        best = logits.argmax(dim=-1).tolist()
        for sequence, proposal, row, greedy in zip(sequences, drafts, logits, best, strict=True):
            proposal.append(propose(row, greedy, sequence, proposal))
    return drafts


def rows_of(sequences: Sequences[Sequence], drafts: list[list[int]]) -> Short:
    """The last token of each sequence and its drafts."""
    spans = list(zip(sequences, drafts, strict=True))
    return Short(
        [token for sequence, proposal in spans for token in (sequence.tokens[-1], *proposal)],
        [sequence.slot for sequence, proposal in spans for _ in range(len(proposal) + 1)],
        [len(sequence.tokens) - 1 + i for sequence, proposal in spans for i in range(len(proposal) + 1)],
    )


def conclude(
    runner: Runner, sequences: Sequences[Sequence], drafts: list[list[int]], hidden: Tensor, chosen: Chosen | None
) -> list[list[Token]]:
    """What `drawing.draw` gives each sequence, from the main model's hidden states [R, dim] of `rows_of`, as many for
    each. The caller appends the tokens. Sequences keep what the next draft needs."""
    depth = len(drafts[0])
    logits = runner.logits(hidden).view(len(sequences), depth + 1, -1)
    results = draw_all(logits, sequences, drafts, chosen)
    for sequence, drawn, new in zip(sequences, results, hidden.split(depth + 1), strict=True):
        keep_hidden(sequence, new[: len(drawn)], depth)
    return results


def keep_hidden(sequence: Sequence, new: Tensor, depth: int) -> None:
    """After a step that drafted, its modules lack the newest positions, and hold wrong drafts in the last but one to
    `depth`; after a step that did not, they lack one position more."""
    if depth:
        sequence.hidden = torch.cat((sequence.hidden, new))[-max(len(new), depth) :]
    elif len(sequence.hidden):  # empty where no drafts are ever made
        sequence.hidden = torch.cat((sequence.hidden, new))
