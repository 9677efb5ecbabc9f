import gzip
import lzma
import math
import random
import shutil
import subprocess

import pytest

from dovetail.text.yardstick import bits_per_byte, compressed_sizes


def test_same_bits_as_the_compressors(source: str) -> None:
    data = source.encode()
    sizes = compressed_sizes([data[:1000], data[1000:]])
    assert list(sizes) == ["xz -9", "gzip -9"]
    assert sizes["xz -9"] == 8 * len(lzma.compress(data, preset=9)) / len(data)
    assert sizes["gzip -9"] == 8 * len(gzip.compress(data, 9)) / len(data)


@pytest.mark.parametrize("command", [["xz", "-9", "-c"], ["gzip", "-9", "-c", "-n"]])
def test_agrees_with_the_program(source: str, command: list[str]) -> None:
    """The library and the command may differ by a few header bytes."""
    assert shutil.which(command[0])
    data = source.encode() * 3
    program = subprocess.run(command, input=data, capture_output=True, check=True).stdout
    assert compressed_sizes([data])[" ".join(command[:2])] * len(data) / 8 == pytest.approx(len(program), abs=32)


def test_noise_does_not_compress_and_repetition_does() -> None:
    noise = random.Random(0).randbytes(100_000)
    assert all(8 < size < 8.05 for size in compressed_sizes([noise]).values())
    assert compressed_sizes([noise, noise])["xz -9"] < 4.1  # sees across documents
    assert compressed_sizes([noise, noise])["gzip -9"] > 7.9  # its window is 32 KiB


def test_no_text() -> None:
    with pytest.raises(ValueError, match="no bytes to compress"):
        compressed_sizes([])


def test_bits_per_byte() -> None:
    assert bits_per_byte(math.log(2) * 30, 10) == pytest.approx(3.0)
