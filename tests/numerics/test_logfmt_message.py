"""The combine message: which chunks are cast, what comes out, how many bytes it takes."""

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from dovetail.numerics.logfmt import BITS, round_to_logfmt
from dovetail.numerics.logfmt_message import Message, cast_chunks, decode_message, encode_message

Draw = Callable[..., Tensor]
CHUNK = 2 * 128


def outputs(draw: Draw, rows: int, columns: int) -> Tensor:
    """Like experts' outputs: below 1, so that every chunk can be cast."""
    return draw(rows, columns).clamp(-6, 6).mul(0.1).bfloat16()


def send(x: Tensor, bits: int = 10) -> Message:
    return encode_message(x, bits, chunk_tiles=2)


@pytest.mark.parametrize("bits", BITS)
def test_cast_rows_come_out_as_logfmt(bits: int, draw: Draw) -> None:
    x = outputs(draw, 3, 4 * CHUNK)
    message = send(x, bits)
    assert cast_chunks(message.extremes, 2).all()
    assert torch.equal(decode_message(message), round_to_logfmt(x, bits))
    assert message.num_bytes == 3 * 8 * (16 * bits + 4)


def test_bytes_of_a_model_row(draw: Draw) -> None:
    """7,168 values in LogFMT-10: 9,184 bytes, 1.28 a value; as BF16 14,336 and the metadata [DeepEP]."""
    x = outputs(draw, 1, 7168)
    assert encode_message(x).num_bytes == 9184
    assert encode_message(x * 100).num_bytes == 14336 + 4 * 56


@pytest.mark.parametrize(
    ("tile", "is_cast"),
    [
        ([0.5, 0.25], True),
        ([0.99609375, 0.25], True),  # the largest BF16 below 1
        ([1.0, 0.25], False),
        ([-1.0, 0.25], False),
        ([0.5, 0.5, -0.5], False),  # no range
        ([0.5, 0.5, 0.0], False),  # zeros are no part of the range
        ([0.0, 0.0], False),
        ([0.5, 0.25, 0.0], True),
        ([0.5, 2.0**-120], True),
        ([0.5, math.nan], False),
        ([math.inf, 0.5], False),
    ],
)
def test_one_tile_decides_for_its_chunk(tile: list[float], is_cast: bool, draw: Draw) -> None:
    x = outputs(draw, 2, 3 * CHUNK)
    x[1, CHUNK + 128 : CHUNK + 256] = torch.tensor(tile).repeat(128)[:128]
    message, restored = send(x), decode_message(send(x))
    assert cast_chunks(message.extremes, 2).tolist() == [[True] * 3, [True, is_cast, True]]
    chunk = slice(CHUNK, 2 * CHUNK)
    if is_cast:
        assert torch.equal(restored, round_to_logfmt(x, 10))
    else:
        assert torch.equal(restored[1, chunk].view(torch.int16), x[1, chunk].view(torch.int16))  # BF16, NaN included
        x[1, chunk] = restored[1, chunk] = 0
        assert torch.equal(restored, round_to_logfmt(x, 10))
    sizes = [2 * 160] * 5 + [2 * 160 if is_cast else 2 * 256]
    assert message.payload.numel() == sum(sizes)


def test_mixed_rows_are_restored_in_their_places(draw: Draw) -> None:
    x = outputs(draw, 16, 4 * CHUNK).unflatten(1, (4, CHUNK))
    is_large = draw(16, 4) > 0
    x = torch.where(is_large[..., None], x * 100, x)
    message = send(x.flatten(1), 8)
    assert torch.equal(cast_chunks(message.extremes, 2), ~is_large)
    expected = torch.where(is_large[..., None], x, round_to_logfmt(x.flatten(1), 8).view_as(x))
    assert torch.equal(decode_message(message), expected.flatten(1))
    assert message.payload.numel() == int(torch.where(is_large, 2 * 256, 2 * 128).sum())


def test_strides_and_gradients_do_not_matter(draw: Draw) -> None:
    x = outputs(draw, 2 * CHUNK, 5).t()
    assert torch.equal(decode_message(send(x)), decode_message(send(x.contiguous().requires_grad_())))
    kept = x.clone()
    send(x)
    assert torch.equal(x, kept)


@pytest.mark.parametrize("shape", [(0, CHUNK), (3, 0)], ids=str)
def test_empty_messages_pass(shape: tuple[int, int]) -> None:
    assert decode_message(send(torch.zeros(shape, dtype=torch.bfloat16))).shape == shape


def test_wrong_inputs_are_refused(draw: Draw) -> None:
    x = outputs(draw, 2, 3 * 128)
    with pytest.raises(ValueError, match=r"384 columns \(shape \[2, 384\]\)"):
        send(x)
    with pytest.raises(ValueError, match=r"float32 \[2, 384\]"):
        send(x.float())
    with pytest.raises(ValueError, match="4 to 12 bits, not 16"):
        encode_message(x, 16, chunk_tiles=3)
    message = encode_message(x, chunk_tiles=3)
    with pytest.raises(ValueError, match="959 bytes of payload; the extremes say 960"):
        decode_message(replace(message, payload=message.payload[:959]))
