"""Train a tiny model for 20 steps on a directory of text, export it, and generate with and without speculation."""

from pathlib import Path

from dovetail.config import validate
from dovetail.convert import ExportOptions, export
from dovetail.engine.llm import LLM
from dovetail.engine.sampler import SamplingParams
from dovetail.train.report.metrics import StepMetrics, read_metrics
from dovetail.train.run.loop import train
from dovetail.train.run.run_file import RunConfig

Path("text").mkdir(exist_ok=True)
for number in range(4):
    Path("text", f"{number}.txt").write_text("A dovetail joins two boards without a nail.\n" * 100)

RUN = {
    "out": "run",
    "model": {"preset": "quickstart", "change": {"num_hidden_layers": 2, "n_routed_experts": 8, "vocab_size": 320}},
    "data": {"kind": "files", "path": "text", "held_out_share": 0, "fim_rate": 0},
    "train": {"steps": 20, "sequence_length": 32, "microbatch_size": 4, "learning_rate": 3e-3},
    "schedule": "quickstart",
}
run = train(validate(RunConfig, RUN, where="example"))
steps = [each for each in read_metrics(Path("run/metrics.jsonl")) if isinstance(each, StepMetrics)]
print(f"{run.num_steps} steps, {steps[-1].tokens:,} tokens, loss below a third: {steps[-1].loss < steps[0].loss / 3}")

for line in export(Path("run"), Path("model"), ExportOptions()):
    print(line)

llm = LLM.load("model")
greedy = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True)
plain, drafted = (llm.generate(["A dove"], greedy, speculate)[0] for speculate in (0, 1))
print(f"{len(plain.token_ids)} tokens, the same with speculation: {plain.token_ids == drafted.token_ids}")
