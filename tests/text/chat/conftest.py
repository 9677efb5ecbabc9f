"""A small tokenizer with DeepSeek's tokens: three special ones, and the others added but not special, as published."""

import json
from pathlib import Path

import pytest
import tokenizers
from tokenizers import AddedToken

from dovetail.text.tokenizer import Tokenizer

SPECIAL = [
    "<\uff5cbegin\u2581of\u2581sentence\uff5c>",
    "<\uff5cend\u2581of\u2581sentence\uff5c>",
    "<\uff5c\u2581pad\u2581\uff5c>",
]
TOOL_TOKENS = [f"<\uff5ctool\u2581{name}\uff5c>" for name in (
    "calls\u2581begin", "calls\u2581end", "call\u2581begin", "call\u2581end", "outputs\u2581begin", "outputs\u2581end",
    "output\u2581begin", "output\u2581end", "sep",
)]  # fmt: skip
ADDED = ["<think>", "</think>", "<\uff5cUser\uff5c>", "<\uff5cAssistant\uff5c>", "<|EOT|>", *TOOL_TOKENS]


@pytest.fixture(scope="session")
def deepseek_directory(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds tokenizer.json and tokenizer_config.json, and no template."""
    directory = tmp_path_factory.mktemp("deepseek")
    table = json.loads(tokenizer.backend.to_str())
    table["added_tokens"], table["post_processor"] = [], None
    backend = tokenizers.Tokenizer.from_str(json.dumps(table))
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    backend.add_tokens([AddedToken(token, special=False, normalized=False) for token in ADDED])
    backend.save(str(directory / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": SPECIAL[0], "eos_token": SPECIAL[1]}
    (directory / "tokenizer_config.json").write_text(json.dumps(config), "utf-8")
    return directory


@pytest.fixture(scope="session")
def deepseek(deepseek_directory: Path) -> Tokenizer:
    return Tokenizer.load(deepseek_directory)
