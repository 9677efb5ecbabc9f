from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers

from dovetail.text.stream import TextStream
from dovetail.text.tokenizer import Tokenizer


def streamed(tokenizer: Tokenizer, ids: list[int], step: int = 1) -> list[str]:
    stream = TextStream(tokenizer)
    return [*[stream.push(ids[i : i + step]) for i in range(0, len(ids), step)], stream.finish()]


@settings(deadline=None, max_examples=60)
@given(ids=st.lists(st.integers(0, 511), max_size=30), step=st.integers(1, 4))
def test_joined_pieces_are_the_decoded_text(tokenizer: Tokenizer, ids: list[int], step: int) -> None:
    """For any ids, valid UTF-8 or not."""
    assert "".join(streamed(tokenizer, ids, step)) == tokenizer.decode(ids)


def test_partial_characters_are_held_back(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("a\U0001f389b")
    assert len(ids) == 6  # the emoji is four tokens of one byte
    assert streamed(tokenizer, ids) == ["a", "", "", "", "\U0001f389", "b", ""]
    # Decoding token by token, the wrong variant, prints replacement characters.
    assert "\ufffd" in "".join(tokenizer.decode([i]) for i in ids)


def test_unfinished_character_is_shown_at_the_end(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("a\u6f22")[:-1]
    assert streamed(tokenizer, ids) == ["a", "", "", "\ufffd"]


def test_real_replacement_character_is_not_held_back(tokenizer: Tokenizer) -> None:
    pieces = streamed(tokenizer, tokenizer.encode("\ufffd"))
    assert pieces[-1] == "" and "".join(pieces) == "\ufffd"


@pytest.fixture(scope="module")
def sentencepiece_like(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """Spaces as U+2581 and bytes as <0xNN>: a published tokenizer that is not byte-level."""
    pieces = ["<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581", "a", "b", "c"]
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    backend = tokenizers.Tokenizer(models.BPE(vocabulary, [], byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens(["<s>", "</s>"])
    path = tmp_path_factory.mktemp("published") / "tokenizer.json"
    backend.save(str(path))
    return Tokenizer.load(path)


@settings(deadline=None, max_examples=60)
@given(text=st.text("ab c\u00e9\u6f22\U0001f389\ufffd", max_size=20))
def test_tokenizers_that_are_not_byte_level(sentencepiece_like: Tokenizer, text: str) -> None:
    tokenizer = sentencepiece_like
    ids = [0, *tokenizer.encode(text), 1]
    assert tokenizer.decode(ids) == text
    assert "".join(streamed(tokenizer, ids)) == text


def test_byte_questions_to_other_tokenizers_are_refused(sentencepiece_like: Tokenizer, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not byte-level"):
        sentencepiece_like.encode_bytes(b"a")
    with pytest.raises(ValueError, match="not byte-level"):
        sentencepiece_like.decode_bytes([5])
