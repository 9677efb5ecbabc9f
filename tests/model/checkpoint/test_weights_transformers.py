"""Against transformers' DeepseekV3ForCausalLM: our files load there, theirs here, and both compute the same.

The wrong variants are kept: each must move the logits or lose the MTP, or the comparison proves nothing.
"""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, DeepseekV3ForCausalLM
from transformers.integrations.finegrained_fp8 import Fp8Dequantize, FP8Experts, FP8Linear
from transformers.modeling_layers import MtpModel
from transformers.quantizers import AutoHfQuantizer

from dovetail.model.checkpoint.weights import export_hf, import_hf, to_published
from dovetail.model.transformer import Transformer
from dovetail.spec.hf_config import write_hf
from dovetail.spec.model import ModelSpec

SpecFactory = Callable[..., ModelSpec]
ModelFactory = Callable[..., Transformer]
# FP32 sums of a few hundred terms in another order, through three layers of order-one activations
TOLERANCE = 1e-4
SHAPES = {
    "all parts": {},
    "uncompressed queries": {"q_lora_rank": None},
    "two shared experts, no MTP": {"n_shared_experts": 2, "num_nextn_predict_layers": 0},
    "tied embeddings": {"tie_word_embeddings": True},
    "V2: softmax, group-limited": {"model_type": "deepseek_v2", "num_nextn_predict_layers": 0}
    | {"scoring_func": "softmax", "topk_method": "group_limited_greedy", "norm_topk_prob": False},
    "YaRN": {"rope_scaling": {"factor": 4.0, "original_max_position_embeddings": 16}},
}


def their_logits(directory: Path, tokens: Tensor) -> Tensor:
    model, info = AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, output_loading_info=True, attn_implementation="eager"
    )
    num_layers = model.config.num_hidden_layers
    unexpected = [key for key in info["unexpected_keys"] if f"layers.{num_layers}." not in key]
    assert not info["missing_keys"] and not unexpected and not info["mismatched_keys"]
    with torch.no_grad():
        logits: Tensor = model.eval()(tokens).logits
    return logits


def our_logits(model: Transformer, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        return model.logits(model(tokens).hidden)


def some_tokens(vocab_size: int) -> Tensor:
    return torch.randint(0, vocab_size, (2, 24), generator=torch.Generator().manual_seed(0))


def rewrite(directory: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("shape", SHAPES)
def test_their_save_computes_the_same_here(shape: str, tmp_path: Path, tiny_spec: SpecFactory) -> None:
    spec = tiny_spec(**SHAPES[shape])
    torch.manual_seed(1)
    config = AutoConfig.for_model(**write_hf(spec))
    theirs = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            parameter.normal_(1.0 if "norm" in name else 0.0, 0.2)
        for name, buffer in theirs.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.uniform_(-0.3, 0.3)
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="50KB")
    model, _ = import_hf(tmp_path / "theirs", dtype=torch.float32, mtp="drop")
    tokens = some_tokens(spec.vocab_size)
    with torch.no_grad():
        expected = theirs(tokens).logits
    assert (our_logits(model, tokens) - expected).abs().max() < TOLERANCE * expected.abs().max()
    if spec.num_nextn_predict_layers:
        with pytest.raises(ValueError, match='mtp="drop"'):
            import_hf(tmp_path / "theirs")


def test_export_import_and_their_save_hold_the_same_bits(
    tmp_path: Path, tiny_spec: SpecFactory, random_model: ModelFactory
) -> None:
    spec = tiny_spec()
    export_hf(random_model(spec), spec, tmp_path / "ours")
    DeepseekV3ForCausalLM.from_pretrained(tmp_path / "ours").save_pretrained(tmp_path / "theirs")
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("ours", "theirs"))
    assert theirs.keys() == {name for name in ours if ".layers.3." not in name}
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())


def swap(tensors: dict[str, Tensor], first: str, second: str) -> None:
    tensors[first], tensors[second] = tensors[second], tensors[first]


@pytest.mark.parametrize(
    "mlp", ["model.layers.0.mlp", "model.layers.1.mlp.experts.0", "model.layers.1.mlp.shared_experts"]
)
def test_gate_and_up_swapped_is_seen(
    mlp: str, tmp_path: Path, tiny_spec: SpecFactory, random_model: ModelFactory
) -> None:
    spec = tiny_spec()
    model = random_model(spec)
    export_hf(model, spec, tmp_path / "out")
    rewrite(tmp_path / "out", lambda t: swap(t, f"{mlp}.gate_proj.weight", f"{mlp}.up_proj.weight"))
    tokens = some_tokens(spec.vocab_size)
    ours, theirs = our_logits(model, tokens), their_logits(tmp_path / "out", tokens)
    assert (ours - theirs).abs().max() > 100 * TOLERANCE * ours.abs().max()


def test_experts_in_another_order_are_seen(tmp_path: Path, tiny_spec: SpecFactory, random_model: ModelFactory) -> None:
    spec = tiny_spec()
    model = random_model(spec)
    export_hf(model, spec, tmp_path / "out")
    experts = "model.layers.2.mlp.experts"
    rewrite(tmp_path / "out", lambda t: swap(t, f"{experts}.2.down_proj.weight", f"{experts}.3.down_proj.weight"))
    tokens = some_tokens(spec.vocab_size)
    ours, theirs = our_logits(model, tokens), their_logits(tmp_path / "out", tokens)
    assert (ours - theirs).abs().max() > 100 * TOLERANCE * ours.abs().max()


@pytest.mark.parametrize("fp8", [True, "ue8m0"])
def test_fp8_export_dequantises_alike_there_and_here(
    fp8: bool | str, tmp_path: Path, tiny_spec: SpecFactory, random_model: ModelFactory
) -> None:
    # transformers refuses ragged blocks, so every dim above 128 is a multiple of it
    spec = tiny_spec(hidden_size=256, moe_intermediate_size=128, intermediate_size=256)
    model = random_model(spec)
    export_hf(model, spec, tmp_path / "out", fp8=fp8)
    disk = load_file(tmp_path / "out" / "model.safetensors")
    loaded = dict(to_published(import_hf(tmp_path / "out", dtype=torch.float32)[0].state_dict(), spec))
    quantized = [name for name, tensor in disk.items() if tensor.dtype == torch.float8_e4m3fn]
    assert len(quantized) > 80
    for name in quantized:
        data, scale = disk[name], disk[name + "_scale_inv"]
        theirs = Fp8Dequantize(None).convert({"weight": data, "weight_scale_inv": scale})["weight"]
        assert torch.equal(loaded[name], theirs), name
        divisor = Fp8Dequantize(None).convert({"weight": data, "weight_scale_inv": 1 / scale})["weight"]
        assert (loaded[name] - divisor).norm() > loaded[name].norm(), name  # the wrong reading is far off


# All sides are multiples of 128 but the rows of kv_a_proj_with_mqa, as in V3.
WHOLE = {"hidden_size": 256, "moe_intermediate_size": 128, "intermediate_size": 256, "q_lora_rank": 128}
WHOLE |= {"kv_lora_rank": 128, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, "vocab_size": 200}


@pytest.mark.parametrize("shape", [{}, {"tie_word_embeddings": True}, {"moe_intermediate_size": 96}])
def test_fp8_for_transformers_loads_there(
    shape: dict[str, object], tmp_path: Path, tiny_spec: SpecFactory, random_model: ModelFactory
) -> None:
    """On a CPU it dequantises while it loads; the modules that a GPU would compute with are built and compared."""
    spec = tiny_spec(**WHOLE | shape)
    model = random_model(spec)
    export_hf(model, spec, tmp_path / "out", fp8="transformers")
    tokens = some_tokens(spec.vocab_size)
    ours = our_logits(import_hf(tmp_path / "out", dtype=torch.float32)[0], tokens)
    theirs = their_logits(tmp_path / "out", tokens)
    assert (ours - theirs).abs().max() < TOLERANCE * ours.abs().max()
    assert (our_logits(model, tokens) - theirs).abs().max() > 100 * TOLERANCE * ours.abs().max()  # FP8 it is
    assert fp8_modules(tmp_path / "out") == {
        name.removesuffix(".weight").split(".experts.")[0] + ".experts" * (".experts." in name)
        for name, tensor in load_file(tmp_path / "out" / "model.safetensors").items()
        if tensor.dtype == torch.float8_e4m3fn and ".layers.3." not in name
    }


def fp8_modules(directory: Path) -> set[str]:
    """Names of the modules that transformers has in FP8 on a GPU."""
    config = AutoConfig.from_pretrained(directory)
    with torch.device("meta"):
        model = DeepseekV3ForCausalLM(config)
    quantizer = AutoHfQuantizer.from_config(config.quantization_config, pre_quantized=True)
    quantizer._process_model_before_weight_loading(model)
    return {name for name, module in model.named_modules() if isinstance(module, FP8Linear | FP8Experts)}


def test_fp8_as_published_is_refused_there_or_read_with_wrong_scales(
    tmp_path: Path, tiny_spec: SpecFactory, random_model: ModelFactory
) -> None:
    """Their blocks are rows over scales: 5 scales do not divide 576 rows, and 2 of them make blocks of 96 in 192."""
    for latent, is_refused in ((512, True), (128, False)):
        spec = tiny_spec(**WHOLE | {"kv_lora_rank": latent})
        out, tokens = tmp_path / str(latent), some_tokens(spec.vocab_size)
        export_hf(random_model(spec), spec, out, fp8=True)
        if is_refused:
            with pytest.raises(RuntimeError):
                their_logits(out, tokens)
            continue
        ours = our_logits(import_hf(out, dtype=torch.float32)[0], tokens)
        assert (ours - their_logits(out, tokens)).abs().max() > 10 * TOLERANCE * ours.abs().max()


# ---- MTP: transformers loads it only inside generate(), and by the literal pattern of layer 61 ----


def their_draft_hidden(directory: Path, model: Transformer, tokens: Tensor) -> Tensor:
    """Output of transformers' MTP module 0 on our main hidden states and the shifted tokens."""
    main = DeepseekV3ForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager")
    main._keys_to_ignore_on_load_unexpected = [rf"model\.layers\.{main.config.num_hidden_layers}.*"]
    drafter = MtpModel.from_pretrained(main, device_map={"": "cpu"}).eval()
    with torch.no_grad():
        hidden = model(tokens).hidden[:, :-1]
        positions = torch.arange(1, tokens.shape[1])[None]
        output: Tensor = drafter.forward_layer(0, hidden, positions, None, input_ids=tokens[:, 1:])
    return output


def test_mtp_module_computes_the_same_there_and_swapped_halves_are_seen(
    tmp_path: Path, tiny_spec: SpecFactory, random_model: ModelFactory
) -> None:
    spec = tiny_spec()
    model = random_model(spec)
    export_hf(model, spec, tmp_path / "out")
    tokens = some_tokens(spec.vocab_size)[:1]
    positions = torch.arange(1, tokens.shape[1])[None]
    with torch.no_grad():
        ours = model.mtp_forward(0, model(tokens).hidden[:, :-1], tokens[:, 1:], positions).hidden
    theirs = their_draft_hidden(tmp_path / "out", model, tokens)
    assert (ours - theirs).abs().max() < TOLERANCE * ours.abs().max()

    def swap_halves(tensors: dict[str, Tensor]) -> None:
        name = "model.layers.3.eh_proj.weight"
        tensors[name] = tensors[name].roll(spec.hidden_size, dims=1).contiguous()

    rewrite(tmp_path / "out", swap_halves)
    wrong = their_draft_hidden(tmp_path / "out", model, tokens)
    assert (ours - wrong).abs().max() > 100 * TOLERANCE * ours.abs().max()
