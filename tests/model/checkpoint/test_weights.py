"""Round trips through the Hugging Face layout, and what is on disk in between."""

import errno
import json
import math
import os
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from dovetail.model.checkpoint import weights
from dovetail.model.checkpoint.weights import export_hf, import_hf, load_into, stored_view, to_published
from dovetail.model.transformer import Transformer
from dovetail.numerics.formats.quantize import dequantize, quantize_weight
from dovetail.spec.model import ModelSpec
from dovetail.spec.tensors import published_tensors, stored_tensors

SpecFactory = Callable[..., ModelSpec]
ModelFactory = Callable[..., Transformer]
SAFETENSORS_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float8_e4m3fn: "F8_E4M3"}
VARIANTS = {
    "all parts": {},
    "uncompressed queries": {"q_lora_rank": None},
    "tied embeddings": {"tie_word_embeddings": True},
    "two MTP modules": {"num_nextn_predict_layers": 2},
    "no MTP": {"num_nextn_predict_layers": 0},
    "no shared experts": {"n_shared_experts": 0},
    "two shared experts": {"n_shared_experts": 2},
    "softmax gate without bias": {
        "scoring_func": "softmax",
        "topk_method": "greedy",
        "model_type": "deepseek_v2",
    }
    | {"n_group": None, "topk_group": None, "norm_topk_prob": False},
    "dense": {
        "n_routed_experts": None,
        "n_shared_experts": None,
        "num_experts_per_tok": None,
        "n_group": None,
    }
    | {"moe_intermediate_size": None, "first_k_dense_replace": None, "topk_group": None}
    | {"norm_topk_prob": None, "routed_scaling_factor": None},
}


def same_bits(ours: Transformer, theirs: Transformer) -> bool:
    left, right = ours.state_dict(), theirs.state_dict()
    same_types = all(left[key].dtype == right[key].dtype for key in left)
    return left.keys() == right.keys() and same_types and all(torch.equal(left[key], right[key]) for key in left)


def stored_on_disk(directory: Path) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for file in directory.glob("*.safetensors"):
        tensors |= load_file(file)
    return tensors


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_round_trip_is_bitwise(
    variant: str, dtype: torch.dtype, tmp_path: Path, tiny_spec: SpecFactory, random_model: ModelFactory
) -> None:
    spec = tiny_spec(**VARIANTS[variant])
    model = random_model(spec, dtype=dtype)
    export_hf(model, spec, tmp_path / "out")
    loaded, loaded_spec = import_hf(tmp_path / "out", dtype=dtype)
    assert loaded_spec == spec
    assert same_bits(model, loaded)


@pytest.mark.parametrize("variant", VARIANTS)
def test_listed_tensors_are_those_of_the_model_on_the_meta_device(variant: str, tiny_spec: SpecFactory) -> None:
    spec = tiny_spec(**VARIANTS[variant])
    with torch.device("meta"):
        state = Transformer(spec).state_dict()
    for fp8 in (False, True):
        from_model = [
            (name, tuple(t.shape), SAFETENSORS_NAMES[t.dtype]) for name, t in meta_published(state, spec, fp8)
        ]
        assert from_model == list(published_tensors(spec, fp8=fp8))


def meta_published(state: dict[str, Tensor], spec: ModelSpec, fp8: bool) -> list[tuple[str, Tensor]]:
    pairs: list[tuple[str, Tensor]] = []
    for stored in stored_tensors(spec):
        view = stored_view(state, stored)
        if fp8 and stored.is_quantized:
            quantized = quantize_weight(view)
            pairs += [(stored.name, quantized.data), (stored.name + "_scale_inv", quantized.scale)]
        else:
            pairs.append((stored.name, view))
    return pairs


def test_every_element_of_the_state_is_published_once(tiny_spec: SpecFactory, random_model: ModelFactory) -> None:
    spec = tiny_spec(num_nextn_predict_layers=2)
    state = random_model(spec).state_dict()
    seen = {key: torch.zeros_like(tensor, dtype=torch.int64) for key, tensor in state.items()}
    for stored in stored_tensors(spec):
        if not stored.copy_of:
            stored_view(seen, stored).add_(1)
    assert all((count == 1).all() for count in seen.values())


def test_gate_rows_come_first_and_experts_in_order(tiny_spec: SpecFactory, random_model: ModelFactory) -> None:
    spec = tiny_spec()
    state = random_model(spec).state_dict()
    published = dict(to_published(state, spec))
    stacked = state["layers.1.mlp.experts.gate_up_proj"]
    assert torch.equal(published["model.layers.1.mlp.experts.5.gate_proj.weight"], stacked[5, :16])
    assert torch.equal(published["model.layers.1.mlp.experts.5.up_proj.weight"], stacked[5, 16:])
    fused = state["layers.0.mlp.gate_up_proj.weight"]
    assert torch.equal(published["model.layers.0.mlp.gate_proj.weight"], fused[:48])
    assert torch.equal(published["model.layers.0.mlp.up_proj.weight"], fused[48:])


def test_mtp_module_is_the_layer_after_the_last_with_copies_of_embedding_and_head(
    tmp_path: Path, tiny_spec: SpecFactory, random_model: ModelFactory
) -> None:
    spec = tiny_spec()
    model = random_model(spec)
    export_hf(model, spec, tmp_path / "out")
    disk = stored_on_disk(tmp_path / "out")
    assert torch.equal(disk["model.layers.3.embed_tokens.weight"], disk["model.embed_tokens.weight"])
    assert torch.equal(disk["model.layers.3.shared_head.head.weight"], disk["lm_head.weight"])
    assert torch.equal(disk["model.layers.3.shared_head.norm.weight"], model.state_dict()["mtp.0.norm.weight"])
    assert torch.equal(disk["model.layers.3.eh_proj.weight"], model.state_dict()["mtp.0.eh_proj.weight"])
    assert not any(name.startswith("model.layers.4.") for name in disk)


def test_shards_respect_their_limit_and_the_index_is_complete(
    tmp_path: Path, tiny_spec: SpecFactory, random_model: ModelFactory
) -> None:
    spec = tiny_spec()
    model = random_model(spec)
    export_hf(model, spec, tmp_path / "out", max_shard_bytes=40_000)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 3
    assert files == [f"model-{i:05}-of-{len(files):05}.safetensors" for i in range(1, len(files) + 1)]
    names = [name for name, _, _ in published_tensors(spec)]
    assert sorted(index["weight_map"]) == sorted(names) and set(index["weight_map"].values()) == set(files)
    sizes = [sum(t.numel() * t.element_size() for t in load_file(tmp_path / "out" / file).values()) for file in files]
    assert max(sizes) <= 40_000 and index["metadata"]["total_size"] == sum(sizes)
    assert same_bits(model, import_hf(tmp_path / "out", dtype=torch.float32)[0])


def test_tensor_above_the_shard_limit_gets_a_shard_of_its_own(
    tmp_path: Path, tiny_spec: SpecFactory, random_model: ModelFactory
) -> None:
    spec = tiny_spec(num_hidden_layers=1, num_nextn_predict_layers=0)
    model = random_model(spec)
    export_hf(model, spec, tmp_path / "out", max_shard_bytes=1)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) == len(list(published_tensors(spec)))
    assert same_bits(model, import_hf(tmp_path / "out", dtype=torch.float32)[0])


@pytest.mark.parametrize("fp8", [True, "ue8m0"])
def test_fp8_round_trip_is_the_quantised_model(
    fp8: bool | str, tmp_path: Path, tiny_spec: SpecFactory, random_model: ModelFactory
) -> None:
    spec = tiny_spec(hidden_size=160, kv_lora_rank=136)  # ragged: 160 = 128 + 32, kv_a has 144 rows
    model = random_model(spec)
    export_hf(model, spec, tmp_path / "out", fp8=fp8, max_shard_bytes=100_000)
    loaded = import_hf(tmp_path / "out", dtype=torch.float32)[0].state_dict()
    state = model.state_dict()
    for stored in stored_tensors(spec):
        view = stored_view(state, stored)
        if stored.is_quantized:
            view = dequantize(quantize_weight(view, power_of_two=fp8 == "ue8m0"))
        assert torch.equal(stored_view(loaded, stored), view), stored.name


def test_fp8_checkpoint_on_disk_is_the_published_one(
    tmp_path: Path, tiny_spec: SpecFactory, random_model: ModelFactory
) -> None:
    spec = tiny_spec(hidden_size=160)
    export_hf(random_model(spec, dtype=torch.bfloat16), spec, tmp_path / "out", fp8=True)
    with safe_open(tmp_path / "out" / "model.safetensors", framework="pt") as file:
        found = {}
        for name in file.keys():  # noqa: SIM118 (not a dict)
            part = file.get_slice(name)
            found[name] = (tuple(part.get_shape()), part.get_dtype())
    assert found == {name: (shape, dtype) for name, shape, dtype in published_tensors(spec, fp8=True)}
    quantization = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    expected = {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [128, 128],
    }
    assert quantization == expected


def test_scales_in_another_shard_than_their_weight_are_found(
    tmp_path: Path, tiny_spec: SpecFactory, random_model: ModelFactory
) -> None:
    from safetensors.torch import save_file

    spec = tiny_spec()
    export_hf(random_model(spec), spec, tmp_path, fp8=True)
    before = import_hf(tmp_path, dtype=torch.float32)[0]
    disk = load_file(tmp_path / "model.safetensors")
    shards = {
        "a.safetensors": {name: t for name, t in disk.items() if name.endswith("_scale_inv")},
        "b.safetensors": {name: t for name, t in disk.items() if not name.endswith("_scale_inv")},
    }
    weight_map = {name: file for file, tensors in shards.items() for name in tensors}
    for file, tensors in shards.items():
        save_file(tensors, tmp_path / file)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert same_bits(before, import_hf(tmp_path, dtype=torch.float32)[0])


def test_export_holds_one_shard_of_quantised_weights_at_a_time(
    tmp_path: Path, tiny_spec: SpecFactory, random_model: ModelFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = tiny_spec()
    earlier: list[weakref.ref[Tensor]] = []
    real_save = weights.save_file

    def watched_save(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
        alive = [ref for ref in earlier if ref() is not None]
        assert not alive, f"{len(alive)} tensors of earlier shards are still in memory"
        assert sum(t.numel() * t.element_size() for t in tensors.values()) <= 20_000
        real_save(tensors, path, metadata=metadata)
        earlier.extend(weakref.ref(t) for t in tensors.values() if t.dtype == torch.float8_e4m3fn)

    monkeypatch.setattr(weights, "save_file", watched_save)
    export_hf(random_model(spec), spec, tmp_path / "out", fp8=True, max_shard_bytes=20_000)
    assert len(earlier) > 50


def test_config_names_the_dtype_and_the_scoring_function(
    tmp_path: Path, tiny_spec: SpecFactory, random_model: ModelFactory
) -> None:
    spec = tiny_spec()
    for dtype in (torch.bfloat16, torch.float32):
        export_hf(random_model(spec, dtype=dtype), spec, tmp_path / "out", overwrite=True)
        config = json.loads((tmp_path / "out" / "config.json").read_text())
        assert config["torch_dtype"] == str(dtype).removeprefix("torch.")
        assert config["scoring_func"] == "sigmoid"  # llama.cpp takes softmax where it is absent
        assert "quantization_config" not in config


def test_import_into_bf16_keeps_norms_and_router_in_fp32(
    tmp_path: Path, tiny_spec: SpecFactory, random_model: ModelFactory
) -> None:
    spec = tiny_spec()
    model = random_model(spec)
    export_hf(model, spec, tmp_path / "out")
    state = import_hf(tmp_path / "out", dtype=torch.bfloat16)[0].state_dict()
    for key, tensor in model.state_dict().items():
        is_fp32 = "norm" in key or ".gate." in key
        assert state[key].dtype == (torch.float32 if is_fp32 else torch.bfloat16), key
        assert torch.equal(state[key], tensor if is_fp32 else tensor.bfloat16()), key


def test_a_plain_state_dict_is_exported_like_its_model(
    tmp_path: Path, tiny_spec: SpecFactory, random_model: ModelFactory
) -> None:
    spec = tiny_spec()
    model = random_model(spec)
    export_hf(model.state_dict(), spec, tmp_path / "out")
    other = random_model(spec, seed=9)
    load_into(other, tmp_path / "out")
    assert same_bits(model, other)


def test_tokenizer_files_are_copied_and_files_readable_as_the_umask_says(
    tmp_path: Path, tiny_spec: SpecFactory, random_model: ModelFactory
) -> None:
    spec = tiny_spec()
    (tmp_path / "tokenizer.json").write_text("{}")
    export_hf(random_model(spec), spec, tmp_path / "out", tokenizer_files=[tmp_path / "tokenizer.json"])
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "{}"
    expected = (tmp_path / "tokenizer.json").stat().st_mode
    assert {path.stat().st_mode for path in (tmp_path / "out").iterdir()} == {expected}


def test_missing_or_clashing_tokenizer_files_are_refused_before_writing(
    tmp_path: Path, tiny_spec: SpecFactory, random_model: ModelFactory
) -> None:
    spec = tiny_spec()
    (tmp_path / "config.json").write_text("{}")
    for name, message in (("absent.json", "does not exist"), ("config.json", "rename")):
        with pytest.raises(ValueError, match=message):
            export_hf(random_model(spec), spec, tmp_path / "out", tokenizer_files=[tmp_path / name])
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def test_existing_target_is_kept_unless_overwritten(
    tmp_path: Path, tiny_spec: SpecFactory, random_model: ModelFactory
) -> None:
    spec = tiny_spec()
    first, second = random_model(spec, seed=1), random_model(spec, seed=2)
    (tmp_path / "out").mkdir()  # an empty directory is no obstacle
    export_hf(first, spec, tmp_path / "out", max_shard_bytes=40_000)
    with pytest.raises(ValueError, match="overwrite"):
        export_hf(second, spec, tmp_path / "out")
    assert same_bits(first, import_hf(tmp_path / "out", dtype=torch.float32)[0])
    export_hf(second, spec, tmp_path / "out", overwrite=True)
    assert same_bits(second, import_hf(tmp_path / "out", dtype=torch.float32)[0])
    names = ["config.json", "generation_config.json", "model.safetensors"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == names
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_only_a_checkpoint_is_ever_overwritten(
    tmp_path: Path, tiny_spec: SpecFactory, random_model: ModelFactory
) -> None:
    spec = tiny_spec()
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.txt").write_text("years of work")
    (tmp_path / "file").write_text("x")
    for name, message in (("home", "not a checkpoint"), ("file", "not a directory")):
        with pytest.raises(ValueError, match=message):
            export_hf(random_model(spec), spec, tmp_path / name, overwrite=True)
    assert (tmp_path / "home" / "thesis.txt").read_text() == "years of work"


@pytest.mark.parametrize("overwrite", [False, True])
def test_disk_that_fills_up_leaves_what_was_there(
    overwrite: bool,
    tmp_path: Path,
    tiny_spec: SpecFactory,
    random_model: ModelFactory,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    spec = tiny_spec()
    model = random_model(spec)
    if overwrite:
        export_hf(model, spec, tmp_path / "out")
    before = sorted(tmp_path.iterdir())
    calls = 0

    def filling_disk(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
        nonlocal calls
        calls += 1
        path.write_bytes(b"half a shard")
        if calls == 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(weights, "save_file", filling_disk)
    with pytest.raises(OSError, match="the disk is full after 0.0 MB, nothing was left behind") as raised:
        export_hf(random_model(spec, seed=5), spec, tmp_path / "out", max_shard_bytes=40_000, overwrite=overwrite)
    assert raised.value.errno == errno.ENOSPC and calls == 3
    assert sorted(tmp_path.iterdir()) == before
    if overwrite:
        assert same_bits(model, import_hf(tmp_path / "out", dtype=torch.float32)[0])


def test_too_small_a_disk_is_refused_before_writing(
    tmp_path: Path, tiny_spec: SpecFactory, random_model: ModelFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = tiny_spec()
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 1000})())
    with pytest.raises(OSError, match=r"needs 0\.\d MB, 0\.0 MB are free"):
        export_hf(random_model(spec), spec, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_interrupt_leaves_nothing_behind(
    tmp_path: Path, tiny_spec: SpecFactory, random_model: ModelFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    spec = tiny_spec()
    monkeypatch.setattr(weights, "save_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        export_hf(random_model(spec), spec, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_export_left_is_removed_by_the_next(
    tmp_path: Path, tiny_spec: SpecFactory, random_model: ModelFactory
) -> None:
    """The next process may have the number of the killed one, as in a container."""
    for name in (".out.partial", ".outer.partial"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_bytes(b"half")
    spec = tiny_spec()
    export_hf(random_model(spec), spec, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".outer.partial", "out"]


def test_model_that_does_not_fit_the_spec_is_refused(
    tmp_path: Path, tiny_spec: SpecFactory, random_model: ModelFactory
) -> None:
    model = random_model(tiny_spec())
    for changes, message in (
        ({"num_nextn_predict_layers": 2}, r"the model has no 'mtp\.1\.enorm\.weight'"),
        ({"num_nextn_predict_layers": 0}, r"no place for the model's 'mtp\.0"),
        ({"moe_intermediate_size": 24}, r"experts.*\[16, 32\].*\[24, 32\]"),
        ({"moe_intermediate_size": 8}, r"experts.*\[16, 32\].*\[8, 32\]"),  # would fit, were rows only sliced
        ({"n_routed_experts": 16}, r"gate.*\[8, 32\].*\[16, 32\]"),
    ):
        with pytest.raises(ValueError, match=message):
            export_hf(model, tiny_spec(**changes), tmp_path / "out")


def test_fp8_export_names_a_tensor_that_is_not_finite(
    tmp_path: Path, tiny_spec: SpecFactory, random_model: ModelFactory
) -> None:
    spec = tiny_spec()
    model = random_model(spec)
    model.state_dict()["layers.1.mlp.experts.down_proj"][3, 2, 1] = math.nan
    with pytest.raises(
        ValueError,
        match=r"model\.layers\.1\.mlp\.experts\.3\.down_proj\.weight.*\[32, 16\], holds 1 NaN.*checkpoint from before",
    ):
        export_hf(model, spec, tmp_path / "out", fp8=True)
    assert list(tmp_path.iterdir()) == []
