"""The commands that carry a plan out: a run file for `dovetail train`, or those that start an engine.

`dovetail train` runs every layout but those with tensor parallelism; for these the reason stands in place of a command.
The engines are vLLM and SGLang, with the flags of their documentation of 2025 ("Expert Parallel Deployment" and "Data
Parallel Deployment"; "Server Arguments", "Expert Parallelism"). None of these commands was run here.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from dovetail.catalog.presets import find_model, model_names
from dovetail.planner.request import Choice, Request
from dovetail.planner.serving.decode import DecodePlan
from dovetail.planner.serving.plan import ServingPlan
from dovetail.planner.serving.prefill import PrefillPlan
from dovetail.planner.training.plan import TrainingPlan
from dovetail.spec.hf_config import write_hf
from dovetail.spec.kernel_shapes import accepted_by
from dovetail.spec.layout import Layout
from dovetail.spec.model import ModelSpec
from dovetail.spec.published import why_own

PUBLISHED = {
    "deepseek-v2": "deepseek-ai/DeepSeek-V2",
    "deepseek-v2-lite": "deepseek-ai/DeepSeek-V2-Lite",
    "deepseek-v3": "deepseek-ai/DeepSeek-V3",
}
STEPS = 1000  # if the goal has no tokens
UNTRIED = "Not run here. Flags are those of the engine's documentation of 2025; --help of your version decides."
TRANSFER = json.dumps({"kv_connector": "NixlConnector", "kv_role": "kv_both"}, separators=(",", ":"))


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """A file's content, or commands."""

    kind: Literal["toml", "sh"]
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Launch:
    title: str
    blocks: tuple[Block, ...] = ()
    notes: tuple[str, ...] = ()


def launches(request: Request, choice: Choice) -> list[Launch]:
    """Return what carries out the plan on one cluster."""
    if isinstance(choice.plan, TrainingPlan):
        return [training_launch(choice.plan, request.model)]
    return serving_launches(choice.plan, request.model)


def training_launch(plan: TrainingPlan, model: str) -> Launch:
    """Return the run file and its command, or the reason why there is none."""
    layout = plan.work.layout
    if layout.tp > 1:
        return Launch(title="to carry it out", notes=(_cannot(plan),))
    name = Path(model).name.removesuffix(".json").removesuffix(".toml") or "model"
    file = f"{name}-run.toml" if model.endswith(".toml") else f"{name}.toml"  # not over the model's own file
    notes = (f"Save the first block as {file}; its [data] is Python's own library until you name your own text.",)
    blocks = (Block(kind="toml", text=run_file(plan, model, name)), Block(kind="sh", text=_command(plan, file)))
    return Launch(title="to carry it out", blocks=blocks, notes=notes)


def run_file(plan: TrainingPlan, model: str, name: str) -> str:
    """Return a run file for `dovetail train` with the plan's batch, steps, micro-batches and precision."""
    work, layout = plan.work, plan.work.layout
    steps = math.ceil(plan.goal.tokens / plan.tokens_per_step) if plan.goal.tokens else STEPS
    source = "preset" if model in model_names() else "config"
    lines = [f'out = "runs/{name}"', "", "[model]", f"{source} = {json.dumps(model)}"]
    if changes := _changes(work.spec, model):
        lines.append(f"change = {{ {', '.join(f'{key} = {json.dumps(value)}' for key, value in changes.items())} }}")
    lines += ["", "[data]", 'kind = "stdlib"', "", "[train]", f"steps = {steps}", f"batch_size = {layout.batch}"]
    lines += [f"microbatch_size = {layout.microbatch_size}", f"sequence_length = {work.sequence_length}"]
    lines += [f"precision = {json.dumps(work.recipe.name)}", f"recompute = {json.dumps(work.recompute)}"]
    return "\n".join([*lines, *_layout(layout)]) + "\n"


def serving_launches(plan: ServingPlan, model: str) -> list[Launch]:
    """Return the commands of vLLM and of SGLang, for both pools."""
    target = PUBLISHED.get(model, model)
    notes = [UNTRIED]
    if target == model and not Path(model).is_dir():
        notes.append(f"{model} has no published weights: export a run of yours and name its directory.")
    spec = plan.decode.work.spec
    if why := why_own(spec):
        notes.append(f"Neither engine will load it: {why}.")
    reasons = [f"{kernel}: {reason}" for kernel, reason in accepted_by(spec).items() if reason]
    if reasons:
        notes.append(f"Not every fast kernel takes this shape ({'; '.join(reasons)}).")
    pools: tuple[PrefillPlan | DecodePlan, ...] = (plan.prefill, plan.decode)
    found = []
    for engine, line in (("vLLM", _vllm), ("SGLang", _sglang)):
        blocks = tuple(Block(kind="sh", text=line(pool, target, index)) for index, pool in enumerate(pools))
        found.append(Launch(title=f"with {engine}", blocks=blocks, notes=tuple(notes)))
    return found


def _layout(layout: Layout) -> list[str]:
    """The lines of [layout]; none for one rank."""
    if layout.gpus == 1:
        return []
    lines = ["", "[layout]", f"dp = {layout.dp}", f"pp = {layout.pp}", f"ep = {layout.ep}"]
    if layout.pp > 1:
        lines += [f"schedule = {json.dumps(layout.schedule)}", f"microbatches = {layout.microbatches}"]
    if layout.schedule == "interleaved":
        lines.append(f"chunks = {layout.chunks}")
    if layout.stage_layers is not None:
        lines.append(f"stage_layers = {list(layout.stage_layers)}")
    return lines if layout.zero else [*lines, "zero = 0"]


def _changes(spec: ModelSpec, model: str) -> dict[str, object]:
    """Keys of config.json in which the plan's model differs from the one that was named."""
    mine, named = write_hf(spec), write_hf(find_model(model).spec)
    follows = ("model_type", "architectures")  # from the other keys
    return {key: value for key, value in mine.items() if value not in (named.get(key), None) and key not in follows}


def _cannot(plan: TrainingPlan) -> str:
    return (
        "dovetail train cannot run this layout: it does not share a layer's heads among ranks (tp = "
        f"{plan.work.layout.tp}). Ask for --tp 1."
    )


def _command(plan: TrainingPlan, file: str) -> str:
    cluster, gpus = plan.work.cluster, plan.gpus
    if gpus == 1:
        return f"dovetail train {file}\n"
    each = min(gpus, cluster.gpus_per_node)
    if gpus <= cluster.gpus_per_node:
        return f"torchrun --nproc-per-node {gpus} -m dovetail train {file}\n"
    nodes = math.ceil(gpus / each)
    return (
        f"torchrun --nnodes {nodes} --nproc-per-node {each} --rdzv-backend c10d --rdzv-endpoint $HEAD:29400 \\\n"
        f"    -m dovetail train {file}  # on each of the {nodes} nodes; $HEAD is the first\n"
    )


def _vllm(pool: PrefillPlan | DecodePlan, target: str, index: int) -> str:
    """Return the command of the first node; the others have two flags more."""
    layout, cluster = pool.layout, pool.work.cluster
    local = min(layout.dp, cluster.gpus_per_node // layout.tp)
    flags = [f"vllm serve {target} --port {8000 + index}", f"--tensor-parallel-size {layout.tp}"]
    if layout.dp > 1:
        flags.append(f"--data-parallel-size {layout.dp}")
    if layout.dp > local:
        flags.append(f"--data-parallel-size-local {local} --data-parallel-address $HEAD --data-parallel-rpc-port 13345")
    if layout.ep > 1:
        backend = "deepep_high_throughput" if isinstance(pool, PrefillPlan) else "deepep_low_latency"
        flags.append(f"--enable-expert-parallel --all2all-backend {backend}")
        flags += ["--enable-dbo"] if pool.goal.microbatches == 2 else []
    if layout.redundant_experts:
        table = json.dumps({"num_redundant_experts": layout.redundant_experts}, separators=(",", ":"))
        flags.append(f"--enable-eplb --eplb-config '{table}'")
    if isinstance(pool, PrefillPlan):
        flags.append(f"--max-num-batched-tokens {pool.shared_tokens}")
    else:
        flags.append(f"--max-num-seqs {pool.requests * layout.tp}")
    if pool.goal.mtp_acceptance is not None:
        flags.append("""--speculative-config '{"method":"mtp","num_speculative_tokens":1}'""")
    flags.append(f"--kv-transfer-config '{TRANSFER}'")
    text = _comment(pool) + " \\\n    ".join(flags)
    if layout.dp > local:
        text += f"\n# that is node 0; on node n of 1 to {math.ceil(layout.dp / local) - 1}, the same with"
        text += f" --headless --data-parallel-start-rank $(({local} * n))"
    return text + "\n"


def _sglang(pool: PrefillPlan | DecodePlan, target: str, index: int) -> str:
    """Return SGLang's command. Its --tp counts all GPUs of the pool, its --dp the groups with requests of their own."""
    layout, cluster = pool.layout, pool.work.cluster
    is_prefill, gpus = isinstance(pool, PrefillPlan), layout.dp * layout.tp
    flags = [f"python -m sglang.launch_server --model-path {target} --port {30000 + index}", f"--tp {gpus}"]
    if layout.dp > 1:
        flags.append(f"--dp {layout.dp} --enable-dp-attention --enable-dp-lm-head --moe-dense-tp-size 1")
    if layout.ep > 1:
        mode = "normal" if is_prefill else "low_latency"
        flags.append(f"--ep-size {layout.ep} --moe-a2a-backend deepep --deepep-mode {mode}")
        flags += ["--enable-two-batch-overlap"] if pool.goal.microbatches == 2 else []
    if layout.redundant_experts:
        flags.append(f"--enable-eplb --ep-num-redundant-experts {layout.redundant_experts}")
    if isinstance(pool, PrefillPlan):
        flags.append(f"--chunked-prefill-size {pool.shared_tokens * layout.dp}")
    else:
        flags.append(f"--max-running-requests {pool.requests * gpus}")
    if pool.goal.mtp_acceptance is not None:
        flags.append("--speculative-algorithm NEXTN --speculative-num-steps 1 --speculative-eagle-topk 1")
        flags.append("--speculative-num-draft-tokens 2")
    flags.append(f"--disaggregation-mode {'prefill' if is_prefill else 'decode'}")
    nodes = math.ceil(gpus / cluster.gpus_per_node)
    if nodes > 1:
        flags.append(f"--nnodes {nodes} --node-rank $RANK --dist-init-addr $HEAD:5757")
    return _comment(pool) + " \\\n    ".join(flags) + "\n"


def _comment(pool: PrefillPlan | DecodePlan) -> str:
    name = "prompts" if isinstance(pool, PrefillPlan) else "outputs"
    return f"# {name}: {pool.layout.gpus} {pool.work.cluster.gpu.name}\n"
