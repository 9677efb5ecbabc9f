"""Which tokens may come next, so that a completion matches a JSON schema, a regex or a grammar.

llguidance does the work: its parser runs over the bytes of the tokens, so a token may span several symbols. What is
here keeps one parser per sequence beside the engine's tokens: forward over tokens, drafts included, and back over
rejected ones. Where only one text can follow, the mask has the tokens that encoding it gives, no others. A grammar may
begin only after a marker such as "</think>": what comes before is free text.

End tokens are kept out of the parser, whose `rollback` counts them at times and at times not.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from functools import cache, cached_property, lru_cache
from typing import Any, Literal

import numpy as np
from llguidance import LLMatcher, LLParserLimits, LLTokenizer
from numpy.typing import NDArray

from dovetail.config import Record
from dovetail.text.stream import pending
from dovetail.text.tokenizer import Tokenizer

COMPILED = 16  # grammars that are kept; the choices of a request, and often many requests, share one

# llguidance has limits of its own, but it follows chains of references by recursion, and on a stack of 8 MiB some 1,200
# references of a schema or 1,800 rules end the process; an optional part costs the square of its number.
LONGEST = {"json_schema": 65_536, "json_object": 0, "regex": 10_000, "lark": 65_536}  # characters
MOST_REFERENCES, MOST_LINES = 250, 500
MOST_STATES = 20_000  # of a lexer, of some 2 kB each

# White space as Python's json writes it. Where any is allowed, small models write it for ever. A schema may have its
# own options, under the key "x-guidance".
JSON_FORM: Mapping[str, Any] = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


class Grammar(Record):
    """What the output has to match, from its start or from the end of `after`."""

    kind: Literal["json_schema", "json_object", "regex", "lark"]
    text: str = ""  # the schema as JSON, the regex, or the lark grammar
    after: str = ""  # text before the end of this marker is free, but it may not end the completion


class GrammarCompiler:
    """Makes the states of sequences. `end_tokens` are allowed where the output may end."""

    def __init__(self, tokenizer: Tokenizer, end_tokens: Iterable[int]) -> None:
        self.end_tokens = sorted(end_tokens)
        self.num_ids = max([tokenizer.vocab_size, *(token + 1 for token in self.end_tokens)])
        self.free = np.arange(self.num_ids) < tokenizer.vocab_size
        self.free[self.end_tokens] = False
        self.tokens = LLTokenizer(tokenizer.backend.to_str(), n_vocab=self.num_ids)
        self._compiled = lru_cache(COMPILED)(self._compile)
        self._marker = cache(lambda text: Marker(text.encode(), self.pieces))

    def start(self, grammar: Grammar) -> GrammarState:
        """Raises ValueError (one line) for a grammar that is malformed, too large, or not supported."""
        matcher = self._compiled(grammar.kind, grammar.text).deep_copy()
        return GrammarState(self, matcher, self._marker(grammar.after) if grammar.after else None)

    @cached_property
    def pieces(self) -> list[bytes]:
        """The spelling of every id, of special ones too."""
        return [self.tokens.decode_bytes([token]) for token in range(self.num_ids)]

    def _compile(self, kind: str, text: str) -> LLMatcher:
        _check_size(kind, text)
        limits = LLParserLimits(max_lexer_states=MOST_STATES, verbose_errors=False)
        matcher = LLMatcher(self.tokens, _source(kind, text), log_level=0, limits=limits)
        if not matcher.is_error():
            matcher.compute_bitmask()  # what is too much for the first token is too much
        if matcher.is_error():
            raise ValueError(f"{kind} cannot be followed: {_line(matcher.get_error())}")
        return matcher


class GrammarState:
    """Where one sequence stands in its grammar."""

    def __init__(self, compiler: GrammarCompiler, matcher: LLMatcher, marker: Marker | None) -> None:
        self._compiler = compiler
        self._matcher = matcher
        self._marker = marker
        self._found = [0]  # bytes of the marker, after each token up to its end
        self._num_matched = 0  # tokens that went to the matcher
        self._has_ended = False

    @property
    def is_finished(self) -> bool:
        """Whether nothing but an end token may follow, or one has."""
        return self._has_ended or (self._matcher.is_stopped() and not self._matcher.is_error())

    @property
    def _is_free(self) -> bool:
        return self._marker is not None and self._found[-1] < len(self._marker.text)

    def mask(self) -> NDArray[np.bool_]:
        """Which tokens may come next, by id; an id beyond its end may not.

        Raises ValueError where the grammar has become too complex to go on.
        """
        if self._is_free:
            assert self._marker is not None
            allowed = self._compiler.free.copy()
            allowed[self._marker.overshooting(self._found[-1])] = False
            return allowed
        num_ids, ends = self._compiler.num_ids, self._compiler.end_tokens
        if self._has_ended:
            return np.zeros(num_ids, bool)
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        if self._matcher.is_error():
            raise ValueError(f"the grammar cannot be followed any further: {_line(self._matcher.get_error())}")
        allowed = np.unpackbits(bits, count=num_ids, bitorder="little").astype(bool)
        allowed[self._compiler.tokens.eos_tokens] = False
        allowed[ends] = self._matcher.is_accepting()
        return allowed

    def advance(self, token: int) -> None:
        """Go on by one token. Raises ValueError, and changes nothing, for one that may not come next."""
        if not 0 <= token < self._compiler.num_ids:
            raise _not_allowed(token)
        if self._is_free:
            assert self._marker is not None
            if not self._compiler.free[token]:
                raise _not_allowed(token)
            self._found.append(self._marker.step(self._found[-1], token))
        elif self._has_ended:
            raise _not_allowed(token)
        elif token in self._compiler.end_tokens:
            if not self._matcher.is_accepting():
                raise _not_allowed(token)
            self._has_ended = True
        elif self._matcher.is_stopped() or self._matcher.validate_tokens([token]) != 1:
            raise _not_allowed(token)
        else:
            self._matcher.consume_token(token)
            self._num_matched += 1

    def rollback(self, count: int) -> None:
        """Take back the last `count` tokens: afterwards everything is as if they had never come."""
        assert 0 <= count <= self._has_ended + self._num_matched + len(self._found) - 1, count
        if count and self._has_ended:
            self._has_ended = False
            count -= 1
        matched = min(count, self._num_matched)
        if matched:
            self._matcher.rollback(matched)
            self._num_matched -= matched
        del self._found[len(self._found) - (count - matched) :]


class Marker:
    """Finds the end of a text in a stream of tokens.

    A token that goes on beyond it is not allowed, since its rest would be outside of the grammar: "</think" is followed
    by ">" and a line break, not by ">\\n" where that is one token.
    """

    def __init__(self, text: bytes, pieces: list[bytes]) -> None:
        self.text, self.pieces = text, pieces
        self._long = [token for token, piece in enumerate(pieces) if text[-1:] in piece[:-1]]
        self.overshooting = cache(self._overshooting)  # by the bytes found

    def step(self, found: int, token: int) -> int:
        """Return how many bytes of the marker have been found at the end of the text, after one token more."""
        text = self.text[:found] + self.pieces[token]
        beyond = self._bytes_beyond(text)
        if beyond:
            raise _not_allowed(token)
        return pending(text, self.text) if beyond is None else len(self.text)

    def _overshooting(self, found: int) -> list[int]:
        """Return the tokens that hold the marker's end and more."""
        return [token for token in self._long if self._bytes_beyond(self.text[:found] + self.pieces[token])]

    def _bytes_beyond(self, text: bytes) -> int | None:
        start = text.find(self.text)
        return None if start < 0 else len(text) - start - len(self.text)


def _check_size(kind: str, text: str) -> None:
    plain = re.sub(r"\\u00([2-7][0-9A-Fa-f])", lambda match: chr(int(match[1], 16)), text)
    counts = {
        "characters": (len(text), LONGEST[kind]),
        "references": (0 if kind == "regex" else len(re.findall(r'ref"\s*:', plain, re.IGNORECASE)), MOST_REFERENCES),
        "lines": (len(text.splitlines()) if kind == "lark" else 0, MOST_LINES),
    }
    for name, (count, most) in counts.items():
        if count > most:
            raise ValueError(f"{kind} of {count:,} {name} is too large: at most {most:,} are followed")


def _source(kind: str, text: str) -> str:
    """Return the grammar in llguidance's own form. Raises ValueError for a schema that is no JSON."""
    if kind == "regex":
        return LLMatcher.grammar_from_regex(text)
    if kind == "lark":
        return LLMatcher.grammar_from_lark(text)
    if kind == "json_object":
        return _json_grammar({"type": "object"})
    try:
        return _json_grammar(json.loads(text))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"json_schema cannot be followed: {_line(str(error))}") from None


def _json_grammar(schema: Any) -> str:
    schema = {} if schema is True else schema  # the same, and with room for options
    return LLMatcher.grammar_from_json_schema(json.dumps(schema), JSON_FORM if isinstance(schema, dict) else None)


def _line(message: str) -> str:
    words = " ".join(message.split())
    return words if len(words) <= 300 else words[:297] + "..."


def _not_allowed(token: int) -> ValueError:
    return ValueError(f"token {token} may not come next: the grammar does not allow it")
