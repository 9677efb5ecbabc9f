"""A byte-level BPE tokenizer, trained here or read from a published `tokenizer.json`.

The 256 bytes are the alphabet, so every string is encoded and decoded exactly. Text is first cut into words that no
merge may cross. DeepSeek-V3's pattern joins punctuation with the line breaks after it [V3 §4.1]; ours
(`SOURCE_PATTERN`) joins the indentation of the next line as well, so "):\\n        " is one token. On the Python
standard library, with 4,096 tokens, that gives 3.92 bytes per token instead of 3.67.

Text never becomes a special token: "<|end_of_sentence|>" inside a document is encoded as ordinary characters, and
whoever builds a sequence adds the special ids. The `tokenizers` library does the work.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from threading import Event
from typing import Any

import tokenizers
from tokenizers import Regex, decoders, models, pre_tokenizers, processors, trainers

from dovetail import atomic
from dovetail.background import in_background
from dovetail.config import read_json, read_text

# How DeepSeek-V3's published tokenizer cuts words, from memory (unverified), without its rule for Han and kana.
DEEPSEEK_PATTERN = (
    r"\p{N}{1,3}"
    r"|[!-/:-@\[-`{-~][A-Za-z]+"
    r"|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    r"| ?[\p{P}\p{S}]+[\r\n]*"
    r"|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
SOURCE_PATTERN = DEEPSEEK_PATTERN.replace(r"[\p{P}\p{S}]+[\r\n]*", r"[\p{P}\p{S}]+(?:[\r\n]+[ \t]*)?").replace(
    r"\s*[\r\n]+", r"\s*[\r\n]+[ \t]*"
)

# Learning from a word takes the square of its length, and a padded line may be one word: a longer one is learnt from
# in parts. Encoding cuts nothing. A word is up to three runs of letters, punctuation or white space: LONG_RUN finds it.
LONGEST_WORD = 1024  # characters
LONG_RUN = re.compile(rf"(?<!\S)(?:\S{{{LONGEST_WORD // 3},}}\s*|\S*\s{{{LONGEST_WORD // 3},}})")

BOS, EOS = "<|begin_of_sentence|>", "<|end_of_sentence|>"  # ids 0 and 1, as in DeepSeek-V3's config.json
FIM_BEGIN, FIM_HOLE, FIM_END = "<|fim_begin|>", "<|fim_hole|>", "<|fim_end|>"
SPECIAL_TOKENS = (BOS, EOS, FIM_BEGIN, FIM_HOLE, FIM_END)
MINIMUM_VOCABULARY = 256 + len(SPECIAL_TOKENS)

# Spellings in published tokenizers, from memory (unverified); the first one present wins. DeepSeek writes
# them with U+FF5C and U+2581.
KNOWN_SPELLINGS = {
    "bos": (BOS, "<\uff5cbegin\u2581of\u2581sentence\uff5c>", "<|begin_of_text|>", "<s>", "<bos>"),
    "eos": (
        EOS,
        "<\uff5cend\u2581of\u2581sentence\uff5c>",
        "<|end_of_text|>",
        "</s>",
        "<eos>",
        "<|endoftext|>",
    ),
    "fim_begin": (FIM_BEGIN, "<\uff5cfim\u2581begin\uff5c>", "<|fim_prefix|>", "<fim_prefix>"),
    "fim_hole": (FIM_HOLE, "<\uff5cfim\u2581hole\uff5c>", "<|fim_suffix|>", "<fim_suffix>"),
    "fim_end": (FIM_END, "<\uff5cfim\u2581end\uff5c>", "<|fim_middle|>", "<fim_middle>"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Tokenizer:
    """A `tokenizers.Tokenizer`, and the special ids that the rest of the package uses; a missing one is None."""

    backend: tokenizers.Tokenizer = field(repr=False)
    vocab_size: int  # one more than the largest id: the rows of an embedding
    bos_id: int | None
    eos_id: int | None
    fim_begin: int | None
    fim_hole: int | None
    fim_end: int | None
    piece_bytes: tuple[bytes, ...] | None = field(repr=False)  # by id; None if the decoder is not byte-level

    @staticmethod
    def train(
        documents: Iterable[str],
        vocab_size: int,
        pattern: str = SOURCE_PATTERN,
        report: Callable[[str], None] = lambda line: None,
    ) -> Tokenizer:
        """Learn a byte-level BPE of `vocab_size` tokens, special ones included; too little text gives fewer.

        `report` is told how far it is every ten seconds, and of words beyond `LONGEST_WORD`. Raises ValueError if
        `vocab_size` has no room for the 256 bytes and the special tokens.
        """
        return train(documents, vocab_size, pattern, report)

    @staticmethod
    def load(path: str | Path) -> Tokenizer:
        """Read a `tokenizer.json`, or the one in the directory `path`."""
        return _load(Path(path))

    def save(self, path: str | Path) -> None:
        """Write `tokenizer.json` and, beside it, the `tokenizer_config.json` that `transformers` asks for.

        `path` is the directory, or the name of the JSON file. Each file is replaced in one step.
        """
        path = tokenizer_file(Path(path))
        config = {key: value for key, value in transformers_config(self).items() if value is not None}
        atomic.write_bytes(path, self.backend.to_str(pretty=True).encode())
        atomic.write_bytes(path.with_name("tokenizer_config.json"), json.dumps(config, indent=2).encode())

    def encode(self, text: str) -> list[int]:
        """Return the ids of `text` alone: no special token is added, and none is recognised inside it."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Encode each text, on every core. Raises ValueError for a lone surrogate, which is no character."""
        try:
            encodings = self.backend.encode_batch_fast(list(texts), add_special_tokens=False)
        except TypeError as error:  # the library says no more of a lone surrogate
            raise ValueError(
                "text holds a lone surrogate (U+D800 to U+DFFF), which is no character; "
                "decode its bytes as UTF-8, or use encode_bytes"
            ) from error
        return [encoding.ids for encoding in encodings]

    def least_tokens(self, text: str) -> int:
        """Return how many tokens `text` has at least, without encoding it."""
        return len(text) // max(map(len, self.piece_bytes or self.backend.get_vocab(with_added_tokens=True)))

    def encode_bytes(self, data: bytes) -> list[int]:
        """Return the ids of any bytes; what is not UTF-8 becomes one token per byte. Raises ValueError for a
        tokenizer that is not byte-level.
        """
        if self.piece_bytes is None:
            raise ValueError("this tokenizer.json is not byte-level: only text can be encoded")
        ids: list[int] = []
        for run in re.findall("[\udc80-\udcff]+|[^\udc80-\udcff]+", data.decode("utf-8", "surrogateescape")):
            if "\udc80" <= run[0] <= "\udcff":
                stray = run.encode("utf-8", "surrogateescape")
                ids += [self.piece_bytes.index(bytes([byte])) for byte in stray]
            else:
                ids += self.encode(run)
        return ids

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """Return the exact bytes of `ids`; special tokens have none.

        Raises ValueError for a tokenizer that is not byte-level.
        """
        if self.piece_bytes is None:
            raise ValueError("this tokenizer.json is not byte-level: use decode")
        return b"".join([self.piece_bytes[i] for i in ids])

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of `ids` without special tokens; bytes that are not UTF-8 become U+FFFD."""
        if self.piece_bytes is None:
            return str(self.backend.decode(list(ids), skip_special_tokens=True))
        return self.decode_bytes(ids).decode("utf-8", "replace")

    @property
    def fingerprint(self) -> str:
        """Return the sha256 of the whole tokenizer; tokenizers with the same one encode alike."""
        return hashlib.sha256(self.backend.to_str().encode()).hexdigest()


def check_vocabulary(vocab_size: int) -> None:
    """Raise ValueError for a vocabulary that no tokenizer can be trained for."""
    if vocab_size < MINIMUM_VOCABULARY:
        raise ValueError(
            f"vocab_size {vocab_size} is too small: 256 bytes and {len(SPECIAL_TOKENS)} special tokens "
            f"need at least {MINIMUM_VOCABULARY}"
        )


def train(documents: Iterable[str], vocab_size: int, pattern: str, report: Callable[[str], None]) -> Tokenizer:
    check_vocabulary(vocab_size)
    backend = tokenizers.Tokenizer(models.BPE())
    words = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
    parts = pre_tokenizers.Split(Regex(rf"[\s\S]{{{LONGEST_WORD}}}"), behavior="isolated")
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([words, parts, to_bytes])
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    num_characters, long_words = 0, list[int]()

    def read(stopped: Event) -> Iterator[str]:
        nonlocal num_characters
        for text in itertools.takewhile(lambda text: not stopped.is_set(), documents):
            yield text
            num_characters += len(text)
            for run in LONG_RUN.finditer(text):
                lengths = (len(word) for word, _ in words.pre_tokenize_str(run[0]))
                long_words.extend(length for length in lengths if length > LONGEST_WORD)

    in_background(
        lambda stopped: backend.train_from_iterator(read(stopped), trainer),
        lambda: report(f"learning the tokenizer from {num_characters / 1e6:,.1f} million characters so far"),
    )
    if long_words:
        count = f"{len(long_words):,} (the longest has {max(long_words):,})"
        report(f"words of more than {LONGEST_WORD:,} characters, which were learnt from in parts: {count}")
    backend.pre_tokenizer = pre_tokenizers.Sequence([words, to_bytes])
    # Published DeepSeek tokenizers put bos before a prompt; `encode` above does not.
    backend.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, 0)]
    )
    return wrap(backend, {})


def _load(path: Path) -> Tokenizer:
    path = tokenizer_file(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such file; give a published tokenizer.json, or train one")
    try:
        backend = tokenizers.Tokenizer.from_str(read_text(path))
    except Exception as error:  # the library raises bare Exception
        raise ValueError(
            f"{path}: not a tokenizer.json that `tokenizers` can read ({error}); copy the file again, or "
            "update the package: pip install -U tokenizers"
        ) from error
    config_path = path.with_name("tokenizer_config.json")
    return wrap(backend, read_json(config_path) if config_path.is_file() else {})


def tokenizer_file(path: Path) -> Path:
    return path if path.suffix == ".json" else path / "tokenizer.json"


def wrap(backend: tokenizers.Tokenizer, named: dict[str, Any]) -> Tokenizer:
    """Find the special ids. Those that `named`, a tokenizer_config.json, names (as text or table) come first."""
    backend.encode_special_tokens = True  # text stays text
    backend.no_padding()
    backend.no_truncation()
    vocabulary = backend.get_vocab(with_added_tokens=True)

    def find(role: str) -> int | None:
        given = named.get(f"{role}_token")
        given = given.get("content") if isinstance(given, dict) else given
        spellings = (*([given] if given else []), *KNOWN_SPELLINGS[role])
        return next((vocabulary[spelling] for spelling in spellings if spelling in vocabulary), None)

    return Tokenizer(
        backend=backend,
        vocab_size=max(vocabulary.values()) + 1,
        bos_id=find("bos"),
        eos_id=find("eos"),
        fim_begin=find("fim_begin"),
        fim_hole=find("fim_hole"),
        fim_end=find("fim_end"),
        piece_bytes=bytes_of_pieces(backend, vocabulary),
    )


def transformers_config(tokenizer: Tokenizer) -> dict[str, Any]:
    def spelling(token_id: int | None) -> str | None:
        return None if token_id is None else tokenizer.backend.id_to_token(token_id)

    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": spelling(tokenizer.bos_id),
        "eos_token": spelling(tokenizer.eos_id),
        "pad_token": spelling(tokenizer.eos_id),  # batches need a pad token; its positions are masked
        "clean_up_tokenization_spaces": False,  # True would drop spaces before punctuation
        "model_input_names": ["input_ids", "attention_mask"],
    }


def bytes_of_pieces(backend: tokenizers.Tokenizer, vocabulary: dict[str, int]) -> tuple[bytes, ...] | None:
    """Return the bytes of every id (b"" for special tokens and gaps), or None if the decoder is not byte-level."""
    decoder = json.loads(backend.to_str()).get("decoder") or {}
    if decoder.get("type") != "ByteLevel":
        return None
    alphabet = byte_alphabet()
    added = backend.get_added_tokens_decoder()
    pieces = [b""] * (max(vocabulary.values()) + 1)
    for piece, token_id in vocabulary.items():
        if token_id in added:
            pieces[token_id] = b"" if added[token_id].special else piece.encode()
        elif alphabet.keys() >= set(piece):
            pieces[token_id] = bytes([alphabet[character] for character in piece])
        else:
            pieces[token_id] = piece.encode()  # as the library's decoder does
    return tuple(pieces)


@cache
def byte_alphabet() -> dict[str, int]:
    """Return the byte of each character in GPT-2's spelling: printable Latin-1 as it is, the rest from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}
