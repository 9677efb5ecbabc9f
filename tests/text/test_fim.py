import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dovetail.text.documents import DataConfig, Document
from dovetail.text.fim import document_uniforms, fill_in_middle
from dovetail.text.newline_split import combined_tokens, split_combined
from dovetail.text.prepare import encode_documents
from dovetail.text.tokenizer import Tokenizer


@settings(deadline=None, max_examples=60)
@given(text=st.text(max_size=40), seed=st.integers(0, 2**63), index=st.integers(0, 2**63))
def test_parts_are_the_document_and_nothing_is_drawn_from_outside(text: str, seed: int, index: int) -> None:
    parts = fill_in_middle(text, seed, index, rate=1.0)
    assert parts is not None
    assert parts.prefix + parts.middle + parts.suffix == text
    assert fill_in_middle(text, seed, index, rate=1.0) == parts
    assert fill_in_middle(text, seed, index, rate=0.0) is None


def test_share_of_cut_documents() -> None:
    cut = sum(fill_in_middle("some text", 0, index, 0.1) is not None for index in range(5000))
    assert 415 < cut < 585  # 500 +- 4 standard deviations of the binomial


def test_cuts_are_uniform_and_independent_of_the_choice() -> None:
    cuts = [fill_in_middle("x" * 999, 3, index, 0.5) for index in range(4000)]
    starts = [len(parts.prefix) for parts in cuts if parts]
    middles = [len(parts.middle) for parts in cuts if parts]
    # The smaller of two uniform numbers has mean 1/3, their distance too; standard error 0.0053.
    assert sum(starts) / len(starts) / 1000 == pytest.approx(1 / 3, abs=0.025)
    assert sum(middles) / len(middles) / 1000 == pytest.approx(1 / 3, abs=0.025)


def test_seed_and_document_change_the_cut() -> None:
    drawn = {tuple(document_uniforms(seed, index, 3)) for seed in range(5) for index in range(5)}
    assert len(drawn) == 25
    # Pinned: numpy keeps raw Philox words as they are, so shards made years apart agree.
    assert document_uniforms(0, 0, 1) == [PINNED_UNIFORM]


PINNED_UNIFORM = 0.011546754286331562


def is_prefix_suffix_middle(tokenizer: Tokenizer, ids: list[int], text: str) -> bool:
    """Whether ids are bos fim_begin prefix fim_hole suffix fim_end middle eos of `text`."""
    hole, end = ids.index(3), ids.index(4)
    prefix, suffix, middle = (tokenizer.decode(part) for part in (ids[2:hole], ids[hole + 1 : end], ids[end + 1 : -1]))
    return ids[:2] == [0, 2] and ids[-1] == 1 and prefix + middle + suffix == text


def test_layout_of_a_cut_document(tokenizer: Tokenizer, source: str) -> None:
    text = source[:300]
    (encoded,) = encode_documents([Document("a", text, 300)], tokenizer, DataConfig(fim_rate=1.0))
    assert is_prefix_suffix_middle(tokenizer, encoded.ids, text)
    # Suffix before prefix, the other order in use, is told apart.
    hole, end = encoded.ids.index(3), encoded.ids.index(4)
    swapped = [0, 2, *encoded.ids[hole + 1 : end], 3, *encoded.ids[2:hole], *encoded.ids[end:]]
    assert not is_prefix_suffix_middle(tokenizer, swapped, text)


def test_cuts_fall_inside_words(tokenizer: Tokenizer, source: str) -> None:
    """Characters are cut, not tokens: otherwise the parts' tokens would always be the tokens of the whole."""
    documents = [Document(str(i), source[:200], 200) for i in range(20)]
    whole = tokenizer.encode(source[:200])
    rejoined = []
    for encoded in encode_documents(documents, tokenizer, DataConfig(fim_rate=1.0)):
        hole, end = encoded.ids.index(3), encoded.ids.index(4)
        rejoined.append(encoded.ids[2:hole] + encoded.ids[end + 1 : -1] + encoded.ids[hole + 1 : end])
    assert sum(ids != whole for ids in rejoined) > 3


def test_only_the_share_is_cut_and_order_is_kept(tokenizer: Tokenizer) -> None:
    texts = [f"document number {i} " * 5 for i in range(300)]
    documents = [Document(str(i), text, len(text)) for i, text in enumerate(texts)]
    encoded = list(encode_documents(documents, tokenizer, DataConfig(fim_rate=0.1)))
    assert len(encoded) == 300
    cut = 0
    for text, document in zip(texts, encoded, strict=True):
        if 2 in document.ids:
            cut += 1
            assert is_prefix_suffix_middle(tokenizer, document.ids, text)
        else:
            assert document.ids == [0, *tokenizer.encode(text), 1]
    assert 10 <= cut <= 52  # 30 +- 4 standard deviations


@pytest.fixture(scope="module")
def line_tokenizer() -> Tokenizer:
    return Tokenizer.train(["def f(x):\n    return (x)\n\nif a.b():\n        c()\n" * 50], 340)


def test_combined_tokens_are_punctuation_and_line_breaks(line_tokenizer: Tokenizer) -> None:
    combined = combined_tokens(line_tokenizer)
    assert combined
    for token_id, pieces in combined.items():
        text = line_tokenizer.decode([token_id])
        assert line_tokenizer.decode(pieces) == text and len(pieces) > 1
        first = line_tokenizer.decode(pieces[:1])
        assert "\n" not in first and "\n" in text
    texts = {line_tokenizer.decode([i]) for i in combined}
    assert "):\n    " in texts and ")\n\n" in texts and "    " not in texts


@settings(deadline=None, max_examples=40)
@given(
    text=st.text("()x:. \n", max_size=40),
    seed=st.integers(0, 2**63),
    index=st.integers(0, 99),
    rate=st.floats(0, 1),
)
def test_split_keeps_the_text(line_tokenizer: Tokenizer, text: str, seed: int, index: int, rate: float) -> None:
    combined, ids = combined_tokens(line_tokenizer), line_tokenizer.encode(text)
    split = split_combined(ids, combined, seed, index, rate)
    assert line_tokenizer.decode(split) == text
    assert split == split_combined(ids, combined, seed, index, rate)
    assert split_combined(ids, combined, seed, index, 0.0) == ids
    assert not set(split_combined(ids, combined, seed, index, 1.0)) & combined.keys()


def test_split_share(line_tokenizer: Tokenizer) -> None:
    combined = combined_tokens(line_tokenizer)
    ids = [next(iter(combined))] * 1000
    kept = [split_combined(ids, combined, 0, index, 0.2).count(ids[0]) for index in range(5)]
    assert 3800 < sum(kept) < 4200  # 4000 +- 7 standard deviations
    assert len(set(kept)) > 1  # each document draws for itself


def test_settings_need_their_tokens(tokenizer: Tokenizer, line_tokenizer: Tokenizer) -> None:
    import dataclasses

    documents = [Document("a", "text", 4)]
    without_fim = dataclasses.replace(tokenizer, fim_hole=None)
    with pytest.raises(ValueError, match=r"no fill-in-the-middle tokens; set data\.fim_rate to 0"):
        list(encode_documents(documents, without_fim, DataConfig()))
    assert list(encode_documents(documents, without_fim, DataConfig(fim_rate=0)))
    with pytest.raises(ValueError, match="no end-of-text token"):
        list(encode_documents(documents, dataclasses.replace(tokenizer, eos_id=None), DataConfig()))
    with pytest.raises(ValueError, match=r"set data\.newline_split_rate to 0"):
        without_bytes = dataclasses.replace(tokenizer, piece_bytes=None)
        list(encode_documents(documents, without_bytes, DataConfig(newline_split_rate=0.1)))
    without_bos = dataclasses.replace(tokenizer, bos_id=None)
    (encoded,) = encode_documents(documents, without_bos, DataConfig(fim_rate=0))
    assert encoded.ids == [*tokenizer.encode("text"), 1]
