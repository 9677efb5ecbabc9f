import math

import pytest
import torch

from dovetail.numerics.formats.errors import elementwise_error, normwise_error, tolerance, unit_roundoff

FORMATS = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", FORMATS)
def test_rounding_once_is_within_one_unit_roundoff_and_reaches_it(dtype: torch.dtype) -> None:
    values = 1 + torch.linspace(0, 1, 10_001, dtype=torch.float64)
    error = elementwise_error(values.to(dtype), values)
    assert 0.8 * unit_roundoff(dtype) < error <= unit_roundoff(dtype) < tolerance(dtype)


def test_sums_stay_within_what_they_earn_and_would_not_earn_less() -> None:
    terms = 4096
    values = torch.rand(terms, 200, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    total = torch.zeros(200)
    for row in values:
        total += row.float()
    error = normwise_error(total, values.sum(0))
    assert tolerance(torch.float32, terms=terms) / 30 < error < tolerance(torch.float32, terms=terms)


def test_not_a_number_is_far_from_every_number() -> None:
    nan, inf = math.nan, math.inf
    for measure in (elementwise_error, normwise_error):
        assert measure(torch.tensor([nan, inf, 1.0]), torch.tensor([nan, inf, 1.0])) == 0
        for wrong in ([1.0, inf, 1.0], [nan, -inf, 1.0], [nan, inf, nan]):
            assert measure(torch.tensor(wrong), torch.tensor([nan, inf, 1.0])) == inf
        assert measure(torch.tensor([1.0]), torch.tensor([0.0])) > 1
        assert measure(torch.empty(0, 3), torch.empty(0, 3)) == 0
        with pytest.raises(ValueError, match="shapes"):
            measure(torch.zeros(3), torch.zeros(1))
