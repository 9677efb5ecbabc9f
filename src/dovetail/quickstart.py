"""Runs the whole path in a few minutes: text, tokenizer, training, evaluation, export, generation.

The corpus is the standard library of the Python that runs this; nothing is downloaded. A second call continues with
the tokenizer, the tokens and the training that the run's directory holds, and repeats the short stages after them.
Each figure is printed twice: as predicted from the model's description before the run, and as measured.
"""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from dovetail.catalog.precision import load_recipe
from dovetail.catalog.presets import load_model
from dovetail.cost.count import cache_bytes_per_token, parameters, training_flop_per_token
from dovetail.cost.memory.process import TrainingMemory, training_memory
from dovetail.engine.llm import LLM
from dovetail.engine.sampler import SamplingParams
from dovetail.engine.sequence import Completion
from dovetail.engine.steps.cache import contiguous_cache
from dovetail.model.checkpoint.directory import check_target
from dovetail.model.checkpoint.weights import export_hf
from dovetail.model.transformer import Transformer
from dovetail.text.documents import Document, read_documents
from dovetail.text.yardstick import compressed_sizes
from dovetail.train.report.display import Display
from dovetail.train.report.metrics import WholeHeldOutMetrics, read_metrics
from dovetail.train.report.picture import draw_run
from dovetail.train.run.evaluate import held_out
from dovetail.train.run.footprint import measure_step, state_bytes
from dovetail.train.run.loop import train
from dovetail.train.run.run_file import ModelConfig, RunConfig, TrainConfig
from dovetail.train.run.state import Run
from dovetail.train.step.team import Alone

PRESET = "quickstart"
OVERHEAD_MINUTES = 1.0  # tokenizer, compiling kernels, evaluation, generation
AFTER_MINUTES = 0.5  # of that, what comes after training
PROMPT_TOKENS, NEW_TOKENS, NUM_PROMPTS = 160, 96, 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    """One prompt completed twice: by plain decoding, and with speculation."""

    name: str  # of the held-out file
    prompt: str
    plain: Completion
    speculative: Completion

    @property
    def is_same(self) -> bool:
        return self.plain.token_ids == self.speculative.token_ids


def run_config(out: Path, minutes: float) -> RunConfig:
    """Return the settings of `dovetail quickstart`, as a run file would give them."""
    return RunConfig(
        out=out,
        model=ModelConfig(preset=PRESET),
        train=TrainConfig(
            minutes=max(minutes - OVERHEAD_MINUTES, 0.1),
            sequence_length=256,
            microbatch_size=4,
            ema_decay=0.99,
            checkpoint_every=100,
            evaluate_every=200,
        ),
        schedule="quickstart",
    )


def quickstart(out: Path, minutes: float) -> Iterator[tuple[str, list[tuple[str, ...]]]]:
    """Run all stages, and yield (title, rows) of each table as soon as it is known, for the caller to print."""
    config = run_config(out, minutes)
    check_target(out / "model", overwrite=True)  # what training ends with
    spec = load_model(PRESET)
    tokens = config.train.microbatch_size * config.train.sequence_length
    memory = training_memory(spec, tokens, recipe=load_recipe(config.train.precision), gradient_bytes=2)
    display = Display(f"{PRESET}: the standard library, {minutes:g} minutes", 1)
    # Training gives way where what comes before it takes longer, as on a busy machine.
    state = train(config, display, ends_at=time.monotonic() + 60 * (minutes - AFTER_MINUTES))
    draw_run(out / "metrics.jsonl", out / "run.png", f"{PRESET}, {state.num_steps} steps")
    yield "held-out text, bits per byte", evaluation_rows(state)
    say(f"writing the weights to {out / 'model'}")
    export(state, out / "model")
    say("counting what was predicted")
    yield "predicted and measured", prediction_rows(state, memory)
    llm = LLM.load(out / "model")
    say(f"completing {NUM_PROMPTS} held-out files, without and with drafts")
    results = [generate(llm, document) for document in unseen(state)]
    yield "generation, greedy, one sequence at a time", generation_rows(results)
    yield "written", [(name, str(out / name)) for name in ("model", "run.png", "metrics.jsonl", "run.toml")]


def say(text: str) -> None:
    """Say what comes next, which takes some seconds, on stderr."""
    Console(stderr=True, highlight=False).print(text, markup=False, soft_wrap=True)


def evaluation_rows(state: Run) -> list[tuple[str, ...]]:
    store = state.held_out_store
    assert store is not None
    records = read_metrics(state.config.out / "metrics.jsonl")
    measured = next(each for each in records if isinstance(each, WholeHeldOutMetrics))
    documents = list(read_documents(state.config.data, "held_out"))
    rows = [("this model", f"{measured.bits_per_byte:.3f}", f"after {state.num_steps} steps")]
    if state.ema is not None:
        rows.append(("its moving average", f"{average_bits(state):.3f}", f"decay {state.ema.decay}"))
    sizes = compressed_sizes(document.text.encode() for document in documents)
    rows += [(name, f"{bits:.3f}", "on the same files") for name, bits in sizes.items()]
    why = "FP8 on a CPU costs time and gains none: see docs/guides/precision.md"
    return [
        *rows,
        ("files", str(len(documents)), f"{store.num_bytes:,} bytes, none trained on"),
        ("precision", load_recipe(state.config.train.precision).name, why),
    ]


def average_bits(state: Run) -> float:
    """Return the bits per byte of held-out text of a model with the moving average of the weights."""
    assert state.ema is not None and state.held_out_store is not None
    model = Transformer(state.spec, dtype=state.model.embed_tokens.weight.dtype)
    model.load_state_dict({**state.ema.average, **dict(state.model.named_buffers())})
    length, batch_size = state.config.train.sequence_length, state.config.train.microbatch_size
    display = Display("the moving average", 1)

    def told(done: int, total: int) -> bool:
        display.progress("measuring its moving average on held-out text", done, total)
        return False

    try:
        return held_out(Alone(model), state.held_out_store, length, batch_size, told=told)[1]
    finally:
        display.close()


def export(state: Run, directory: Path) -> None:
    files = sorted((state.config.out / "tokenizer").glob("*.json"))
    export_hf(state.model, state.spec, directory, tokenizer_files=files, overwrite=True)


def prediction_rows(state: Run, memory: TrainingMemory) -> list[tuple[str, ...]]:
    spec, length = state.spec, state.config.train.sequence_length
    counted = sum(each.numel() for each in [*state.model.parameters(), *state.model.buffers()])
    cache = contiguous_cache(spec, 1, length)
    cached = cache.data[: spec.num_hidden_layers].nbytes // length
    low, high = (bound / 1e6 for bound in memory.band)
    flop = training_flop_per_token(spec, length, causal=False, mtp=True)
    measured = measure_step(state.model, length, state.config.train.microbatch_size)
    used = state_bytes(state) + measured.gradient_bytes + measured.saved_bytes
    return [
        ("", "predicted", "measured"),
        ("parameters, MTP included", f"{parameters(spec).total_with_mtp:,}", f"{counted:,}"),
        ("KV bytes per token", f"{cache_bytes_per_token(spec):,}", f"{cached:,}"),
        ("training MFLOP per token", f"{flop / 1e6:,.2f}", f"{measured.flop_per_token / 1e6:,.2f}"),
        ("training memory, MB", f"{memory.total / 1e6:,.0f} ({low:,.0f} to {high:,.0f})", f"{used / 1e6:,.0f}"),
        ("peak memory of the process, MB", "", f"{peak_memory() / 1e6:,.0f}"),
    ]


def unseen(state: Run) -> Iterator[Document]:
    """Yield the first held-out files that are long enough to be completed."""
    found = 0
    for document in read_documents(state.config.data, "held_out"):
        if document.num_bytes > 8 * (PROMPT_TOKENS + NEW_TOKENS):
            yield document
            found += 1
        if found == NUM_PROMPTS:
            return


def generate(llm: LLM, document: Document) -> Generation:
    assert llm.tokenizer is not None
    prompt = llm.tokenizer.decode(llm.tokenizer.encode(document.text)[:PROMPT_TOKENS])
    params = SamplingParams(temperature=0.0, max_tokens=NEW_TOKENS, ignore_eos=True)
    plain, fast = (llm.generate([prompt], params, speculate=depth)[0] for depth in (0, 1))
    return Generation(name=document.name, prompt=prompt, plain=plain, speculative=fast)


def generation_rows(results: list[Generation]) -> list[tuple[str, ...]]:
    if not results:
        return [("no held-out file is long enough to be completed",)]
    rows: list[tuple[str, ...]] = [("file", "plain tokens/s", "with MTP", "ratio", "drafts accepted", "same text")]
    for each in results:
        plain, fast = (_rate(completion) for completion in (each.plain, each.speculative))
        acceptance = f"{each.speculative.statistics.acceptance:.0%}"
        rows.append((each.name, f"{plain:,.0f}", f"{fast:,.0f}", f"{fast / plain:.2f}", acceptance, _yes(each.is_same)))
    first = results[0]
    shown = [("", ""), (f"# ... {first.name}, the end of the prompt, then what the model adds",)]
    text = first.prompt.splitlines()[-6:]
    return [
        *rows,
        *shown,
        *((line,) for line in [*text[:-1], text[-1] + first.plain.text.split("\n")[0]]),
        *((line,) for line in first.plain.text.splitlines()[1:]),
    ]


def _rate(completion: Completion) -> float:
    """Return the tokens per second of decoding, without the first token, which comes from reading the prompt."""
    return (len(completion.token_ids) - 1) / completion.statistics.decode_seconds


def _yes(is_so: bool) -> str:
    return "yes" if is_so else "NO"


def peak_memory() -> int:
    """Return the largest resident size of this process so far, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
