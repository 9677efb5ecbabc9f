"""Every way a checkpoint can be broken: one ValueError that names file and tensor, and a model left alone."""

import json
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from dovetail.model.checkpoint.inventory import INDEX
from dovetail.model.checkpoint.weights import export_hf, import_hf, load_into
from dovetail.model.transformer import Transformer
from dovetail.spec.model import ModelSpec

Change = Callable[[dict[str, Tensor]], object]
DOWN = "model.layers.2.mlp.experts.3.down_proj.weight"


@pytest.fixture
def checkpoint(tmp_path: Path, tiny_spec: Callable[..., ModelSpec], random_model: Callable[..., Transformer]) -> Path:
    """A sound FP8 checkpoint in several shards."""
    spec = tiny_spec()
    export_hf(random_model(spec), spec, tmp_path / "hf", fp8=True, max_shard_bytes=30_000)
    return tmp_path / "hf"


@pytest.fixture
def plain(tmp_path: Path, tiny_spec: Callable[..., ModelSpec], random_model: Callable[..., Transformer]) -> Path:
    """A sound one that is not quantised, in one file."""
    spec = tiny_spec()
    export_hf(random_model(spec), spec, tmp_path / "plain")
    return tmp_path / "plain"


def shard_of(checkpoint: Path, name: str) -> Path:
    return checkpoint / json.loads((checkpoint / INDEX).read_text())["weight_map"][name]


def rewrite(checkpoint: Path, name: str, change: Change) -> Path:
    """Apply `change` to the tensors of the shard that holds `name`, and let the index agree."""
    path = shard_of(checkpoint, name)
    before = load_file(path)
    tensors = {key: tensor.clone() for key, tensor in before.items()}
    change(tensors)
    save_file(tensors, path)
    index = json.loads((checkpoint / INDEX).read_text())
    for key in before.keys() - tensors.keys():
        del index["weight_map"][key]
    index["weight_map"] |= dict.fromkeys(tensors, path.name)
    (checkpoint / INDEX).write_text(json.dumps(index))
    return path


def refused(checkpoint: Path, *parts: str, mtp: str = "require") -> str:
    with pytest.raises(ValueError) as raised:
        import_hf(checkpoint, dtype=torch.float32, mtp=mtp)
    message = str(raised.value)
    for part in parts:
        assert part in message, message
    assert "\n" not in message
    return message


def test_sound_checkpoint_loads(checkpoint: Path) -> None:
    import_hf(checkpoint)


@pytest.mark.parametrize("num_bytes", [1, 5000])
def test_truncated_shard_names_the_tensor_that_is_cut(checkpoint: Path, num_bytes: int) -> None:
    path = shard_of(checkpoint, DOWN)
    whole = path.read_bytes()
    header = json.loads(whole[8 : 8 + struct.unpack("<Q", whole[:8])[0]])
    header.pop("__metadata__")
    path.write_bytes(whole[:-num_bytes])
    size = len(whole) - num_bytes - 8 - struct.unpack("<Q", whole[:8])[0]
    cut = min((field["data_offsets"][1], name) for name, field in header.items() if field["data_offsets"][1] > size)
    refused(checkpoint, str(path), "truncated", cut[1], str(len(whole) - num_bytes))


@pytest.mark.parametrize("keep", [0, 5, 8, 100])
def test_shard_cut_inside_its_header_is_named(checkpoint: Path, keep: int) -> None:
    path = shard_of(checkpoint, DOWN)
    path.write_bytes(path.read_bytes()[:keep])
    refused(checkpoint, str(path))


@pytest.mark.parametrize("content", [b"x" * 500, struct.pack("<Q", 10) + b"not a json", struct.pack("<Q", 2) + b"[]"])
def test_file_that_is_not_safetensors_is_named(checkpoint: Path, content: bytes) -> None:
    path = shard_of(checkpoint, DOWN)
    path.write_bytes(content)
    refused(checkpoint, str(path))


def test_header_whose_sizes_disagree_is_refused(checkpoint: Path) -> None:
    path = shard_of(checkpoint, DOWN)
    content = path.read_bytes().replace(b'"shape":[32,16]', b'"shape":[16,16]', 1)
    path.write_bytes(content)
    refused(checkpoint, str(path), "bytes")


def test_overlapping_tensors_are_refused_with_the_file(checkpoint: Path) -> None:
    path = shard_of(checkpoint, DOWN)
    whole = path.read_bytes()
    length = struct.unpack("<Q", whole[:8])[0]
    header = json.loads(whole[8 : 8 + length])
    names = [name for name in header if header[name].get("shape") == [32, 16]]
    header[names[0]]["data_offsets"] = header[names[1]]["data_offsets"]
    raw = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + whole[8 + length :])
    refused(checkpoint, str(path))


def test_missing_tensor_is_named_with_its_shape(checkpoint: Path) -> None:
    rewrite(checkpoint, DOWN, lambda tensors: [tensors.pop(DOWN), tensors.pop(DOWN + "_scale_inv")])
    refused(checkpoint, str(checkpoint), DOWN, "[32, 16]", "missing")


def test_misspelt_tensor_is_missing_with_the_near_name(checkpoint: Path) -> None:
    norm = "model.layers.1.self_attn.kv_a_layernorm.weight"
    typo = norm.replace("layernorm", "layer_norm")
    rewrite(checkpoint, norm, lambda tensors: tensors.update({typo: tensors.pop(norm)}))
    refused(checkpoint, repr(norm), "missing", typo)


def test_unexpected_tensor_is_named_with_near_names(checkpoint: Path) -> None:
    extra = "model.layers.1.self_attn.kv_b_projj.weight"
    path = rewrite(checkpoint, DOWN, lambda tensors: tensors.update({extra: torch.zeros(2, 2)}))
    refused(checkpoint, str(path), extra, "unexpected", "model.layers.1.self_attn.kv_b_proj.weight")


def test_layer_past_the_last_mtp_module_is_unexpected(checkpoint: Path) -> None:
    extra = "model.layers.4.input_layernorm.weight"
    rewrite(checkpoint, DOWN, lambda tensors: tensors.update({extra: torch.zeros(32)}))
    refused(checkpoint, extra, "unexpected")


def test_scale_of_a_weight_that_is_not_fp8_is_unexpected(checkpoint: Path) -> None:
    rewrite(checkpoint, DOWN, lambda tensors: tensors.update({DOWN: tensors[DOWN].float()}))
    refused(checkpoint, DOWN + "_scale_inv", "unexpected")


def test_wrong_shape_names_both_shapes(checkpoint: Path) -> None:
    norm = "model.layers.1.post_attention_layernorm.weight"
    path = rewrite(checkpoint, norm, lambda tensors: tensors.update({norm: torch.ones(33)}))
    refused(checkpoint, str(path), norm, "[33]", "[32]")


@pytest.mark.parametrize(
    ("dtype", "spelling"), [(torch.int32, "I32"), (torch.uint8, "U8"), (torch.float8_e5m2, "F8_E5M2")]
)
def test_wrong_dtype_family_is_named(checkpoint: Path, dtype: torch.dtype, spelling: str) -> None:
    name = "model.layers.1.mlp.gate.weight"
    path = rewrite(checkpoint, name, lambda tensors: tensors.update({name: torch.zeros(8, 32).to(dtype)}))
    refused(checkpoint, str(path), name, spelling, "F32")


def test_fp8_vector_is_a_wrong_dtype(checkpoint: Path) -> None:
    norm = "model.layers.1.post_attention_layernorm.weight"
    rewrite(checkpoint, norm, lambda tensors: tensors.update({norm: torch.ones(32).to(torch.float8_e4m3fn)}))
    refused(checkpoint, norm, "F8_E4M3")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_float_types_are_read(checkpoint: Path, dtype: torch.dtype) -> None:
    name = "model.layers.1.mlp.gate.weight"
    half = torch.full((8, 32), 0.5)
    rewrite(checkpoint, name, lambda tensors: tensors.update({name: half.to(dtype)}))
    loaded = import_hf(checkpoint)[0].state_dict()
    assert torch.equal(loaded["layers.1.mlp.gate.weight"], half)


def test_missing_scale_names_weight_and_scale(checkpoint: Path) -> None:
    path = rewrite(checkpoint, DOWN, lambda tensors: tensors.pop(DOWN + "_scale_inv"))
    refused(checkpoint, str(path), repr(DOWN), "[32, 16]", repr(DOWN + "_scale_inv"), "[1, 1]", "missing", "in BF16")


@pytest.mark.parametrize("wrong", [torch.ones(2, 1), torch.ones(1), torch.ones(0, 1)], ids=lambda each: str(each.shape))
def test_scale_of_the_wrong_shape_is_named_with_its_weight_s(checkpoint: Path, wrong: Tensor) -> None:
    scale = DOWN + "_scale_inv"
    path = rewrite(checkpoint, scale, lambda tensors: tensors.update({scale: wrong}))
    refused(checkpoint, str(path), scale, str(list(wrong.shape)), "[32, 16]", "[1, 1]", "weight_block_size", "anew")


def test_scales_of_other_blocks_than_config_json_says(checkpoint: Path) -> None:
    config = json.loads((checkpoint / "config.json").read_text())
    config["quantization_config"]["weight_block_size"] = [16, 16]
    (checkpoint / "config.json").write_text(json.dumps(config))
    refused(checkpoint, "weight_scale_inv", "[16, 16]", "weight_block_size")


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8, torch.float8_e4m3fn], ids=str)
def test_scale_of_the_wrong_dtype_is_named(checkpoint: Path, dtype: torch.dtype) -> None:
    scale = DOWN + "_scale_inv"
    path = rewrite(checkpoint, scale, lambda tensors: tensors.update({scale: torch.ones(1, 1).to(dtype)}))
    refused(checkpoint, str(path), scale, "F32 of shape [1, 1]")


@pytest.mark.parametrize("wrong", [torch.nan, torch.inf, -1e-3])
def test_scale_that_is_no_positive_number_is_named(checkpoint: Path, wrong: float) -> None:
    scale = DOWN + "_scale_inv"
    path = rewrite(checkpoint, scale, lambda tensors: tensors[scale].fill_(wrong))
    refused(checkpoint, str(path), scale, "[1, 1]", "not finite, or negative", "anew")


def test_weight_with_codes_for_nan_is_named(checkpoint: Path) -> None:
    path = rewrite(checkpoint, DOWN, lambda tensors: tensors[DOWN].view(torch.uint8)[3, 4:6].fill_(0x7F))
    refused(checkpoint, str(path), repr(DOWN), "[32, 16]", "2 values that are not finite", "anew")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("wrong", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("name", [DOWN, "model.layers.1.mlp.gate.e_score_correction_bias", "model.norm.weight"])
def test_values_that_are_not_finite_are_named_and_taken_if_allowed(
    plain: Path, name: str, wrong: float, dtype: torch.dtype
) -> None:
    tensors = load_file(plain / "model.safetensors")
    tensors[name] = tensors[name].to(dtype)
    tensors[name].view(-1)[-1] = wrong
    save_file(tensors, plain / "model.safetensors")
    refused(plain, str(plain / "model.safetensors"), repr(name), "1 values that are not finite", "--allow-non-finite")
    model, _ = import_hf(plain, dtype=torch.float32, allow_non_finite=True)
    assert sum(int((~torch.isfinite(each)).sum()) for each in model.state_dict().values()) == 1


def test_a_copy_that_is_not_finite_is_taken_if_allowed(plain: Path) -> None:
    tensors = load_file(plain / "model.safetensors")
    for name in ("model.embed_tokens.weight", "model.layers.3.embed_tokens.weight"):
        tensors[name][3, 4] = torch.nan
    save_file(tensors, plain / "model.safetensors")
    refused(plain, "embed_tokens.weight", "1 values that are not finite")
    import_hf(plain, allow_non_finite=True)


def test_numbers_too_large_for_the_dtype_are_named(plain: Path) -> None:
    tensors = load_file(plain / "model.safetensors")
    tensors[DOWN] = torch.full(tensors[DOWN].shape, 1e300, dtype=torch.float64)
    save_file(tensors, plain / "model.safetensors")
    refused(plain, repr(DOWN), "not finite in torch.float32", "too large")


def test_tables_that_older_writers_saved_are_passed_over(plain: Path) -> None:
    tensors = load_file(plain / "model.safetensors")
    before = import_hf(plain)[0].state_dict()
    for layer in range(4):
        tensors[f"model.layers.{layer}.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    tensors["model.rotary_emb.inv_freq"] = torch.ones(4, dtype=torch.float64)
    save_file(tensors, plain / "model.safetensors")
    assert all(torch.equal(before[key], tensor) for key, tensor in import_hf(plain)[0].state_dict().items())
    save_file({**tensors, "model.layers.0.inv_freq": torch.ones(4)}, plain / "model.safetensors")
    refused(plain, "unexpected tensor 'model.layers.0.inv_freq'")


def test_index_that_names_a_missing_file(checkpoint: Path) -> None:
    path = shard_of(checkpoint, DOWN)
    weight_map = json.loads((checkpoint / INDEX).read_text())["weight_map"]
    path.unlink()
    first = next(name for name, file in weight_map.items() if file == path.name)
    refused(checkpoint, INDEX, path.name, first, "missing")


def test_index_that_reaches_outside_the_directory(checkpoint: Path) -> None:
    index = json.loads((checkpoint / INDEX).read_text())
    index["weight_map"][DOWN] = "../hf/" + index["weight_map"][DOWN]
    (checkpoint / INDEX).write_text(json.dumps(index))
    refused(checkpoint, INDEX, DOWN, "../hf/")


def test_index_and_shard_that_disagree(checkpoint: Path) -> None:
    index = json.loads((checkpoint / INDEX).read_text())
    shard = index["weight_map"].pop(DOWN)
    (checkpoint / INDEX).write_text(json.dumps(index))
    refused(checkpoint, shard, DOWN, "no file")
    index["weight_map"] |= {DOWN: shard, "model.phantom": shard}
    (checkpoint / INDEX).write_text(json.dumps(index))
    refused(checkpoint, shard, "model.phantom")


@pytest.mark.parametrize("content", ["{", "[]", '{"metadata": {}}', '{"weight_map": {}}', '{"weight_map": {"a": 3}}'])
def test_broken_index_is_named(checkpoint: Path, content: str) -> None:
    (checkpoint / INDEX).write_text(content)
    refused(checkpoint, str(checkpoint / INDEX))


@pytest.mark.parametrize("content", ["{", "[]", '"x"'])
def test_broken_config_is_named(checkpoint: Path, content: str) -> None:
    (checkpoint / "config.json").write_text(content)
    refused(checkpoint, str(checkpoint / "config.json"))


def test_directory_that_is_no_checkpoint(checkpoint: Path, tmp_path: Path) -> None:
    refused(tmp_path / "nowhere", "nowhere", "not a directory")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "not a checkpoint directory", "nothing")
    (tmp_path / "empty" / "README.md").write_text("x")
    refused(tmp_path / "empty", "README.md")
    (tmp_path / "empty" / "config.json").write_text((checkpoint / "config.json").read_text())
    refused(tmp_path / "empty", "model.safetensors", INDEX)


def test_other_quantisations_are_refused(checkpoint: Path) -> None:
    config = json.loads((checkpoint / "config.json").read_text())
    wrong_blocks = [{"quant_method": "fp8", "weight_block_size": each} for each in (None, ["a", 128], [128, 0], 128)]
    for quantization in ({"quant_method": "awq"}, *wrong_blocks):
        config["quantization_config"] = quantization
        (checkpoint / "config.json").write_text(json.dumps(config))
        refused(checkpoint, "config.json", str(quantization["quant_method"]), "BF16")
    (checkpoint / "config.json").write_text(json.dumps({**config, "quantization_config": "fp8"}))
    refused(checkpoint, "config.json: quantization_config = 'fp8': expected an object")


def without_mtp(checkpoint: Path) -> None:
    names = [name for name in json.loads((checkpoint / INDEX).read_text())["weight_map"] if ".layers.3." in name]
    for name in names:
        rewrite(checkpoint, name, lambda tensors, name=name: tensors.pop(name))


def test_absent_mtp_weights_are_an_error_with_the_remedy_or_dropped(checkpoint: Path) -> None:
    without_mtp(checkpoint)
    refused(checkpoint, "model.layers.3.enorm.weight", "num_nextn_predict_layers = 1", 'mtp="drop"')
    model, spec = import_hf(checkpoint, mtp="drop")
    assert spec.num_nextn_predict_layers == 0
    assert not [key for key in model.state_dict() if key.startswith("mtp")]


def test_present_mtp_weights_are_dropped_on_request(checkpoint: Path) -> None:
    full = import_hf(checkpoint)[0].state_dict()
    model, spec = import_hf(checkpoint, mtp="drop")
    assert spec.num_nextn_predict_layers == 0
    assert all(torch.equal(tensor, full[key]) for key, tensor in model.state_dict().items())
    with pytest.raises(ValueError, match="unloaded"):
        load_into(import_hf(checkpoint)[0], checkpoint, mtp="drop")


@pytest.mark.parametrize("copy", ["embed_tokens.weight", "shared_head.head.weight"])
def test_copies_that_differ_are_an_error_and_absent_ones_are_not(checkpoint: Path, copy: str) -> None:
    name = "model.layers.3." + copy
    path = rewrite(checkpoint, name, lambda tensors: tensors[name].view(-1)[7].add_(1))
    refused(checkpoint, str(path), name, "differs", "remove it")
    rewrite(checkpoint, name, lambda tensors: tensors.pop(name))
    import_hf(checkpoint)


def test_tied_checkpoint_may_store_the_head_if_it_equals_the_embedding(
    tmp_path: Path, tiny_spec: Callable[..., ModelSpec], random_model: Callable[..., Transformer]
) -> None:
    spec = tiny_spec(tie_word_embeddings=True)
    export_hf(random_model(spec), spec, tmp_path / "hf")
    tensors = load_file(tmp_path / "hf" / "model.safetensors")
    assert "lm_head.weight" not in tensors
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, tmp_path / "hf" / "model.safetensors")
    import_hf(tmp_path / "hf")
    tensors["lm_head.weight"][0, 0] += 1
    save_file(tensors, tmp_path / "hf" / "model.safetensors")
    refused(tmp_path / "hf", "lm_head.weight", "differs")


def test_failed_load_leaves_the_model_alone(
    checkpoint: Path, tiny_spec: Callable[..., ModelSpec], random_model: Callable[..., Transformer]
) -> None:
    model = random_model(tiny_spec(), seed=3)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    name = "model.layers.3.embed_tokens.weight"
    rewrite(checkpoint, name, lambda tensors: tensors[name].add_(1))
    with pytest.raises(ValueError, match="differs"):
        load_into(model, checkpoint)
    path = shard_of(checkpoint, DOWN)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match="truncated"):
        load_into(model, checkpoint)
    assert all(torch.equal(before[key], tensor) for key, tensor in model.state_dict().items())
