"""Whether other engines give the same greedy text for a trained, exported checkpoint, up to near ties.

    python -m venv LLAMA && LLAMA/bin/pip install llama-cpp-python==0.3.36     (compiles for some minutes)
    pip download --no-deps --no-binary :all: llama-cpp-python==0.3.36          (llama.cpp's source with its converter)
    python benchmarks/greedy_elsewhere.py MODEL --vllm-python VLLM/bin/python \\
        --llama-python LLAMA/bin/python --llama-source llama_cpp_python-0.3.36/vendor/llama.cpp

MODEL is what `dovetail export` wrote, with the MLA dims that vLLM takes (`dovetail.spec.kernel_shapes`); the
environment with vLLM is that of generate_vllm.py. All are given token ids: beginnings of held-out files of the standard
library. Where a text parts from ours, both tokens' logits at that place are computed anew in FP32, from the tokens that
the two texts share. A gap of no more than rounding in BF16 makes of them is a near tie. With `--float32` all
compute in FP32, which leaves nearly no ties.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from _machine import use_threads
from _sides import append_rows, print_table
from speculation import prompts as held_out_prompts

from dovetail.engine.llm import LLM
from dovetail.engine.sampler import SamplingParams
from dovetail.model.checkpoint.weights import import_hf
from dovetail.model.transformer import Transformer
from dovetail.threads import num_threads

HERE = Path(__file__).parent
Tokens = list[list[int]]
GGML_TYPES = {torch.float32: 0, torch.bfloat16: 30}  # [ggml.h]
OUT_TYPES = {torch.float32: "f32", torch.bfloat16: "bf16"}  # of llama.cpp's converter


@dataclass(frozen=True, slots=True, kw_only=True)
class Parting:
    """Where the text of an engine parts from ours."""

    file: str
    position: int  # in the completion
    ours: int
    theirs: int
    gap: float  # logit of ours less that of theirs, in FP32


def ask(command: Sequence[str], environment: dict[str, str], prompts: Tokens, new_tokens: int) -> tuple[Any, Tokens]:
    """Versions and completions of an engine that `command` starts."""
    question = json.dumps({"prompts": prompts, "new_tokens": new_tokens}) + "\n"
    done = subprocess.run(command, input=question, env=environment, capture_output=True, text=True, check=False)
    lines = done.stdout.splitlines()
    if len(lines) != 2:
        sys.exit(f"{command[0]} ended; its last lines:\n{done.stderr[-4000:]}")
    return json.loads(lines[0])["versions"], json.loads(lines[1])["tokens"]


def elsewhere() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}


def ask_vllm(
    python: Path, checkpoint: Path, dtype: torch.dtype, prompts: Tokens, new_tokens: int
) -> tuple[Any, Tokens]:
    settings = {
        "skip_tokenizer_init": True,
        "dtype": str(dtype).removeprefix("torch."),
        "max_model_len": len(prompts[0]) + new_tokens,
        "max_num_seqs": len(prompts),
        "enforce_eager": True,
        # Its own rotary op is wrong for the queries of MLA, which have three dimensions, and the text is nonsense.
        "compilation_config": {"custom_ops": ["all", "-rotary_embedding"]},
    }
    environment = {**elsewhere(), "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    command = [str(python), str(HERE / "_vllm_server.py"), str(checkpoint), json.dumps(settings)]
    return ask(command, environment, prompts, new_tokens)


def ask_llama(python: Path, gguf: Path, dtype: torch.dtype, prompts: Tokens, new_tokens: int) -> tuple[Any, Tokens]:
    settings = {"n_ctx": len(prompts[0]) + new_tokens, "n_threads": num_threads(), "verbose": False}
    settings["type_k"] = settings["type_v"] = GGML_TYPES[dtype]  # of the cache; of itself F16
    command = [str(python), str(HERE / "_llama_server.py"), str(gguf), json.dumps(settings)]
    return ask(command, elsewhere(), prompts, new_tokens)


def convert(source: Path, checkpoint: Path, gguf: Path, *how: str) -> Path:
    words = [sys.executable, str(HERE / "_llama_convert.py"), str(source), str(checkpoint), str(gguf), *how]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit("llama.cpp's converter ended; its last lines:\n" + done.stderr[-4000:])
    return gguf


def partings(model: Transformer, names: list[str], prompts: Tokens, ours: Tokens, theirs: Tokens) -> Iterator[Parting]:
    for name, prompt, mine, other in zip(names, prompts, ours, theirs, strict=True):
        at = next((place for place, pair in enumerate(zip(mine, other, strict=True)) if len(set(pair)) > 1), None)
        if at is None:
            continue
        with torch.no_grad():
            logits = model.logits(model(torch.tensor([prompt + mine[:at]])).hidden[:, -1:])[0, -1]
        gap = float(logits[mine[at]] - logits[other[at]])
        yield Parting(file=name, position=at, ours=mine[at], theirs=other[at], gap=gap)


def main(
    checkpoint: Annotated[Path, typer.Argument(help="A trained model in the Hugging Face layout.")],
    vllm_python: Annotated[Path | None, typer.Option(help="The interpreter of the environment with vLLM.")] = None,
    llama_python: Annotated[Path | None, typer.Option(help="An interpreter with llama-cpp-python.")] = None,
    llama_source: Annotated[Path | None, typer.Option(help="llama.cpp's source, for its converter.")] = None,
    files: Annotated[int, typer.Option(help="Prompts.")] = 20,
    prompt_tokens: int = 64,
    new_tokens: int = 64,
    in_float32: Annotated[bool, typer.Option("--float32", help="Compute in FP32 everywhere, not in BF16.")] = False,
    record: bool = True,
) -> None:
    use_threads(None)
    dtype = torch.float32 if in_float32 else torch.bfloat16
    if (llama_python is None) != (llama_source is None):
        raise typer.BadParameter("llama.cpp wants both --llama-python and --llama-source")
    llm = LLM.load(checkpoint, dtype=dtype)
    names, prompts = map(list, zip(*held_out_prompts(llm, files, prompt_tokens, new_tokens), strict=True))
    params = SamplingParams(temperature=0.0, max_tokens=new_tokens, ignore_eos=True)
    ours = [completion.token_ids for completion in llm.generate(prompts, params)]
    answers: dict[str, tuple[Any, Tokens]] = {}
    if vllm_python:
        answers["vLLM"] = ask_vllm(vllm_python, checkpoint, dtype, prompts, new_tokens)
    if llama_python and llama_source:
        with tempfile.TemporaryDirectory() as folder:
            for name, how in (
                ("llama.cpp", []),
                ("llama.cpp, MTP kept", ["mtp"] * bool(llm.spec.num_nextn_predict_layers)),
            ):
                gguf = convert(llama_source, checkpoint, Path(folder) / "model.gguf", OUT_TYPES[dtype], *how)
                answers[name] = ask_llama(llama_python, gguf, dtype, prompts, new_tokens)
    reference, _ = import_hf(checkpoint, dtype=torch.float32, mtp="drop")
    rows, lines = [], []
    for engine, (versions, theirs) in answers.items():
        found = list(partings(reference, names, prompts, ours, theirs))
        equal = f"{len(prompts) - len(found)} of {len(prompts)} texts of {new_tokens} tokens equal"
        print(f"{engine} {versions}, {dtype}: {equal}")
        for each in found:
            cells = (each.file, each.position, each.ours, each.theirs, f"{each.gap:.4f}")
            lines.append([engine, *map(str, cells)])
        rows.append({"engine": engine, "rival": versions, "prompts": len(prompts), "prompt_tokens": prompt_tokens})
        rows[-1] |= {"dtype": str(dtype), "new_tokens": new_tokens, "partings": [asdict(each) for each in found]}
    print_table(["engine", "file", "token", "ours", "theirs", "gap"], lines)
    if record:
        append_rows("greedy_elsewhere", rows)


if __name__ == "__main__":
    typer.run(main)
