"""Sizes with units."""

import pytest

from dovetail.network.ask.sizes import parse_size


@pytest.mark.parametrize(
    ("text", "size"),
    [("0B", 0), ("64 B", 64), ("1KB", 1000), ("1KiB", 1024), ("1.5MiB", 1572864), ("1GiB", 2**30), ("2e3MB", 2e9)],
)
def test_sizes(text: str, size: float) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1024", "has no unit: write 1024B, 1024KiB"),
        ("1G", "did you mean GB or GiB"),
        ("1mib", "did you mean MiB"),
        ("1TB", "known: B, KB"),
        ("-1GiB", "use 0B, or 1B to"),
        ("1e400B", "to 1073741824GiB"),
        ("1e308B", "to 1073741824GiB"),
        ("1e-300B", "or 1B"),
        ("nanB", "expected a number"),
        ("1.2.3B", "is not a number"),
        ("", "expected a number"),
    ],
)
def test_sizes_that_are_none(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_size(text)
