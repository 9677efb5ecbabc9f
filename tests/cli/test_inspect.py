"""The command line of what needs no torch: verbs, streams, exit codes, start-up time."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import dovetail
from dovetail.catalog.presets import find_model
from dovetail.spec.hf_config import write_hf
from dovetail.train.report.metrics import HealthMetrics, MetricsLog


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    source = str(Path(dovetail.__file__).parents[1])
    environment = {**os.environ, "PYTHONPATH": source, "COLUMNS": "100"}
    command = [sys.executable, "-m", "dovetail", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60, check=False)


@pytest.mark.parametrize(
    "verb",
    [
        (),
        ("inspect",),
        ("reproduce",),
        ("plan",),
        ("calibrate",),
        ("network", "simulate"),
        ("train",),
        ("compare",),
        ("list",),
        ("health",),
    ],
)
def test_help_loads_nothing_heavy(verb: tuple[str, ...]) -> None:
    """So it answers at once."""
    code = (
        "import sys\nfrom dovetail.cli import app as cli\n"
        f"sys.argv = {['dovetail', *verb, '--help']!r}\n"
        "try: cli.main()\nexcept SystemExit as done: assert not done.code\n"
        "assert not {'torch', 'numba', 'numpy', 'matplotlib', 'dovetail.planner'} & set(sys.modules)"
    )
    source = str(Path(dovetail.__file__).parents[1])
    environment = {**os.environ, "PYTHONPATH": source}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0 and "Usage:" in done.stdout, done.stderr


def test_nothing_here_loads_torch() -> None:
    modules = "dovetail.cli.app, dovetail.reproduce.tables, dovetail.cost.inspect, dovetail.cost.memory.process"
    code = f"import sys, dovetail, {modules}"
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            f"{code}; dovetail.load_model('1b'); dovetail.ModelSpec; assert 'torch' not in sys.modules",
        ],
        env={**os.environ, "PYTHONPATH": str(Path(dovetail.__file__).parents[1])},
        check=False,
    )
    assert done.returncode == 0


def test_inspect_prints_a_table_and_json() -> None:
    table = run("inspect", "deepseek-v3")
    assert table.returncode == 0 and table.stderr == ""
    assert "671,026,419,200" in table.stdout and "70,272 B" in table.stdout
    record = json.loads(run("inspect", "deepseek-v3", "--json").stdout)
    assert record["parameters"]["active"] == 36_625_618_432
    assert record["cache_bytes"] == 70_272


def test_inspect_prints_caches_as_a_table_and_json() -> None:
    table = run("inspect", "deepseek-v3", "--cache", "--sequences", "4")
    assert table.returncode == 0 and table.stderr == ""
    assert "4 sequences of 163,840 tokens" in table.stdout and "656" in table.stdout and "70,272" in table.stdout
    record = json.loads(run("inspect", "qwen2.5-72b", "--cache", "--context", "1000", "--json").stdout)
    assert (record["context"], record["sequences"], record["window"]) == (1000, 1, 4096)
    own = record["caches"][0]
    assert (own["kind"], own["token_bytes"], own["total_bytes"]) == ("its own: GQA, BF16", 327_680, 327_680_000)


def test_version_is_printed_without_loading_torch() -> None:
    done = run("--version")
    assert (done.returncode, done.stdout, done.stderr) == (0, f"dovetail {dovetail.__version__}\n", "")


@pytest.mark.parametrize("name", ["deepseek-v3", "deepseek-v2-lite", "qwen2.5-72b"])
def test_a_config_is_written_and_read_back_as_the_same_model(name: str, tmp_path: Path) -> None:
    path = tmp_path / "new" / "config.json"
    done = run("inspect", name, "--write-config", str(path), "--json")
    assert done.returncode == 0 and done.stderr == f"wrote {path}\n"
    assert json.loads(done.stdout)["target"] == name
    assert find_model(str(path)).spec == dovetail.load_model(name)
    assert [each.name for each in path.parent.iterdir()] == ["config.json"]


def test_a_config_is_replaced_only_where_that_is_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text("mine", encoding="utf-8")
    done = run("inspect", "20m", "--write-config", str(path))
    assert done.returncode == 1 and done.stdout == "" and "exists; give another name, or --overwrite" in done.stderr
    assert path.read_text("utf-8") == "mine"
    assert run("inspect", "20m", "--write-config", str(path), "--overwrite").returncode == 0
    assert find_model(str(path)).spec == dovetail.load_model("20m")
    done = run("inspect", "20m", "--write-config", str(tmp_path))
    assert done.returncode == 1 and "is a directory; name the file, such as" in done.stderr


def test_the_catalog_is_listed() -> None:
    done = run("list")
    assert done.returncode == 0 and done.stderr == ""
    for text in ("671.0B", "h800-2048", "mpft-roce", "slim-fly", "v3-hopper", "14.8T", "dualpipev"):
        assert text in done.stdout
    (models,) = json.loads(run("list", "models", "--json").stdout).values()
    assert {"name": "deepseek-v3", "layers": 61, "context": 163_840}.items() <= models[7].items()


def test_health_is_printed_without_torch(tmp_path: Path) -> None:
    shares = {"flushed": 0.25, "clipped": 0.0, "smallest_scale": 1e-4, "largest_scale": 0.5}
    log = MetricsLog(tmp_path / "metrics.jsonl")
    for step in (5, 10):
        for layer in range(30):
            name = f"layers.{layer}.o_proj"
            log.write(HealthMetrics(step=step, layer=name, operand="grad", signal_to_noise=30.0 + layer, **shares))
    log.close()
    done = run("health", str(tmp_path), "--worst", "2")
    assert done.returncode == 0 and done.stderr == ""
    assert "operands in step 10" in done.stdout and "31.0 dB" in done.stdout and "32.0 dB" not in done.stdout
    assert "2 of 30 operands" in done.stdout and "recorded in 2 steps (--step), 5 to 10" in done.stdout
    record = json.loads(run("health", str(tmp_path), "--step", "5", "--json").stdout)
    assert record["step"] == 5 and len(record["operands"]) == 30
    assert "the nearest that has is 5" in run("health", str(tmp_path), "--step", "6").stderr
    code = (
        "import sys; from dovetail.train.report import health_table; assert not {'torch', 'numba'} & set(sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_unread_keys_go_to_stderr(tmp_path: Path) -> None:
    spec = dovetail.load_model("quickstart")
    (tmp_path / "config.json").write_text(json.dumps({**write_hf(spec), "index_topk": 4}), encoding="utf-8")
    done = run("inspect", str(tmp_path))
    assert done.returncode == 0
    assert "index_topk" in done.stderr and "index_topk" not in done.stdout


def test_reproduce_prints_both_columns_and_the_contradictions() -> None:
    done = run("reproduce", "table2")
    assert done.returncode == 0
    assert "250.456" in done.stdout and "the paper is inconsistent" in done.stdout
    assert json.loads(run("reproduce", "table1", "--json").stdout)["is_reproduced"] is True


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (
            ("inspect", "deepsek-v3"),
            1,
            "dovetail: deepsek-v3: no such preset or file; did you mean deepseek-v3",
        ),
        (("inspect", "deepseek-ai/DeepSeek-V3"), 1, "nothing is downloaded"),
        (("list", "model"), 1, "dovetail: the catalog has no 'model'; did you mean models?"),
        (("inspect", "quickstart", "--context", "0"), 1, "dovetail: context = 0"),
        (("inspect", "quickstart", "--cache", "--sequences", "0"), 1, "dovetail: sequences = 0"),
        (("inspect", "quickstart", "--window", "9"), 1, "dovetail: --window 9: counts caches; add --cache"),
        (("inspect", "quickstart", "--cache", "--write-config", "x"), 1, "leave --cache out"),
        (
            ("export", "model", "out", "--for", "transformers"),
            1,
            "--for transformers: says how FP8 is written; add --fp8",
        ),
        (("reproduce", "table9"), 1, "dovetail: no table 'table9'"),
        (("inspect",), 2, "Missing argument"),
        (("inspect", "quickstart", "--context", "many"), 2, "--context"),
        (("inspekt",), 2, "inspekt"),
    ],
)
def test_mistakes_are_said_on_stderr_without_a_traceback(arguments: tuple[str, ...], code: int, message: str) -> None:
    done = run(*arguments)
    assert done.returncode == code and done.stdout == ""
    assert message in done.stderr and "Traceback" not in done.stderr
    if code == 1:
        assert done.stderr.count("\n") == 1


def test_root_exports() -> None:
    assert dovetail.__version__
    assert dovetail.ModelSpec is dovetail.load_model("quickstart").__class__
    assert {"LLM", "Tokenizer", "Transformer"} <= set(dir(dovetail))
    with pytest.raises(AttributeError, match="no attribute 'Modelspec'"):
        _ = dovetail.Modelspec
