import json
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers

from dovetail.text.tokenizer import DEEPSEEK_PATTERN, EOS, SOURCE_PATTERN, SPECIAL_TOKENS, Tokenizer

FULL_WIDTH = {role: f"<\uff5c{name}\uff5c>" for role, name in {
    "bos": "begin\u2581of\u2581sentence", "eos": "end\u2581of\u2581sentence",
    "begin": "fim\u2581begin", "hole": "fim\u2581hole", "end": "fim\u2581end",
}.items()}  # fmt: skip


def test_special_ids_come_first_in_the_published_order(tokenizer: Tokenizer) -> None:
    assert (tokenizer.bos_id, tokenizer.eos_id) == (0, 1)
    assert (tokenizer.fim_begin, tokenizer.fim_hole, tokenizer.fim_end) == (2, 3, 4)
    assert tokenizer.vocab_size == 512


@settings(deadline=None, max_examples=60)
@given(text=st.text() | st.text("\u00e9\u6f22\U0001f389 \t\r\n():.,'\"aZ_09\x00\x7f\u0301\u200d", max_size=60))
def test_text_comes_back_exactly(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


@settings(deadline=None, max_examples=60)
@given(data=st.binary() | st.text().map(str.encode))
def test_bytes_come_back_exactly(tokenizer: Tokenizer, data: bytes) -> None:
    assert tokenizer.decode_bytes(tokenizer.encode_bytes(data)) == data


def test_every_byte_has_a_token(tokenizer: Tokenizer) -> None:
    data = bytes(range(256))
    assert tokenizer.decode_bytes(tokenizer.encode_bytes(data)) == data
    assert all(tokenizer.decode_bytes(tokenizer.encode_bytes(bytes([b, 0xFF]))) == bytes([b, 0xFF]) for b in data)


def test_batch_is_each_text_alone(tokenizer: Tokenizer, source: str) -> None:
    texts = ["", "a", source, "x = 1\n" * 3]
    assert tokenizer.encode_batch(texts) == [tokenizer.encode(text) for text in texts]
    assert tokenizer.encode_batch([]) == []


def test_text_never_becomes_a_special_token(tokenizer: Tokenizer) -> None:
    text = "a" + "".join(SPECIAL_TOKENS) + "b"
    ids = tokenizer.encode(text)
    assert not set(ids) & {0, 1, 2, 3, 4}
    assert tokenizer.decode(ids) == text
    # The library left to itself does inject them.
    plain = tokenizers.Tokenizer.from_str(tokenizer.backend.to_str())
    assert 1 in plain.encode(text, add_special_tokens=False).ids


def test_special_tokens_decode_to_nothing(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("ab")
    assert tokenizer.decode([0, *ids, 1]) == "ab"
    assert tokenizer.decode([]) == ""


def test_indentation_stays_with_the_line_break() -> None:
    text = "def f(x):\n        return g(x)\n\n" * 40
    pieces = {}
    for pattern in (SOURCE_PATTERN, DEEPSEEK_PATTERN):
        tokenizer = Tokenizer.train([text], 400, pattern)
        pieces[pattern] = {tokenizer.decode_bytes([i]) for i in range(tokenizer.vocab_size)}
    assert b"):\n        " in pieces[SOURCE_PATTERN]
    assert b"):\n" in pieces[DEEPSEEK_PATTERN] and b"):\n        " not in pieces[DEEPSEEK_PATTERN]


def test_numbers_are_cut_after_three_digits(tokenizer: Tokenizer) -> None:
    learnt = Tokenizer.train(["1234567 " * 50], 400)
    assert max(len(learnt.decode_bytes([i])) for i in learnt.encode("1234567")) == 3


@pytest.mark.parametrize("run", [" ", "\n ", "=", "\u00e9"])
def test_a_very_long_word_is_learnt_from_in_parts_and_encoded(source: str, tokenizer: Tokenizer, run: str) -> None:
    """Without parts, learning from it takes minutes, and does not hear Ctrl-C."""
    text = "id" + run * (250_000 // len(run)) + "value"
    lines: list[str] = []
    learnt = Tokenizer.train([source, text], 512, report=lines.append)
    (line,) = lines
    assert re.fullmatch(r"words of more than 1,024 characters, .* in parts: 1 \(the longest has 250,00\d\)", line)
    assert max(len(learnt.decode_bytes([i])) for i in range(learnt.vocab_size)) <= 2048
    for each in (learnt, tokenizer):
        assert each.decode(each.encode(text)) == text
    assert "1024" not in learnt.backend.to_str()  # the saved file cuts words as before


def test_ordinary_words_are_not_mentioned(source: str) -> None:
    assert Tokenizer.train([source, "=" * 1024, " " * 1024], 300, report=pytest.fail).vocab_size == 300


def test_training_does_not_depend_on_the_process(source: str, tokenizer: Tokenizer) -> None:
    """Same text, same tokenizer: hash seeds and thread timing leave no trace."""
    code = (
        "import inspect, textwrap; from dovetail.text.tokenizer import Tokenizer; "
        "print(Tokenizer.train([inspect.getsource(textwrap)], 512).fingerprint)"
    )
    environment = {
        "PYTHONPATH": str(Path(__file__).parents[2] / "src"),
        "PYTHONHASHSEED": "7",
        "RAYON_NUM_THREADS": "1",
    }
    found = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == tokenizer.fingerprint


def test_saved_and_loaded_is_the_same(tokenizer: Tokenizer, source: str, tmp_path: Path) -> None:
    tokenizer.save(tmp_path / "out")
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == [
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    for path in (tmp_path / "out", tmp_path / "out" / "tokenizer.json", str(tmp_path / "out")):
        loaded = Tokenizer.load(path)
        assert loaded.fingerprint == tokenizer.fingerprint
        assert loaded.encode(source) == tokenizer.encode(source)
        assert (loaded.bos_id, loaded.eos_id, loaded.fim_hole) == (0, 1, 3)


def test_failed_save_leaves_the_old_file(tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer.save(tmp_path)
    before = (tmp_path / "tokenizer.json").read_bytes()

    def fail(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(OSError, match="the disk is full, nothing was left behind; free some space"):
        Tokenizer.train(["other text"], 300).save(tmp_path)
    assert (tmp_path / "tokenizer.json").read_bytes() == before
    assert sorted(file.name for file in tmp_path.iterdir()) == ["tokenizer.json", "tokenizer_config.json"]


def test_transformers_loads_it(tokenizer: Tokenizer, source: str, tmp_path: Path) -> None:
    import transformers

    tokenizer.save(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert (theirs.bos_token_id, theirs.eos_token_id, len(theirs)) == (0, 1, 512)
    text = source + "do n't , \u6f22 \U0001f389"
    ids = theirs.encode(text, add_special_tokens=False)
    assert ids == tokenizer.encode(text)
    assert theirs.decode(ids) == text
    assert theirs.encode("ab") == [0, *tokenizer.encode("ab")]


def published(path: Path, special: list[str], others: Sequence[str] = ()) -> None:
    """A byte-level tokenizer.json as others publish it, without our names."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(["hello world, hello there"], trainer)
    backend.add_tokens([AddedToken(text, special=False) for text in others])
    backend.save(str(path))


def test_deepseek_spellings_are_found(tmp_path: Path) -> None:
    published(tmp_path / "tokenizer.json", list(FULL_WIDTH.values()), ["<think>"])
    loaded = Tokenizer.load(tmp_path)
    assert (loaded.bos_id, loaded.eos_id, loaded.fim_begin, loaded.fim_hole, loaded.fim_end) == (
        0,
        1,
        2,
        3,
        4,
    )
    think = loaded.encode("<think>hi")
    assert think[0] == loaded.vocab_size - 1
    assert loaded.decode([*think, 1]) == "<think>hi"


def test_missing_special_tokens_are_none(tmp_path: Path) -> None:
    published(tmp_path / "tokenizer.json", ["<|fim_prefix|>", "<|endoftext|>"])
    loaded = Tokenizer.load(tmp_path)
    assert (loaded.bos_id, loaded.eos_id, loaded.fim_begin, loaded.fim_hole, loaded.fim_end) == (
        None,
        1,
        0,
        None,
        None,
    )
    loaded.save(tmp_path / "again")
    assert "bos_token" not in json.loads((tmp_path / "again" / "tokenizer_config.json").read_text())
    assert Tokenizer.load(tmp_path / "again").bos_id is None


@pytest.mark.parametrize("eos", ["<turn>", {"content": "<turn>", "special": True}])
def test_tokenizer_config_comes_before_known_names(tmp_path: Path, eos: object) -> None:
    published(tmp_path / "tokenizer.json", ["<|endoftext|>", "<turn>"])
    assert Tokenizer.load(tmp_path).eos_id == 0
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": eos, "bos_token": None}))
    assert Tokenizer.load(tmp_path).eos_id == 1


def test_gaps_in_the_ids_count_for_the_embedding(tmp_path: Path) -> None:
    published(tmp_path / "tokenizer.json", [EOS])
    table = json.loads((tmp_path / "tokenizer.json").read_text())
    table["model"]["vocab"]["zz"] = 999
    (tmp_path / "tokenizer.json").write_text(json.dumps(table))
    assert Tokenizer.load(tmp_path).vocab_size == 1000


def test_too_small_a_vocabulary() -> None:
    with pytest.raises(ValueError, match=r"vocab_size 260 .* at least 261"):
        Tokenizer.train(["abc"], 260)
    assert Tokenizer.train(["abc"], 261).vocab_size == 261
    assert Tokenizer.train([], 300).decode(Tokenizer.train([], 300).encode("any\u00e9")) == "any\u00e9"


def test_unreadable_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"nowhere/tokenizer\.json: no such file"):
        Tokenizer.load(tmp_path / "nowhere")
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0", "model"')
    with pytest.raises(ValueError, match=r"tokenizer\.json: not a tokenizer\.json"):
        Tokenizer.load(tmp_path)


def test_lone_surrogate_is_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(ValueError, match="lone surrogate"):
        tokenizer.encode("a\ud800b")
