"""The record behind `dovetail inspect`, of every kind of target."""

import json
from pathlib import Path

import pytest

from dovetail.catalog.presets import load_model, model_names
from dovetail.cost.inspect import as_json, inspect, rows
from dovetail.spec.hf_config import write_hf


@pytest.mark.parametrize("name", model_names())
def test_every_preset_can_be_inspected_printed_and_written_as_json(name: str) -> None:
    result = inspect(name)
    record = json.loads(json.dumps(as_json(result)))
    assert record["parameters"]["total"] == result.parameters.total
    printed = {row[0]: row[1] for row in rows(result)}
    assert printed["total"] == f"{result.parameters.total:,}"
    assert printed["KV cache per token"] == f"{result.cache_bytes:,} B"


def test_a_config_and_a_checkpoint_directory_are_the_preset(tmp_path: Path) -> None:
    spec = load_model("quickstart")
    config = tmp_path / "config.json"
    config.write_text(json.dumps({**write_hf(spec), "index_topk": 4}), encoding="utf-8")
    from_file = inspect(str(config))
    assert from_file.spec == spec
    assert from_file.unread == ("index_topk",)
    assert from_file.stored_bytes is None
    (tmp_path / "model.safetensors").write_bytes(bytes(1234))
    from_directory = inspect(str(tmp_path))
    assert from_directory.parameters == inspect("quickstart").parameters
    assert from_directory.stored_bytes == 1234
    assert ("stored weights", "0.000 GB", "safetensors files") in list(rows(from_directory))


def test_context_changes_the_flop_and_nothing_else() -> None:
    short, long = inspect("quickstart", context=256), inspect("quickstart", context=4096)
    assert short.training_flop < long.training_flop
    assert (short.parameters, short.cache_bytes) == (long.parameters, long.cache_bytes)
    with pytest.raises(ValueError, match="context = 0"):
        inspect("quickstart", context=0)
