"""Do two checkouts compute the same bits? Losses, logits, completions, exports, plans and networks of each, compared.

    python benchmarks/same_bits.py BEFORE AFTER

Each side runs its own commands (`python -m dovetail`) on the same small text and model, so that files may move and
functions change their names between the two. Numbers have to agree to the last bit, and files byte for byte; wording
and clock times are left out. Exit code 1 names what does not agree. Bits depend on the CPU and on its number of
threads: compare on one machine.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

RUN = """
out = "run"
schedule = "short"
[model]
preset = "quickstart"
change = { num_hidden_layers = 3, hidden_size = 128, vocab_size = 512 }
[data]
kind = "files"
path = "text"
held_out_share = 0.2
[train]
steps = 6
sequence_length = 64
microbatch_size = 2
batch_size = 4
ema_decay = 0.9
checkpoint_every = 3
"""
TRAININGS: dict[str, list[str]] = {
    "bf16": [],
    "fp32": ["train.dtype=float32"],
    "documents": ["train.separate_documents=true", "train.recompute=true"],
    **{name: [f"train.precision={name}", "train.dtype=bfloat16", "train.health_every=3"] for name in (
        "deepseek-v3", "deepseek-v3.1", "v3-per-tensor", "v3-e5m2-gradients", "v3-block-gradients", "v3-hopper",
        "v3-no-promotion", "bf16-fp32-moments", "combine-e4m3", "combine-logfmt-8",
    )},
}  # fmt: skip
H800 = ["--cluster", "h800-2048"]
TRAIN_V3 = ["plan", "deepseek-v3", *H800, "--goal", "train", "--batch", "15360", "--tokens", "14.8T"]
FIXED = ["--pp", "16", "--ep", "64", "--schedule", "dualpipe"]
COMMANDS: dict[str, list[str]] = {
    **{f"inspect {name}": ["inspect", name] for name in ("quickstart", "300m", "deepseek-v2", "deepseek-v3",
                                                         "llama-3.1-405b", "qwen2.5-72b")},
    "plan train": TRAIN_V3,
    "plan train on a network": [*TRAIN_V3, *FIXED, "--network", "simulate", "--fail", "plane:3"],
    "plan train elsewhere": [
        "plan", "deepseek-v2-lite", "--cluster", "h100-node", "--goal", "train", "--batch", "1024"],
    "plan train varied": ["plan", "deepseek-v3", *H800, "--goal", "train", "--batch", "15360", *FIXED,
                          "--vary", "topk_group=2,4"],
    "plan serve": ["plan", "deepseek-v3", *H800, "--goal", "serve", "--context", "4989", "--output-speed", "20"],
    "plan serve two": ["plan", "deepseek-v3", *H800, "--cluster", "h200-node", "--goal", "serve", "--context", "4096"],
    **{f"show {name}": ["network", "show", name] for name in ("mpft", "slim-fly", "dragonfly", "mrft", "ft3")},
    **{f"simulate {name}": ["network", "simulate", "--fabric", "mpft", "--gpus", "128", "--collective", name,
                            "--size", "64MiB"] for name in ("all-to-all", "all-gather", "all-reduce")},
    "simulate dispatch": ["network", "simulate", "--fabric", "mpft", "--gpus", "64", "--collective", "dispatch",
                          "--model", "deepseek-v3", "--tokens", "4096"],
    "simulate ecmp": ["network", "simulate", "--fabric", "ft2", "--gpus", "64", "--collective", "all-to-all",
                      "--size", "1MiB", "--routing", "ecmp", "--fail", "nic:5"],
    "simulate dragonfly": ["network", "simulate", "--fabric", "dragonfly", "--gpus", "4096", "--collective",
                           "all-to-all", "--size", "1GiB"],
    "reproduce": ["reproduce"],
}  # fmt: skip
GREEDY, DRAWN = ["--temperature", "0"], ["--temperature", "0.9", "--top-p", "0.95", "--top-k", "40", "--min-p", "0.01"]
LOGITS = """
import hashlib, sys, torch
from dovetail import LLM
for dtype in (torch.bfloat16, torch.float32):
    llm = LLM.load(sys.argv[1], dtype=dtype)
    tokens = torch.arange(2 * 96).view(2, 96) % llm.spec.vocab_size
    with torch.no_grad():
        hidden = llm.model(tokens).hidden
        logits = [llm.model.logits(hidden)]
        logits.append(llm.model.logits(llm.model.mtp_forward(0, hidden, tokens.roll(-1, 1)).hidden))
    print(dtype, *(hashlib.sha256(each.numpy().tobytes()).hexdigest() for each in logits))
"""
STEP = ("loss", "mtp_loss", "balance_loss", "grad_norm", "learning_rate", "batch_size", "gamma", "max_vio", "skipped")


def main() -> None:
    if len(sys.argv) != 3:
        sys.exit(f"usage: {sys.argv[0]} BEFORE AFTER   (two checkouts)")
    before, after = (dict(fingerprints(Path(each).resolve())) for each in sys.argv[1:])
    names = sorted(before.keys() | after.keys())
    different = [name for name in names if before.get(name) != after.get(name)]
    for name in names:
        print(f"{name:48} {'DIFFERS' if name in different else 'same'}")
    print(f"{len(names) - len(different)} of {len(names)} the same to the last bit")
    sys.exit(1 if different else 0)


def fingerprints(checkout: Path) -> Iterator[tuple[str, str]]:
    """Name and digest of everything that `checkout` computes."""
    with tempfile.TemporaryDirectory() as scratch:
        directory = Path(scratch)
        (directory / "text").mkdir()
        for i in range(40):  # text of which both sides have the same
            lines = (f"def f{i}_{j}(x, y):\n    return x * {j} + y - {i * j}\n" for j in range(80))
            (directory / "text" / f"{i}.py").write_text("\n".join(lines))
        (directory / "run.toml").write_text(RUN)
        for name, arguments in COMMANDS.items():
            yield name, digest(json.loads(run(checkout, directory, [*arguments, "--json"])))
        for name, changes in TRAININGS.items():
            settings = [part for change in (f"out={name}", *changes) for part in ("--set", change)]
            run(checkout, directory, ["train", "run.toml", *settings])
            lines = (directory / name / "metrics.jsonl").read_text().splitlines()
            records = [json.loads(line) for line in lines]
            steps = [[record[key] for key in STEP] for record in records if record["kind"] == "step"]
            yield f"training {name}", digest([*steps, *(each for each in records if each["kind"] == "health")])
        yield from weights(checkout, directory)


def weights(checkout: Path, directory: Path) -> Iterator[tuple[str, str]]:
    exports = {"model": [], "model-fp8": ["--fp8"], "model-ema": ["--ema"]}
    for name, options in exports.items():
        run(checkout, directory, ["export", "bf16", name, *options])
    run(checkout, directory, ["import", "model-fp8", "imported"])
    for name in (*exports, "imported"):
        for path in sorted((directory / name).iterdir()):
            yield f"{name}/{path.name}", hashlib.sha256(path.read_bytes()).hexdigest()
    for depth in ("0", "1"):
        for name, options in (("greedy", GREEDY), ("drawn", DRAWN)):
            arguments = ["generate", "model", "--prompt", "def f3_4(", "--prompt", "return", "--speculate", depth]
            completions = json.loads(run(checkout, directory, [*arguments, *options, "--max-tokens", "40", "--json"]))
            yield f"completions {name}, {depth} drafts", digest([each["token_ids"] for each in completions])
    yield "logits", python(checkout, directory, ["-c", LOGITS, "model"])


def run(checkout: Path, directory: Path, arguments: list[str]) -> str:
    return python(checkout, directory, ["-m", "dovetail", *arguments])


def python(checkout: Path, directory: Path, arguments: list[str]) -> str:
    environment = {**os.environ, "PYTHONPATH": str(checkout / "src")}
    done = subprocess.run([sys.executable, *arguments], cwd=directory, env=environment, capture_output=True, text=True)
    if done.returncode and "reproduce" not in arguments:  # which says by its exit code that predictions missed
        sys.exit(f"{checkout}: {' '.join(arguments)}\n{done.stderr}")
    return done.stdout


def digest(record: Any) -> str:
    return hashlib.sha256(json.dumps(numbers(record), sort_keys=True).encode()).hexdigest()


def numbers(record: Any) -> Any:
    """`record` without texts; keys stay where a number is below them."""
    if isinstance(record, dict):
        found = {key: numbers(value) for key, value in record.items()}
        return {key: value for key, value in found.items() if value not in (None, {}, [])}
    if isinstance(record, list):
        return [each for value in record if (each := numbers(value)) not in (None, {}, [])]
    return None if isinstance(record, str) else record


if __name__ == "__main__":
    main()
