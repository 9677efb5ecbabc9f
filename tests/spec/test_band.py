import pytest

from dovetail.spec.band import Band, largest, spread, sum_bands


def test_arithmetic_contains_every_pair_of_points():
    left, right = Band(3.0, 2.0, 5.0), Band(4.0, 1.0, 6.0)
    for result, function in (
        (left + right, lambda x, y: x + y),
        (left - right, lambda x, y: x - y),
        (left * right, lambda x, y: x * y),
        (left / right, lambda x, y: x / y),
    ):
        ends = [function(x, y) for x in (2.0, 5.0) for y in (1.0, 6.0)]
        assert (result.low, result.high) == (min(ends), max(ends))
        assert result.value == function(3.0, 4.0)


def test_floats_on_either_side():
    band = Band(2.0, 1.0, 4.0)
    assert 1 + band == band + 1 == Band(3.0, 2.0, 5.0)
    assert 10 - band == Band(8.0, 6.0, 9.0)
    assert band - 1 == Band(1.0, 0.0, 3.0)
    assert 3 * band == band * 3 == Band(6.0, 3.0, 12.0)
    assert 8 / band == Band(4.0, 2.0, 8.0)
    assert band / 2 == Band(1.0, 0.5, 2.0)


def test_a_negative_end_is_lowest_with_the_largest_factor():
    assert (Band(0.0, -1.0, 1.0) * Band(2.0, 1.0, 3.0)) == Band(0.0, -3.0, 3.0)


def test_sums_and_the_longest_of_several():
    bands = [Band(1.0, 0.5, 4.0), Band(2.0, 1.5, 2.5)]
    assert sum_bands(bands) == Band(3.0, 2.0, 6.5)
    assert sum_bands([]) == Band.exact(0.0)
    assert largest(*bands) == Band(2.0, 1.5, 4.0)
    assert spread(10.0, 0.9, 1.2) == Band(10.0, 9.0, 12.0)
    assert Band(2.0, 1.0, 3.0).widened(2.0) == Band(2.0, 0.5, 6.0)


@pytest.mark.parametrize(
    "broken",
    [
        lambda: Band(1.0, 2.0, 3.0),
        lambda: Band(float("nan"), 0.0, 1.0),
        lambda: Band(1.0, 0.0, 2.0) * -1,
        lambda: 1 / Band(1.0, 0.0, 2.0),
        lambda: Band(1.0, 1.0, 1.0) / 0,
        lambda: largest(),
    ],
)
def test_what_has_no_interval_is_an_error(broken):
    with pytest.raises(AssertionError):
        broken()
