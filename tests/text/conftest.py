"""A small tokenizer, trained once per session on a real module of the standard library."""

import inspect
import textwrap

import pytest

from dovetail.text.tokenizer import Tokenizer


@pytest.fixture(scope="session")
def source() -> str:
    return inspect.getsource(textwrap)


@pytest.fixture(scope="session")
def tokenizer(source: str) -> Tokenizer:
    return Tokenizer.train([source], 512)
