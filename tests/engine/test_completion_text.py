import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dovetail.engine.completion_text import CompletionText
from dovetail.text.tokenizer import Tokenizer

BYTES = Tokenizer.train([], 261)  # one token per byte
TEXT = st.text(alphabet="ab\u00e4\u20ac", max_size=12)
STOPS = st.lists(st.text(alphabet="ab\u00e4", min_size=1, max_size=3), max_size=3)


def fed(ids, stop, size=1):
    """Deltas as tokens come `size` at a time, and the text."""
    text = CompletionText(BYTES, stop)
    deltas = []
    for i in range(0, len(ids), size):
        text.push(ids[i : i + size])
        deltas.append(text.take())
    text.finish()
    return [*deltas, text.take()], text


def cut(text, stop):
    """Up to the stop string that is complete first."""
    ends = [(text.find(s) + len(s), text.find(s)) for s in stop if s in text]
    return text[: min(ends)[1]] if ends else text


@settings(max_examples=200, deadline=None)
@given(TEXT, STOPS, st.integers(1, 5))
def test_deltas_are_the_text_up_to_the_stop_string(text, stop, size):
    deltas, result = fed(BYTES.encode(text), stop, size)
    assert "".join(deltas) == result.text == cut(text, stop)
    assert result.is_stopped == any(s in text for s in stop)


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=10))
def test_bytes_that_are_no_characters(data):
    deltas, result = fed(BYTES.encode_bytes(data), [])
    assert "".join(deltas) == result.text == data.decode("utf-8", "replace")


def test_half_a_character_is_held_back():
    deltas, _ = fed(BYTES.encode("a\u20acb"), [])
    assert deltas == ["a", "", "", "\u20ac", "b", ""]


def test_the_beginning_of_a_stop_string_is_held_back():
    assert fed(BYTES.encode("xENy"), ["END"])[0] == ["x", "", "", "ENy", ""]
    assert fed(BYTES.encode("xEND and more"), ["END"])[0] == ["x", *[""] * 13]
    assert fed(BYTES.encode("xEN"), ["END"])[0] == ["x", "", "", "EN"]


@pytest.mark.parametrize("size", [1, 2, 3, 9])
def test_the_stop_string_that_is_complete_first_wins(size):
    assert fed(BYTES.encode("0abcd"), ["abcd", "bc"], size)[1].text == "0a"
    assert fed(BYTES.encode("0abcd"), ["abc", "c"], size)[1].text == "0"
