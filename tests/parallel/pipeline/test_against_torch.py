"""Stages under our executor have the gradients that torch's pipeline runtime makes of the same stages."""

from collections.abc import Callable

import pytest
import torch
from pipelines_on_ranks import Case
from rank_processes import Ranks
from torch_pipelines import both

from dovetail.numerics.formats.errors import normwise_error, tolerance
from dovetail.spec.layout import Layout
from dovetail.spec.model import ModelSpec


@pytest.mark.parametrize("schedule", ["1f1b", "interleaved", "dualpipev"])
def test_gradients_are_those_of_torch(schedule: str, two: Ranks, tiny_spec: Callable[..., ModelSpec]) -> None:
    spec = tiny_spec(num_hidden_layers=4, num_nextn_predict_layers=0, initializer_range=0.1)
    each = Case(spec=spec, layout=Layout(pp=2, microbatches=4, schedule=schedule))
    bound = tolerance(torch.float32, terms=each.layout.microbatches)
    for (theirs, losses), (ours, our_losses) in two.run(both, each):
        assert len(losses) == len(our_losses)
        assert all(torch.equal(a, b) for a, b in zip(our_losses, losses, strict=True))
        assert ours.keys() == theirs.keys()
        for name, gradient in theirs.items():
            assert gradient.abs().sum() > 0, name
            assert normwise_error(ours[name], gradient) <= bound, name
