"""`generate`, `export` and `import` on a small checkpoint: options, what is advised, remarks, mistakes and streams."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import dovetail
from dovetail.cli import app as cli
from dovetail.model.checkpoint.weights import export_hf
from dovetail.model.transformer import Transformer, initialize
from dovetail.spec.model import Mla, ModelSpec
from dovetail.text.tokenizer import Tokenizer

ATTENTION = Mla(num_attention_heads=2, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8)
SPEC = ModelSpec(
    vocab_size=272,
    hidden_size=32,
    num_hidden_layers=1,
    intermediate_size=32,
    attention=ATTENTION,
    eos_token_id=1,
    initializer_range=0.2,
)
Streams = pytest.CaptureFixture[str]


@pytest.fixture
def checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Its path is ~/model."""
    monkeypatch.setenv("HOME", str(tmp_path))
    model = Transformer(SPEC)
    initialize(model, 0)
    Tokenizer.train([], 261).save(tmp_path)
    export_hf(model, SPEC, tmp_path / "model", tokenizer_files=tmp_path.glob("*.json"))
    return tmp_path / "model"


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["dovetail", *arguments])
    with pytest.raises(SystemExit) as done:
        cli.main()
    return int(done.value.code or 0)


def completion(monkeypatch: pytest.MonkeyPatch, capsys: Streams, *options: str) -> list[int]:
    command = ["generate", "~/model", "--prompt", "a", "--max-tokens", "24", "--json", *options]
    assert run(monkeypatch, *command) == 0
    (record,) = json.loads(capsys.readouterr().out)
    return list(record["token_ids"])


def test_what_is_advised_holds_unless_an_option_says_otherwise(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: Streams
) -> None:
    greedy, drawn, narrow = (
        completion(monkeypatch, capsys, *options)
        for options in (("--temperature", "0"), (), ("--temperature", "0.5", "--top-k", "3"))
    )
    assert greedy != drawn != narrow
    advice = checkpoint / "generation_config.json"
    advice.write_text(json.dumps({"do_sample": False, "repetition_penalty": 1.1}), encoding="utf-8")
    assert completion(monkeypatch, capsys) == greedy
    assert completion(monkeypatch, capsys, "--temperature", "1") == drawn
    advice.write_text(json.dumps({"do_sample": True, "temperature": 0.5, "top_k": 3}), encoding="utf-8")
    assert completion(monkeypatch, capsys) == narrow
    assert completion(monkeypatch, capsys, "--temperature", "1", "--top-k", "0") == drawn


def test_several_prompts_have_seeds_of_their_own(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: Streams
) -> None:
    command = ["generate", str(checkpoint), "--json", "--max-tokens", "12", "--seed", "3"]
    assert run(monkeypatch, *command, "--prompt", "a", "--prompt", "a") == 0
    first, second = (each["token_ids"] for each in json.loads(capsys.readouterr().out))
    assert first != second
    assert run(monkeypatch, *command[:-1], "4", "--prompt", "a") == 0
    assert json.loads(capsys.readouterr().out)[0]["token_ids"] == second


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--top-p", "0"), "top_p = 0.0: input should be greater than 0"),
        (("--temperature", "1e-9"), "temperature = 1e-09 is too close to 0"),
        (("--dtype", "bf16"), "dtype = bf16: did you mean bfloat16?"),
    ],
)
def test_mistakes_are_one_line_and_come_before_weights(
    checkpoint: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Streams,
    options: tuple[str, ...],
    message: str,
) -> None:
    (checkpoint / "model.safetensors").unlink()
    assert run(monkeypatch, "generate", str(checkpoint), "--prompt", "a", *options) == 1
    said = capsys.readouterr().err
    assert message in said and said.startswith("dovetail: ") and said.count("\n") == 1


def test_weights_that_are_not_finite(checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: Streams) -> None:
    file = checkpoint / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.0.self_attn.o_proj.weight"][0, 0] = torch.nan
    save_file(tensors, file)
    out = str(checkpoint.parent / "out")
    generate = ["generate", str(checkpoint), "--prompt", "a", "--max-tokens", "1"]
    for command in (generate, ["export", str(checkpoint), out], ["import", str(checkpoint), out]):
        assert run(monkeypatch, *command) == 1
        said = capsys.readouterr()
        assert said.out == "" and f"{file}: tensor 'model.layers.0.self_attn.o_proj.weight'" in said.err
        assert not Path(out).exists()
        assert run(monkeypatch, *command[:2], "--allow-non-finite", *command[2:]) == 0
        capsys.readouterr()
        if Path(out).exists():
            Path(out).rename(checkpoint.parent / command[0])


def test_what_is_passed_over_is_said_and_companions_are_copied_whole(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: Streams
) -> None:
    file = checkpoint / "model.safetensors"
    save_file(load_file(file) | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}, file)
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps({**config, "eos_token_id": [1, 7], "index_topk": 3}))
    advice = {"eos_token_id": [1, 9], "temperature": 0.6, "repetition_penalty": 1.1}
    (checkpoint / "generation_config.json").write_text(json.dumps(advice))
    for verb in ("export", "import"):
        assert run(monkeypatch, verb, "~/model", f"~/{verb}") == 0
        said = capsys.readouterr().out
        for part in ("config.json: keys that were not read: index_topk", "repetition_penalty", "rotary_emb.inv_freq"):
            assert part in said
        out = checkpoint.parent / verb
        assert json.loads((out / "config.json").read_text())["eos_token_id"] == [1, 7]
        assert json.loads((out / "generation_config.json").read_text()) == advice
    assert run(monkeypatch, "generate", "~/model", "--prompt", "a", "--max-tokens", "1") == 0
    assert "rotary_emb.inv_freq" in capsys.readouterr().err


def shell(command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    source = str(Path(dovetail.__file__).parents[1])
    variables = {**os.environ, "PYTHONPATH": source, **environment}
    command = f'set -o pipefail; dovetail() {{ {sys.executable} -m dovetail "$@"; }}; {command}'
    return subprocess.run(["bash", "-c", command], capture_output=True, text=True, env=variables, check=False)


def test_a_completion_is_printed_whatever_the_encoding(checkpoint: Path) -> None:
    done = shell(
        f"dovetail generate {checkpoint} --prompt 日本 --max-tokens 3 --dtype float32", PYTHONIOENCODING="cp1252"
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(r"\u65e5\u672c")


def test_a_reader_that_has_gone_and_a_closed_stream_are_no_mistake() -> None:
    for command in ("dovetail list >&-", "dovetail list --json | true", "dovetail --help | true", "dovetail list 2>&-"):
        done = shell(command)
        assert done.stderr == "", command
        assert done.returncode == (1 if "|" in command else 0), command
    full = shell("dovetail list > /dev/full")
    assert full.returncode == 1 and full.stderr.count("\n") == 1 and "No space left" in full.stderr
