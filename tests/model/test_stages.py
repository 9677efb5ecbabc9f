"""A model by stages is the whole model, bit for bit: hidden states, routings, gradients, and initial weights."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from dovetail.cost.memory.stages import stages
from dovetail.model.transformer import Output, Transformer, initialize, whole
from dovetail.spec.layout import Layout
from dovetail.spec.model import ModelSpec

SpecFactory = Callable[..., ModelSpec]
SEED = 3


def build(spec: ModelSpec, pp: int, counts: tuple[int, ...]) -> list[Transformer]:
    layout = Layout(pp=pp, microbatches=pp, schedule="1f1b", stage_layers=counts)
    models = [Transformer(spec, torch.float32, stage=stage) for stage in stages(spec, layout)]
    for model in models:
        initialize(model, SEED)
    return models


def run(models: list[Transformer], tokens: Tensor) -> tuple[Output, list]:
    """What each stage hands on is cut off, as it is between ranks; `backward` sends gradients back over the cuts."""
    x, cuts, routings = tokens, [], []
    for model in models:
        output = model.run_stage(x, model.context(tokens, None, None, None, False))
        routings += output.routings
        x = output.hidden.detach().requires_grad_()
        cuts.append((output.hidden, x))
    return Output(hidden=x, routings=routings), cuts


def backward(cuts: list) -> None:
    for hidden, leaf in reversed(cuts):
        hidden.backward(leaf.grad)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("counts", [(1, 1, 1), (2, 1), (1, 2)])
def test_stages_are_the_whole(counts: tuple[int, ...], tied: bool, tiny_spec: SpecFactory) -> None:
    spec = tiny_spec(tie_word_embeddings=tied)
    alone = Transformer(spec, torch.float32)
    initialize(alone, SEED)
    models = build(spec, len(counts), counts)
    tokens = torch.arange(22).view(2, 11) % spec.vocab_size
    expected = alone(tokens)
    found, cuts = run(models, tokens)
    assert torch.equal(found.hidden, expected.hidden)
    assert all(torch.equal(a.counts, b.counts) for a, b in zip(found.routings, expected.routings, strict=True))
    last = models[-1]
    for model, hidden in ((alone, expected.hidden), (last, found.hidden)):
        drafted = model.mtp_forward(0, hidden, tokens.roll(-1, 1)).hidden
        (model.logits(hidden).sum() + model.logits(drafted).square().sum()).backward()
    backward(cuts)
    gradients = dict(alone.named_parameters())
    for model in models:
        for name, parameter in model.named_parameters():
            if name == "embed_tokens.weight":
                continue
            assert torch.equal(parameter.grad, gradients[name].grad), name
    ends = [model.embed_tokens.weight.grad for model in (models[0], last)]
    assert torch.allclose(ends[0] + ends[1], gradients["embed_tokens.weight"].grad, rtol=1e-5, atol=1e-7)


def test_every_tensor_is_on_one_stage_and_starts_as_in_the_whole(tiny_spec: SpecFactory) -> None:
    spec = tiny_spec()
    alone = Transformer(spec, torch.float32)
    initialize(alone, SEED)
    state = alone.state_dict()
    found = [model.state_dict() for model in build(spec, 3, (1, 1, 1))]
    names = [name for each in found for name in each]
    assert set(names) == set(state) and len(names) == len(state) + 1  # the embedding, for the MTP module
    assert all(torch.equal(value, state[name]) for each in found for name, value in each.items())


def test_a_stage_without_mtp_has_no_second_embedding(tiny_spec: SpecFactory) -> None:
    models = build(tiny_spec(num_nextn_predict_layers=0), 2, (2, 1))
    assert not any(name.startswith("embed") for name, _ in models[1].named_parameters())


def test_the_whole_is_the_stage_of_all_layers(tiny_spec: SpecFactory) -> None:
    spec = tiny_spec()
    assert stages(spec, Layout()) == (whole(spec),) == (Transformer(spec).stage,)
