"""Run files are read back by what runs them; engines' lines add up to the pool."""

import json
import math
import shlex

import pytest

from dovetail.catalog.precision import load_recipe
from dovetail.catalog.presets import load_model
from dovetail.config import load_toml, read_toml
from dovetail.parallel.mesh import check_ranks
from dovetail.planner.report.launch import launches
from dovetail.planner.request import Request, answer
from dovetail.spec.hf_config import write_hf
from dovetail.spec.layout import check_layout
from dovetail.train.run.run_file import RunConfig, resolve_model, resolve_schedule

SMALL = {"model": "20m", "clusters": ["h200-node"], "goal": "train", "batch": "64", "sequence_length": "1024"}
SERVE = {"model": "deepseek-v3", "clusters": ["h800-2048"], "goal": "serve", "context": "4989", "output_speed": "20"}


def launched(**options):
    request = Request(**options)
    (choice,) = answer(request).choices
    return choice.plan, launches(request, choice)


def options_of(line: str) -> dict[str, str]:
    words = shlex.split(line, comments=True)
    pairs = zip(words, [*words[1:], ""], strict=True)
    return {word: "" if after.startswith("--") else after for word, after in pairs if word.startswith("--")}


@pytest.mark.parametrize("gpus", [1, 8])
def test_dovetail_train_reads_the_run_file_and_runs_this_plan(gpus, tmp_path):
    plan, (launch,) = launched(**SMALL, gpus=gpus, pp=1, ep=1, tp=1, tokens="100M", microbatch_size=4, schedule="1f1b")
    file, command = launch.blocks
    (tmp_path / "run.toml").write_text(file.text, encoding="utf-8")
    config = load_toml(tmp_path / "run.toml", RunConfig)
    assert resolve_model(config.model) == plan.work.spec
    assert config.train.microbatch_size == 4 and config.train.sequence_length == 1024
    assert config.train.precision == plan.work.recipe.name and config.train.recompute
    assert resolve_schedule(config).batch_size.segments[-1].value == 64
    assert config.train.steps == math.ceil(100e6 / 64 / 1024)
    words = shlex.split(command.text)
    assert words[0] == ("dovetail" if gpus == 1 else "torchrun")
    assert gpus == 1 or words[words.index("--nproc-per-node") + 1] == str(gpus)


def test_a_recipe_file_is_named_in_the_run_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.toml").write_text('source = "x"\nlike = "deepseek-v3"\nmoments = "float32"', encoding="utf-8")
    plan, (launch,) = launched(**SMALL, gpus=1, precision="mine.toml")
    assert plan.work.recipe == load_recipe("mine.toml") and plan.work.recipe.moments == "float32"
    (tmp_path / "run.toml").write_text(launch.blocks[0].text, encoding="utf-8")
    assert load_recipe(load_toml(tmp_path / "run.toml", RunConfig).train.precision) == plan.work.recipe


def test_a_varied_model_is_in_the_run_file(tmp_path):
    plan, (launch,) = launched(**SMALL, gpus=1, vary=["num_experts_per_tok=2"])
    (tmp_path / "run.toml").write_text(launch.blocks[0].text, encoding="utf-8")
    config = load_toml(tmp_path / "run.toml", RunConfig)
    assert resolve_model(config.model) == plan.work.spec and plan.work.spec.moe.num_experts_per_tok == 2


def test_a_config_file_is_named(tmp_path):
    from dovetail.catalog.presets import load_model

    (tmp_path / "config.json").write_text(json.dumps(write_hf(load_model("20m"))), encoding="utf-8")
    plan, (launch,) = launched(**{**SMALL, "model": str(tmp_path)}, gpus=1)
    (tmp_path / "run.toml").write_text(launch.blocks[0].text, encoding="utf-8")
    assert resolve_model(load_toml(tmp_path / "run.toml", RunConfig).model) == plan.work.spec
    assert read_toml(tmp_path / "run.toml")["model"]["config"] == str(tmp_path)


def test_a_toml_model_is_named_varied_and_not_written_over(tmp_path):
    model = tmp_path / "mine.toml"
    model.write_text("[dial]\nwidth = 256", encoding="utf-8")
    plan, (launch,) = launched(**{**SMALL, "model": str(model)}, gpus=1, vary=["num_experts_per_tok=2"])
    assert plan.work.spec.moe.num_experts_per_tok == 2
    (tmp_path / "run.toml").write_text(launch.blocks[0].text, encoding="utf-8")
    config = load_toml(tmp_path / "run.toml", RunConfig)
    assert resolve_model(config.model) == plan.work.spec
    assert config.model.config == model
    assert launch.blocks[1].text == "dovetail train mine-run.toml\n"


V3 = {"model": "deepseek-v3", "clusters": ["h800-2048"], "goal": "train", "batch": "15360", "pp": 16, "ep": 64}


@pytest.mark.parametrize(("options", "world"), [
    ({**V3, "tp": 1, "schedule": "dualpipe"}, 2048),
    ({**SMALL, "gpus": 8, "pp": 2, "ep": 4, "tp": 1, "schedule": "interleaved", "microbatch_size": 1}, 8),
    ({**SMALL, "model": "1b", "gpus": 8, "pp": 1, "ep": 1, "tp": 1, "vary": ["zero=0"]}, 8),
])  # fmt: skip
def test_the_layout_that_is_printed_is_the_one_that_runs(options, world, tmp_path):
    plan, (launch,) = launched(**options)
    (tmp_path / "run.toml").write_text(launch.blocks[0].text, encoding="utf-8")
    config = load_toml(tmp_path / "run.toml", RunConfig)
    assert config.layout.layout(world, config.train.batch_size, config.train.microbatch_size) == plan.work.layout
    check_layout(plan.work.layout, plan.work.spec)
    check_ranks(plan.work.layout, world, 8)


def test_a_layout_that_cannot_be_run_has_no_command():
    _, (launch,) = launched(**V3, tp=2, schedule="dualpipe")
    assert launch.blocks == ()
    assert "tp = 2" in launch.notes[0] and "--tp 1" in launch.notes[0]


def test_nodes_are_joined_by_torchrun():
    _, (launch,) = launched(**{**SMALL, "clusters": ["h800-2048"]}, gpus=16, pp=1, ep=1, tp=1)
    assert "--nnodes 2 --nproc-per-node 8" in launch.blocks[1].text


@pytest.mark.parametrize(("ep", "tp", "redundant"), [(144, 1, 32), (64, 1, 0), (8, 1, 0), (64, 2, 0)])
def test_lines_of_engines_add_up_to_the_pool(ep, tp, redundant):
    cluster = "h800-2048" if ep > 8 else "h200-node"
    plan, (vllm, sglang) = launched(**{**SERVE, "clusters": [cluster]}, ep=ep, tp=tp, prefill_ep=ep)
    for prompts, outputs in ((vllm.blocks[0], vllm.blocks[1]),):
        for block in (prompts, outputs):
            options = options_of(block.text.split("\n#")[0] if block.text.count("\n#") else block.text)
            dp = int(options["--data-parallel-size"])
            assert dp * int(options["--tensor-parallel-size"]) == ep
            assert ("--data-parallel-size-local" in options) == (ep > 8)
        assert "deepep_high_throughput" in prompts.text and "deepep_low_latency" in outputs.text
        assert f"--max-num-seqs {plan.decode.requests * tp}" in outputs.text
        assert ('{"num_redundant_experts":32}' in outputs.text) == (redundant == 32)
    options = options_of(sglang.blocks[1].text)
    assert int(options["--tp"]) == ep and int(options["--ep-size"]) == ep and int(options["--dp"]) == ep // tp
    assert int(options["--max-running-requests"]) == plan.decode.requests * ep
    assert options.get("--nnodes") == (str(ep // 8) if ep > 8 else None)
    assert options["--disaggregation-mode"] == "decode"


def test_mtp_is_in_the_lines_where_it_is_in_the_plan():
    _, plain = launched(**SERVE, ep=64, prefill_ep=32)
    _, guessing = launched(**SERVE, ep=64, prefill_ep=32, change=["mtp_acceptance=0.85"])
    assert not any("speculative" in block.text for launch in plain for block in launch.blocks)
    assert all("speculative" in block.text for launch in guessing for block in launch.blocks)


def test_a_model_of_ones_own_says_what_is_missing():
    _, found = launched(**{**SERVE, "model": "1b", "clusters": ["h200-node"]}, ep=8, prefill_ep=8)
    assert all(any("no published weights" in note for note in launch.notes) for launch in found)


@pytest.mark.parametrize("scoring", ["sigmoid", "softmax"])
def test_engines_are_said_not_to_load_what_they_would_compute_otherwise(scoring, tmp_path):
    config = {**write_hf(load_model("1b")), "model_type": "dovetail", "scoring_func": scoring}
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    _, found = launched(**{**SERVE, "model": str(tmp_path), "clusters": ["h200-node"]}, ep=8, prefill_ep=8)
    for launch in found:
        assert any("Neither engine will load it" in note for note in launch.notes) == (scoring == "softmax")
