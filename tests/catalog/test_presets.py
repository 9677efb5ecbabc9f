"""Every preset loads, says where its numbers come from, and is found by name."""

import pytest

from dovetail.catalog.presets import load_model, model_names, model_source, read_model
from dovetail.spec.hf_config import write_hf
from dovetail.spec.model import Gqa

NAMES = ["deepseek-v3", "deepseek-v2", "deepseek-v2-lite", "qwen2.5-72b", "llama-3.1-405b"]
NAMES += ["quickstart", "20m", "104m", "300m", "600m", "1b"]


def test_the_list_of_presets() -> None:
    assert model_names() == sorted(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_each_has_a_source_and_a_spec(name: str) -> None:
    assert len(model_source(name)) > 20
    assert load_model(name) is load_model(name)


def test_published_shapes() -> None:
    """[V3repo] configs and [HFcfg]."""
    v3, v2, lite = (load_model(f"deepseek-{name}") for name in ("v3", "v2", "v2-lite"))
    assert (v3.hidden_size, v3.num_hidden_layers, v3.intermediate_size) == (7168, 61, 18432)
    assert (v2.hidden_size, v2.num_hidden_layers, v2.intermediate_size) == (5120, 60, 12288)
    assert (lite.hidden_size, lite.num_hidden_layers, lite.intermediate_size) == (2048, 27, 10944)
    assert v3.moe and v2.moe and lite.moe
    gates = [(moe.scoring_func, moe.topk_method, moe.routed_scaling_factor) for moe in (v3.moe, v2.moe, lite.moe)]
    assert gates == [
        ("sigmoid", "noaux_tc", 2.5),
        ("softmax", "group_limited_greedy", 16.0),
        ("softmax", "greedy", 1.0),
    ]
    assert {spec.initializer_range for spec in (v3, v2, lite)} == {0.006}  # not the 0.02 of the files
    assert isinstance(load_model("qwen2.5-72b").attention, Gqa)


def test_an_unknown_name_gets_near_matches() -> None:
    with pytest.raises(ValueError, match="no model preset 'quickstrat'; did you mean quickstart"):
        load_model("quickstrat")
    with pytest.raises(ValueError, match=r"no model preset '\.\./secret'; known: 104m"):
        load_model("../secret")


def test_a_table_of_a_run_file_is_a_dial_or_flat_keys() -> None:
    assert read_model({"dial": {"width": 256}}) == load_model("20m")
    flat = write_hf(load_model("qwen2.5-72b"))
    kept = ("vocab_size", "hidden_size", "num_hidden_layers", "intermediate_size", "num_attention_heads")
    assert isinstance(read_model({key: flat[key] for key in kept}).attention, Gqa)
    with pytest.raises(ValueError, match=r"run.toml: dial: unknown key 'widht'; did you mean width\? \(and 1 more"):
        read_model({"dial": {"widht": 256}}, where="run.toml")
    with pytest.raises(ValueError, match=r"run.toml: dial: width = 2112: from 2048 up"):
        read_model({"dial": {"width": 2112}}, where="run.toml")
