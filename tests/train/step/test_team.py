"""Gradients of a model that is not cut: their sums over microbatches, and when they are given."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from dovetail.model.transformer import Transformer
from dovetail.spec.model import ModelSpec
from dovetail.text.corpus import Batch
from dovetail.train.step.losses import Share, compute_losses
from dovetail.train.step.team import Aim, backward

AIM = Aim(share=Share(num_targets=[64, 60], weights=[1.0, 0.3]), alpha=0.01, separate_documents=False)


def batches_of(spec: ModelSpec, count: int) -> list[Batch]:
    tokens = torch.randint(0, spec.vocab_size, (count, 2, 17), generator=torch.Generator().manual_seed(1))
    return [Batch(tokens=each, document_ids=torch.zeros(2, 17, dtype=torch.int32)) for each in tokens]


def summed_at_the_end(model: Transformer, batches: list[Batch]) -> dict[str, Tensor]:
    sums = {name: torch.zeros(each.shape) for name, each in model.named_parameters()}
    for batch in batches:
        losses = compute_losses(model, batch, AIM.separate_documents, AIM.share)
        torch.stack([losses.token, *losses.mtp, AIM.alpha * losses.balance]).sum().backward()
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                sums[name] += parameter.grad
            parameter.grad = None
    return sums


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("count", [1, 3])
def test_gradients_are_given_once_and_whole_the_last_layers_first(
    count: int, tied: bool, tiny_spec: Callable[..., ModelSpec], random_model: Callable[..., Transformer]
) -> None:
    spec = tiny_spec(num_nextn_predict_layers=1, tie_word_embeddings=tied)
    model = random_model(spec, dtype=torch.bfloat16)
    model.idle = nn.Parameter(torch.ones(3))  # gets no gradient
    batches, given = batches_of(spec, count), dict[str, Tensor]()

    def give(name: str, gradient: Tensor) -> None:
        assert name not in given
        given[name] = gradient.clone()

    sums = backward(model, batches, AIM, in_fp32=True, give=give)
    expected = summed_at_the_end(model, batches)
    assert given.keys() == sums.gradients.keys() == expected.keys()
    for name, gradient in expected.items():
        assert sums.gradients[name].dtype == torch.float32
        assert torch.equal(sums.gradients[name], gradient), name
        assert torch.equal(given[name], gradient), name
    assert all(parameter.grad is None for parameter in model.parameters())
    order = list(given)
    last, first = (order.index(f"layers.{layer}.input_layernorm.weight") for layer in (1, 0))
    assert last < first < order.index("embed_tokens.weight") < order.index("idle") == len(order) - 1
