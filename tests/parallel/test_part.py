"""A tiny model cut over four ranks has the loss and the gradients of one process."""

from collections.abc import Callable

import pytest
import torch
from experts_on_ranks import model_on_ranks
from rank_processes import Ranks

from dovetail.numerics.formats.errors import network_terms, normwise_error, tolerance
from dovetail.spec.model import ModelSpec


@pytest.mark.parametrize("hops", ["one", "two"])
@pytest.mark.parametrize("mesh", [(4, 2), (2, 2), (2, 1)], ids=str)
def test_ranks_have_the_gradients_of_one_process(
    mesh: tuple[int, int], hops: str, ranks: Ranks, tiny_spec: Callable[..., ModelSpec]
) -> None:
    spec = tiny_spec(num_hidden_layers=2, num_nextn_predict_layers=None)
    tokens = torch.randint(0, spec.vocab_size, (4, 2, 9), generator=torch.Generator().manual_seed(0))
    (loss, gradients), (on_ranks, gathered), is_same = ranks.run(model_on_ranks, spec, hops, mesh, tokens)[0]
    assert is_same  # what was cut, put together again
    bound = tolerance(torch.float32, terms=network_terms(spec, 9) + tokens.numel())
    assert abs(float(on_ranks / loss) - 1) < bound
    assert gathered.keys() == gradients.keys()
    for name, expected in gradients.items():
        assert normwise_error(gathered[name], expected) < bound, name
