"""generation_config.json: what is advised, what ends a text, and what transformers reads of what we write."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import GenerationConfig

from dovetail.catalog.presets import load_model
from dovetail.spec.hf.generation import FILE, Generation, read_generation, write_generation


def read(directory: Path, config: Any) -> Generation:
    (directory / FILE).write_text(json.dumps(config), encoding="utf-8")
    return read_generation(directory, 100)


def test_an_absent_file_says_nothing(tmp_path: Path) -> None:
    assert read_generation(tmp_path, 100) == Generation() and Generation().sampling == {}


@pytest.mark.parametrize(
    ("config", "sampling"),
    [
        ({"do_sample": True, "temperature": 0.6, "top_p": 0.95}, {"temperature": 0.6, "top_p": 0.95}),
        ({"do_sample": True, "top_k": 50, "min_p": 0.1, "top_p": None}, {"top_k": 50, "min_p": 0.1}),
        ({"do_sample": False, "temperature": 0.6}, {"temperature": 0.0}),
        ({"temperature": 0.6, "top_p": 0.95}, {}),
    ],
)
def test_sampling_is_advised_under_do_sample(
    tmp_path: Path, config: dict[str, Any], sampling: dict[str, float]
) -> None:
    assert read(tmp_path, config).sampling == sampling


def test_end_tokens_and_what_is_not_read(tmp_path: Path) -> None:
    assert read(tmp_path, {"eos_token_id": 7, "bos_token_id": 0}) == Generation(end_tokens=(7,))
    several = read(tmp_path, {"eos_token_id": [7, 9], "repetition_penalty": 1.2, "num_beams": None})
    assert several == Generation(end_tokens=(7, 9), unread=("repetition_penalty",))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ([], "holds a JSON list"),
        ({"eos_token_id": [1, 100]}, "eos_token_id = 100 is not a token: vocab_size = 100"),
        ({"do_sample": True, "top_p": 0}, "top_p = 0: input should be greater than 0"),
        ({"do_sample": "yes"}, "do_sample = 'yes': input should be a valid boolean"),
    ],
)
def test_mistakes_name_file_and_key(tmp_path: Path, config: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"{FILE}: {message}"):
        read(tmp_path, config)


def test_transformers_reads_what_is_written(tmp_path: Path) -> None:
    spec = load_model("quickstart").model_copy(update={"eos_token_id": (1, 5)})
    (tmp_path / FILE).write_text(json.dumps(write_generation(spec)), encoding="utf-8")
    theirs = GenerationConfig.from_pretrained(str(tmp_path))
    assert (theirs.bos_token_id, theirs.eos_token_id) == (0, [1, 5])
    assert read_generation(tmp_path, spec.vocab_size).end_tokens == (1, 5)
    assert write_generation(spec.model_copy(update={"eos_token_id": None})) == {"bos_token_id": 0}
