"""Goes from logits to tokens: what a request does to logits, which token is drawn, what is said of it.

Penalties come first, then biases, then what may not be drawn: ends before `min_tokens`, and what the grammar forbids.
Drafts in front of a position count like tokens that were generated.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from collections.abc import Sequence as Sequences
from contextlib import contextmanager

import torch
from torch import Tensor

from dovetail.engine.grammar import GrammarFailure
from dovetail.engine.sampler import probabilities, sample
from dovetail.engine.sequence import Sequence
from dovetail.engine.steps.runner import Chosen
from dovetail.engine.stream import Experts, Token, TopLogprobs


def pick(logits: Tensor, greedy: int, sequence: Sequence, drafts: Sequences[int]) -> int:
    """The token for the position behind `drafts`, which follow the sequence; logits [V], `greedy` their arg max."""
    return _choose(logits, greedy, sequence, drafts)[0]


def propose(logits: Tensor, greedy: int, sequence: Sequence, drafts: Sequences[int]) -> int:
    """`pick` of a draft. A grammar that fails behind drafts fails the sequence only if these are kept: the main
    model's draw says so."""
    try:
        return pick(logits, greedy, sequence, drafts)
    except GrammarFailure:
        return greedy


def draw_all(
    logits: Tensor, sequences: Sequences[Sequence], drafts: list[list[int]], chosen: Chosen | None
) -> list[list[Token]]:
    """`draw` for each sequence: logits [B, D + 1, V]. `chosen`: experts of all B (D + 1) rows."""
    width = logits.shape[1]
    of_each = zip(logits, logits.argmax(dim=-1).tolist(), sequences, drafts, strict=True)
    return [draw(*one, chosen, b * width) for b, one in enumerate(of_each)]


def draw(
    logits: Tensor, greedy: list[int], sequence: Sequence, drafts: list[int], chosen: Chosen | None, row: int
) -> list[Token]:
    """The tokens that logits [D + 1, V] of the sequence's last token and its drafts give, up to the first that is no
    draft. `greedy`: arg maxima. `chosen`: experts, from this row on. Where the grammar fails, the tokens end with the
    drafts before it, and the sequence gets the `error`."""
    drawn: list[Token] = []
    for i, here in enumerate(logits):
        try:
            drawn.append(_draw_one(here, greedy[i], sequence, drafts[:i], _experts_of(chosen, row + i, sequence)))
        except GrammarFailure as failure:
            sequence.error = str(failure)
            break
        if i == len(drafts) or drawn[-1].id != drafts[i]:
            break
    return drawn


def _draw_one(
    logits: Tensor, greedy: int, sequence: Sequence, drafts: Sequences[int], experts: Experts | None
) -> Token:
    """As `pick`, with the log-probabilities that the request asks for."""
    token, used = _choose(logits, greedy, sequence, drafts)
    params = sequence.params
    if params.logprobs is None:
        return Token(id=token, experts=experts)
    own = logits.float().log_softmax(dim=-1)
    sampler = 0.0 if used is None else float(used[token].log())
    return Token(
        id=token,
        logprob=float(own[token]),
        sampler_logprob=sampler,
        top=likeliest(own, params.logprobs),
        experts=experts,
    )


def _choose(logits: Tensor, greedy: int, sequence: Sequence, drafts: Sequences[int]) -> tuple[int, Tensor | None]:
    """The token, and the distribution [V] that it was drawn from; None where it is certain."""
    params = sequence.params
    if params.changes_logits:
        logits = changed(logits, sequence, drafts)
        greedy = int(logits.argmax())
    if params.is_greedy:
        return greedy, None
    distribution = probabilities(logits, params)
    return sample(distribution, params.seed, len(sequence.tokens) + len(drafts)), distribution


def changed(logits: Tensor, sequence: Sequence, drafts: Sequences[int]) -> Tensor:
    """A copy of logits [V] with penalties, biases and masks. Raises GrammarFailure."""
    params = sequence.params
    logits = logits.clone()
    counts = sequence.counts + Counter(drafts) if drafts else sequence.counts
    if params.repetition_penalty != 1:
        _scale(logits, {*sequence.tokens, *drafts}, params.repetition_penalty)
    if counts and (params.presence_penalty or params.frequency_penalty):
        ids = _ids(counts, logits)
        number = torch.tensor([counts[token] for token in ids.tolist()], dtype=logits.dtype, device=logits.device)
        logits[ids] -= params.presence_penalty + params.frequency_penalty * number
    for token, bias in params.logit_bias.items():
        if token < len(logits):
            logits[token] += bias
    if sequence.completion_tokens + len(drafts) < params.min_tokens:
        logits[_ids({*sequence.ends, *params.stop_token_ids}, logits)] = float("-inf")
    if sequence.grammar is not None:
        with _ahead(sequence, drafts) as is_possible:
            if is_possible:
                mask = torch.from_numpy(sequence.grammar.mask()[: len(logits)]).to(logits.device)
                logits[: len(mask)].masked_fill_(~mask, float("-inf"))
                logits[len(mask) :] = float("-inf")
    return logits


def likeliest(logprobs: Tensor, count: int) -> TopLogprobs:
    """The tokens with the largest of logprobs [V], largest first."""
    values, ids = logprobs.topk(min(count, len(logprobs)))
    return tuple(zip(ids.tolist(), values.tolist(), strict=True))


def _experts_of(chosen: Chosen | None, row: int, sequence: Sequence) -> Experts | None:
    """Those of one row, where the sequence asks for them."""
    if not sequence.params.routed_experts:
        return None
    assert chosen is not None
    return tuple(tuple(layer[row].tolist()) for layer in chosen)


def _scale(logits: Tensor, tokens: set[int], penalty: float) -> None:
    ids = _ids(tokens, logits)
    values = logits[ids]
    logits[ids] = torch.where(values > 0, values / penalty, values * penalty)


def _ids(tokens: Counter[int] | set[int], logits: Tensor) -> Tensor:
    return torch.tensor(sorted(t for t in tokens if t < len(logits)), dtype=torch.int64, device=logits.device)


@contextmanager
def _ahead(sequence: Sequence, drafts: Sequences[int]) -> Iterator[bool]:
    """The grammar as it will be behind drafts; False where it does not allow them, so that nothing follows."""
    assert sequence.grammar is not None
    taken = 0
    try:
        for draft in drafts:
            if sequence.grammar.is_finished or not sequence.grammar.mask()[draft]:
                yield False
                return
            sequence.grammar.advance(draft)
            taken += 1
        yield not sequence.grammar.is_finished
    finally:
        if taken:
            sequence.grammar.rollback(taken)
