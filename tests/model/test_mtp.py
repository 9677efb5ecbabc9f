"""The MTP contract point by point, each wrong variant shown to be another function, and the loss's targets."""

import itertools
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dovetail.model.attention.causal import document_starts
from dovetail.model.transformer import Mtp, Transformer
from dovetail.numerics.formats.errors import network_terms, normwise_error, rowwise_error, tolerance
from dovetail.spec.model import ModelSpec
from dovetail.text.corpus import Batch
from dovetail.train.step.loss import token_loss
from dovetail.train.step.losses import compute_losses

SpecFactory = Callable[..., ModelSpec]
ModelFactory = Callable[..., Transformer]


def some_tokens(spec: ModelSpec, batch: int, length: int) -> Tensor:
    return torch.randint(0, spec.vocab_size, (batch, length), generator=torch.Generator().manual_seed(0))


def bound_of(spec: ModelSpec, length: int) -> float:
    return tolerance(torch.float32, roundings=length, terms=network_terms(spec, length))


def module_of(model: Transformer, depth: int = 0) -> Mtp:
    module = model.mtp[depth]
    assert isinstance(module, Mtp)
    return module


def normed(x: Tensor, weight: Tensor) -> Tensor:
    return F.rms_norm(x, x.shape[-1:], weight, 1e-6)


def by_hand(model: Transformer, hidden: Tensor, next_tokens: Tensor, variant: str = "") -> Tensor:
    """Module 0 written out; `variant` breaks one point."""
    module = module_of(model)
    embedding = normed(model.embed_tokens(next_tokens), module.enorm.weight)
    state = normed(hidden, module.hnorm.weight)
    if variant == "no enorm":
        embedding = model.embed_tokens(next_tokens)
    if variant == "no hnorm":
        state = hidden
    halves = (state, embedding) if variant == "hidden first" else (embedding, state)
    joined = F.linear(torch.cat(halves, dim=-1), module.eh_proj.weight)
    context = model.context(next_tokens, None, None, None, False)
    output, _ = module.block(joined, context, model.dispatcher)
    return output if variant == "no norm before the head" else normed(output, module.norm.weight)


def before_final_norm(model: Transformer, tokens: Tensor) -> Tensor:
    captured: list[Tensor] = []
    handle = model.norm.register_forward_hook(lambda _, inputs, output: captured.append(inputs[0]))
    model(tokens)
    handle.remove()
    return captured[0]


def test_the_contract_and_its_wrong_variants(tiny_spec: SpecFactory, random_model: ModelFactory) -> None:
    spec = tiny_spec()
    model, tokens = random_model(spec), some_tokens(spec, 2, 21)
    with torch.no_grad():
        hidden = model(tokens[:, :-1]).hidden
        output = model.mtp_forward(0, hidden, tokens[:, 1:]).hidden
        bound = bound_of(spec, 20)
        assert rowwise_error(output, by_hand(model, hidden, tokens[:, 1:])) < bound
        for variant in ("hidden first", "no enorm", "no hnorm", "no norm before the head"):
            assert normwise_error(by_hand(model, hidden, tokens[:, 1:], variant), output) > 100 * bound, variant
        unnormed = before_final_norm(model, tokens[:, :-1])
        wrong = {
            "hidden before the final norm": by_hand(model, unnormed, tokens[:, 1:]),
            "embedding of the token itself": by_hand(model, hidden, tokens[:, :-1]),
            "embedding of the token after next": by_hand(model, hidden, tokens[:, 1:].roll(-1, 1)),
        }
        for variant, other in wrong.items():
            assert normwise_error(other, output) > 100 * bound, variant


def test_position_i_sees_tokens_up_to_the_next(tiny_spec: SpecFactory, random_model: ModelFactory) -> None:
    spec = tiny_spec()
    model, tokens = random_model(spec), some_tokens(spec, 1, 21)
    changed = tokens.clone()
    changed[:, 12] = (changed[:, 12] + 1) % spec.vocab_size
    with torch.no_grad():
        before, after = (
            model.mtp_forward(0, model(each[:, :-1]).hidden, each[:, 1:]).hidden for each in (tokens, changed)
        )
    assert rowwise_error(after[:, :11], before[:, :11]) < bound_of(spec, 20)
    assert ((after - before)[:, 11:].abs().amax(-1) > 100 * bound_of(spec, 20)).all()


def test_embedding_and_head_are_the_main_models(tiny_spec: SpecFactory, random_model: ModelFactory) -> None:
    spec = tiny_spec()
    model, tokens = random_model(spec), some_tokens(spec, 1, 12)
    assert not any("embed" in name or "head" in name for name, _ in model.mtp.named_parameters())
    hidden = torch.zeros(1, 10, 32)
    loss = token_loss(model.mtp_forward(0, hidden, tokens[:, 1:11]).hidden, model.head_weight, tokens[:, 2:])
    loss.backward()
    seen = model.embed_tokens.weight.grad
    assert seen is not None
    assert set(seen.abs().sum(1).nonzero().flatten().tolist()) == set(tokens[0, 1:11].tolist())
    assert model.lm_head is not None
    assert model.lm_head.weight.grad is not None


# ---- The loss ----


def batch_of(tokens: Tensor, borders: list[int] | None = None) -> Batch:
    ids = torch.zeros(tokens.shape, dtype=torch.int32)
    for border in borders or []:
        ids[:, border:] += 1
    return Batch(tokens=tokens, document_ids=ids)


@pytest.mark.parametrize("depths", [1, 2, 3])
def test_each_depth_predicts_one_token_further(depths: int, tiny_spec: SpecFactory, random_model: ModelFactory) -> None:
    """L_k is the mean over its T - k - 1 positions of -log P(t_{i+k+2}), k from 0; module k reads module k - 1."""
    spec = tiny_spec(num_nextn_predict_layers=depths)
    model, tokens = random_model(spec), some_tokens(spec, 2, 16)
    with torch.no_grad():
        losses = compute_losses(model, batch_of(tokens), separate_documents=False)
        hidden = model(tokens[:, :-1]).hidden
        logits = model.logits(hidden)
        bound = bound_of(spec, 15)
        expected = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        assert normwise_error(losses.token, expected) < bound
        assert len(losses.mtp) == depths
        for k in range(depths):
            length = 15 - k - 1
            hidden = model.mtp_forward(k, hidden[:, :length], tokens[:, k + 1 : k + 1 + length]).hidden
            logits = model.logits(hidden).flatten(0, 1)
            expected = F.cross_entropy(logits, tokens[:, k + 2 :].flatten())
            assert normwise_error(losses.mtp[k], expected) < bound
            shifted = F.cross_entropy(logits, tokens[:, k + 1 : k + 1 + length].flatten())
            assert normwise_error(losses.mtp[k], shifted) > 100 * bound
    assert len(losses.counts) == 2 + depths
    assert [int(each.sum()) for each in losses.counts] == [60, 60, *(4 * (14 - k) for k in range(depths))]


def documents_alone(model: Transformer, tokens: Tensor, borders: list[int]) -> tuple[Tensor, list[Tensor]]:
    """Losses over the documents of `tokens` run one by one: means over all targets inside a document."""
    edges = [0, *borders, tokens.shape[1]]
    sums = torch.zeros(1 + len(model.mtp))
    counts = torch.zeros(1 + len(model.mtp))
    for start, stop in itertools.pairwise(edges):
        document = tokens[:, start:stop]
        hidden = model(document[:, :-1]).hidden if stop - start > 1 else None
        for k in range(1 + len(model.mtp)):  # k = 0 is the main model
            targets = document[:, k + 1 :]
            if not targets.numel():
                break
            assert hidden is not None
            if k:
                length = targets.shape[1]
                hidden = model.mtp_forward(k - 1, hidden[:, :length], document[:, k : k + length]).hidden
            logits = model.logits(hidden).flatten(0, 1)
            sums[k] += F.cross_entropy(logits, targets.flatten(), reduction="sum")
            counts[k] += targets.numel()
    means = sums / counts
    return means[0], list(means[1:])


BORDERS = [1, 9, 11, 14, 30, 31]  # documents of 1, 8, 2, 3, 16, 1 and 9 tokens


def test_no_loss_crosses_a_document_border(tiny_spec: SpecFactory, random_model: ModelFactory) -> None:
    spec = tiny_spec(num_nextn_predict_layers=2)
    model, tokens = random_model(spec), some_tokens(spec, 2, 40)
    bound = 2 * bound_of(spec, 39)
    losses = compute_losses(model, batch_of(tokens, BORDERS), separate_documents=True)
    token, mtp = documents_alone(model, tokens, BORDERS)
    assert normwise_error(losses.token, token) < bound
    for ours, theirs in zip(losses.mtp, mtp, strict=True):
        assert normwise_error(ours, theirs) < bound
    weights = list(model.parameters())
    ours = torch.autograd.grad(losses.token + torch.stack(losses.mtp).mean(), weights, allow_unused=True)
    theirs = torch.autograd.grad(token + torch.stack(mtp).mean(), weights, allow_unused=True)
    for mine, right in zip(ours, theirs, strict=True):
        assert mine is not None
        assert right is not None
        assert normwise_error(mine, right) < 3 * bound
    joined = compute_losses(model, batch_of(tokens, BORDERS), separate_documents=False)
    assert normwise_error(joined.token, token) > 10 * bound


def test_documents_of_the_nearer_token_would_leak(tiny_spec: SpecFactory, random_model: ModelFactory) -> None:
    """A position joins the hidden state of token i and the embedding of token i + 1. Counted to the latter's
    document it would show the end of one document to the whole of the next."""
    spec = tiny_spec()
    model, tokens = random_model(spec), some_tokens(spec, 1, 21)
    ids = batch_of(tokens, [8]).document_ids
    with torch.no_grad():
        hidden = model(tokens[:, :-1], document_ids=ids[:, :-1]).hidden
        alone = model.mtp_forward(0, model(tokens[:, 8:-1]).hidden, tokens[:, 9:]).hidden
        right = model.mtp_forward(0, hidden, tokens[:, 1:], document_ids=ids[:, :-1]).hidden
        wrong = model.mtp_forward(0, hidden, tokens[:, 1:], document_ids=ids[:, 1:]).hidden
    assert rowwise_error(right[:, 8:], alone) < bound_of(spec, 20)
    assert normwise_error(wrong[:, 8:], alone) > 100 * bound_of(spec, 20)
    assert document_starts(ids[:, :-1])[0, 8] == 8
