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
from collections.abc import Callable, Iterable, Mapping
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
MOST_RESTARTS = 8  # of a sequence

# White space as Python's json writes it. Where any is allowed, small models write it for ever. A schema may have its
# own options, under the key "x-guidance".
JSON_FORM: Mapping[str, Any] = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


class GrammarFailure(ValueError):
    """A grammar has become too complex to be followed any further."""


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
        shared = self._compiled(grammar.kind, grammar.text).deep_copy()
        follower = Follower(shared, lambda: self._anew(grammar))
        return GrammarState(self, follower, self._marker(grammar.after) if grammar.after else None)

    @cached_property
    def pieces(self) -> list[bytes]:
        """The spelling of every id, of special ones too."""
        return [self.tokens.decode_bytes([token]) for token in range(self.num_ids)]

    def _anew(self, grammar: Grammar) -> LLMatcher:
        self._compiled.cache_clear()  # the lexer that has failed would fail those to come too
        return self._compile(grammar.kind, grammar.text)

    def _compile(self, kind: str, text: str) -> LLMatcher:
        _check_size(kind, text)
        limits = LLParserLimits(max_lexer_states=MOST_STATES, verbose_errors=False)
        matcher = LLMatcher(self.tokens, _source(kind, text), log_level=0, limits=limits)
        if not matcher.is_error():
            matcher.compute_bitmask()  # what is too much for the first token is too much
        if matcher.is_error():
            raise ValueError(f"{kind} cannot be followed: {_line(matcher.get_error())}")
        return matcher


class Follower:
    """A matcher, and the tokens that it was given.

    All copies of a matcher share one lexer, which grows with every text that any of them follows. Where it has grown
    too large, it fails them all and for ever. Each of them then begins anew with a lexer of its own, which sees its
    own tokens alone. One whose own tokens are too much fails.
    """

    def __init__(self, matcher: LLMatcher, anew: Callable[[], LLMatcher]) -> None:
        self.tokens: list[int] = []
        self._matcher, self._anew = matcher, anew
        self._is_clean, self._restarts = False, 0  # clean: nothing but `tokens` came to the lexer

    @property
    def is_stopped(self) -> bool:
        """Whether nothing may follow."""
        return self._matcher.is_stopped() and not self._matcher.is_error()

    def mask(self) -> tuple[bytes, bool]:
        """Which tokens may come next, in bits, and whether the text may end here. Raises GrammarFailure."""
        bits = self._matcher.compute_bitmask()
        while self._matcher.is_error():
            self._restart()
            bits = self._matcher.compute_bitmask()
        return bits, self._matcher.is_accepting()

    def allows(self, token: int) -> bool:
        """Whether it may come next. Raises GrammarFailure."""
        for _ in range(2):  # a lexer that has failed allows nothing, and says so at the next mask only
            if not self._matcher.is_stopped() and self._matcher.validate_tokens([token]) == 1:
                return True
            self.mask()
        return False

    def consume(self, token: int) -> None:
        """Go on by a token that `allows` allowed."""
        self._matcher.consume_token(token)
        self.tokens.append(token)

    def rollback(self, count: int) -> None:
        """Take back the last `count` tokens."""
        del self.tokens[len(self.tokens) - count :]
        self._is_clean = False
        if not self._matcher.is_error():  # else the next question begins anew
            self._matcher.rollback(count)

    def _restart(self) -> None:
        if self._is_clean or self._restarts == MOST_RESTARTS:
            raise GrammarFailure(f"the grammar cannot be followed any further: {_line(self._matcher.get_error())}")
        self._matcher, self._is_clean = self._anew(), True
        self._restarts += 1
        for token in self.tokens:
            self._matcher.compute_bitmask()  # as it was asked for, so that the lexer fails where it would have failed
            self._matcher.consume_token(token)


class GrammarState:
    """Where one sequence stands in its grammar."""

    def __init__(self, compiler: GrammarCompiler, follower: Follower, marker: Marker | None) -> None:
        self._compiler = compiler
        self._follower = follower
        self._marker = marker
        self._found = [0]  # bytes of the marker, after each token up to its end
        self._has_ended = False

    @property
    def is_finished(self) -> bool:
        """Whether nothing but an end token may follow, or one has."""
        return self._has_ended or self._follower.is_stopped

    @property
    def _is_free(self) -> bool:
        return self._marker is not None and self._found[-1] < len(self._marker.text)

    def mask(self) -> NDArray[np.bool_]:
        """Which tokens may come next, by id; an id beyond its end may not.

        Raises GrammarFailure where the grammar has become too complex to go on.
        """
        if self._is_free:
            assert self._marker is not None
            allowed = self._compiler.free.copy()
            allowed[self._marker.overshooting(self._found[-1])] = False
            return allowed
        num_ids, ends = self._compiler.num_ids, self._compiler.end_tokens
        if self._has_ended:
            return np.zeros(num_ids, bool)
        bits, may_end = self._follower.mask()
        allowed = np.unpackbits(np.frombuffer(bits, np.uint8), count=num_ids, bitorder="little").astype(bool)
        allowed[self._compiler.tokens.eos_tokens] = False
        allowed[ends] = may_end
        return allowed

    def advance(self, token: int) -> None:
        """Go on by one token.

        Raises ValueError, and changes nothing, for one that may not come next; GrammarFailure as `mask` does.
        """
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
            if not self._follower.mask()[1]:
                raise _not_allowed(token)
            self._has_ended = True
        elif not self._follower.allows(token):
            raise _not_allowed(token)
        else:
            self._follower.consume(token)

    def rollback(self, count: int) -> None:
        """Take back the last `count` tokens: afterwards everything is as if they had never come."""
        num_matched = len(self._follower.tokens)
        assert 0 <= count <= self._has_ended + num_matched + len(self._found) - 1, count
        if count and self._has_ended:
            self._has_ended = False
            count -= 1
        matched = min(count, num_matched)
        if matched:
            self._follower.rollback(matched)
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
