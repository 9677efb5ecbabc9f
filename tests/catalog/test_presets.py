"""Every preset loads and says where its numbers come from; models are found by name, in files and in directories."""

import json
from pathlib import Path

import pytest

from dovetail.catalog.presets import find_model, load_model, model_names, model_source, read_model
from dovetail.config import dump
from dovetail.spec.family import Dial
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
    with pytest.raises(ValueError, match=r"run.toml: experts beside \[dial\], which says all"):
        read_model({"dial": {"width": 256}, "experts": 8, "source": "ours"}, where="run.toml")


def test_a_model_is_found_by_name_in_files_and_in_directories(tmp_path: Path) -> None:
    spec = load_model("20m")
    (tmp_path / "config.json").write_text(json.dumps({**write_hf(spec), "index_topk": 4}), encoding="utf-8")
    (tmp_path / "dial.toml").write_text(f'source = "a thesis"\n[dial]\n{dump(Dial(width=256))}', encoding="utf-8")
    flat = {key: value for key, value in spec.model_dump().items() if not isinstance(value, dict) and value is not None}
    flat |= {key: value for part in (spec.attention, spec.moe) for key, value in part.model_dump().items()}
    lines = (f"{key} = {json.dumps(value)}" for key, value in flat.items())
    (tmp_path / "flat.toml").write_text("\n".join(lines), encoding="utf-8")
    targets = ["20m", *(str(tmp_path / name) for name in ("config.json", "", "dial.toml", "flat.toml"))]
    found = [find_model(target) for target in targets]
    assert [each.spec for each in found] == [spec] * 5
    config, flat_file = str(tmp_path / "config.json"), str(tmp_path / "flat.toml")
    assert [each.source for each in found] == [model_source("20m"), config, config, "a thesis", flat_file]
    assert [each.unread for each in found] == [(), ("index_topk",), ("index_topk",), (), ()]
    assert [each.directory for each in found] == [None, None, tmp_path, None, None]


def test_a_run_file_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text('out = "run"\n[model]\npreset = "20m"\n', encoding="utf-8")
    with pytest.raises(ValueError, match=r"run.toml: a run file, not a model: name what its \[model\] names"):
        find_model(str(tmp_path / "run.toml"))


def test_a_preset_goes_before_a_directory_of_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "20m").mkdir()
    assert find_model("20m").spec == load_model("20m")
    with pytest.raises(ValueError, match=r"^20m: a directory without a config.json"):
        find_model("./20m")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", r"config.json: not valid JSON"),
        (b"\xff", r"config.json: not UTF-8 text \(byte 0\); save it as UTF-8"),
        (b"[1]", r"config.json: holds a JSON list, not an object"),
        (b"{}", r"config.json: no model_type; set it to one of"),
        (b'{"model_type": "deepseek_v3"}', r"config.json: missing key 'vocab_size'"),
    ],
)
def test_a_config_that_cannot_be_read(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        find_model(str(tmp_path))
    assert str(caught.value).startswith(str(path)) and str(caught.value).count("config.json") == 1


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("deepsek-v3", r"^deepsek-v3: no such preset or file; did you mean deepseek-v3 .*a model is a preset"),
        ("mine.toml", r"^mine.toml: no such file$"),
        ("runs/config.json", r"^runs/config.json: no such file; a model is a preset"),
        ("deepseek-ai/DeepSeek-V3", r"nothing is downloaded: .*or take the preset deepseek-v3, which has its shape$"),
        ("zai-org/GLM-4.5", r"nothing is downloaded: fetch the repository and give its directory$"),
        ("text/notes", r"^text/notes: no such preset or file; known: 104m"),  # text is a directory: a path mistyped
    ],
)
def test_a_target_that_is_nothing(target: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text").mkdir()
    with pytest.raises(ValueError, match=message):
        find_model(target)


def test_what_is_no_description_of_a_model_says_what_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"\xb0")
    with pytest.raises(
        ValueError, match="model.safetensors: holds weights, not the description of a model; a model is"
    ):
        find_model(str(tmp_path / "model.safetensors"))
    (tmp_path / "config.json").write_text("\ufeff" + json.dumps(write_hf(load_model("20m"))), encoding="utf-8")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert find_model("~/config.json").spec == find_model("~").spec == load_model("20m")
