"""Metrics, their names on dashboards, the page, and what is said when serving starts."""

from __future__ import annotations

import json
import re
import socket
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from dovetail.cli import app as cli
from dovetail.cli.serve import Address, Room
from dovetail.server.settings import ServeConfig, body_limit
from dovetail.server.start import exposure, greeting, listen
from dovetail.spec.hf_config import write_hf
from dovetail.spec.model import ModelSpec
from dovetail.text.tokenizer import Tokenizer

DOCS = Path(__file__).parents[2] / "docs"


def values(site: Any) -> dict[str, float]:
    answer = site.ask("GET", "/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    lines = [line for line in answer.text.splitlines() if not line.startswith("#")]
    return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines)}


def test_counts_are_the_engines(build: Callable[..., Any]) -> None:
    found = values(build())
    model = '{model_name="tiny"}'
    for name, value in {
        "vllm:num_requests_waiting": 4,
        "vllm:kv_cache_usage_perc": 0.25,
        "dovetail_computed_prompt_tokens_total": 11,
        "vllm:generation_tokens_total": 12,
        "vllm:prefix_cache_queries_total": 13,
        "vllm:prefix_cache_hits_total": 14,
        "vllm:num_preemptions_total": 15,
        "vllm:spec_decode_num_drafts_total": 16,
        "vllm:spec_decode_num_draft_tokens_total": 24,
        "vllm:spec_decode_num_accepted_tokens_total": 13,
        "dovetail_step_seconds": 0.5,
    }.items():
        assert found[name + model] == value, name
    assert found['vllm:spec_decode_num_accepted_tokens_per_pos_total{model_name="tiny",position="1"}'] == 3
    assert found['vllm:request_success_total{finished_reason="length",model_name="tiny"}'] == 18
    assert found['dovetail_speculation_info{model_name="tiny",why="2 drafts: they pay"}'] == 1


def test_prompts_are_counted_whole_once_their_answers_begin(build: Callable[..., Any]) -> None:
    site = build()
    name = 'vllm:prompt_tokens_total{model_name="tiny"}'
    assert values(site)[name] == 0
    answer = site.post("/v1/completions", prompt=["abc", "defgh"], n=2)
    tokens = answer.json()["usage"]["prompt_tokens"]
    assert tokens > 4 and values(site)[name] == 2 * tokens  # of each choice


def test_times_are_those_of_requests(build: Callable[..., Any]) -> None:
    site = build(engine={"text": "abcdef", "block": 2, "pace": 0.02})
    site.post("/v1/completions", prompt="x", n=2)
    found = values(site)
    for name, count, least in (
        ("time_to_first_token", 2, 0.04),
        ("inter_token_latency", 4, 0.0),  # a first token that is seen late is nearer to those behind it
        ("request_time_per_output_token", 2, 0.016),
        ("e2e_request_latency", 1, 0.06),
    ):
        assert found[f'vllm:{name}_seconds_count{{model_name="tiny"}}'] == count
        assert found[f'vllm:{name}_seconds_sum{{model_name="tiny"}}'] >= least, name
    parts = ("time_to_first_token", "inter_token_latency")
    assert sum(found[f'vllm:{name}_seconds_sum{{model_name="tiny"}}'] for name in parts) >= 2 * 3 * 0.02


def test_the_dashboard_asks_for_what_there_is(build: Callable[..., Any]) -> None:
    site = build()
    known = {name.partition("{")[0] for name in values(site)}
    asked = [
        target["expr"]
        for panel in json.loads((DOCS / "grafana.json").read_text())["panels"]
        for target in panel["targets"]
    ]
    named = {name for query in asked for name in re.findall(r"(?:vllm:|dovetail_)\w+", query)}
    assert named and named <= known


def test_the_page_is_this_servers_alone(build: Callable[..., Any]) -> None:
    answer = build(api_key="k").ask("GET", "/")
    assert answer.status_code == 200 and answer.headers["content-type"].startswith("text/html")
    assert "default-src 'self'" in answer.headers["content-security-policy"]
    assert not re.search(r"(?:src|href)=[\"']?(?:https?:)?//", answer.text)


def test_a_port_that_is_taken_and_addresses_that_are_not_ours() -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(
            ValueError, match=rf"^port {port} is taken \(address already in use\): give another --port$"
        ):
            listen("127.0.0.1", port, 1)
    with pytest.raises(ValueError, match="^--host 192.0.2.1: .*; give an address of this machine$"):
        listen("192.0.2.1", 0, 1)
    with pytest.raises(ValueError, match="^--host no.such.invalid: "):
        listen("no.such.invalid", 0, 1)


@pytest.mark.parametrize(
    ("host", "key", "warns"),
    [
        ("127.0.0.1", None, False),
        ("::1", None, False),
        ("localhost", None, False),
        ("0.0.0.0", None, True),
        ("::", None, True),
        ("192.168.1.2", None, True),
        ("0.0.0.0", "k", False),
    ],
)
def test_an_open_server_is_warned_of(host: str, key: str | None, warns: bool) -> None:
    text = exposure(ServeConfig(host=host, api_key=key))
    assert bool(text) == warns and (not warns or text.startswith(f"WARNING: --host {host} without --api-key"))


def test_the_greeting_is_a_command_that_works(build: Callable[..., Any]) -> None:
    text = greeting(build(host="0.0.0.0", api_key="secret").desk.served, 8123)
    assert "http://127.0.0.1:8123/v1/chat/completions" in text and "secret" not in text
    assert json.loads(text.split(" -d ")[1].strip("'"))["messages"]
    assert "http://[::1]:1/" in greeting(build(host="::1").desk.served, 1)


def test_the_size_of_a_body_follows_the_context() -> None:
    assert body_limit(ServeConfig(), 1000) == 1_064_000
    assert body_limit(ServeConfig(max_body_bytes=5), 1000) == 5


@pytest.fixture
def shape(tmp_path: Path, tiny_spec: Callable[..., ModelSpec]) -> Path:
    """A checkpoint without weights: its config and a tokenizer that fits."""
    directory = tmp_path / "shape"
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(write_hf(tiny_spec(vocab_size=300))))
    Tokenizer.train(["shape"], 290).save(directory / "tokenizer.json")
    return directory


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "nowhere: no such directory"),
        (["{here}", "--port", "99999"], "options: port = 99999: input should be less than or equal to 65535"),
        (["{here}", "--speculate", "often"], "options: speculate"),
        (["{here}", "--set", "prot=1"], "unknown key 'prot'; did you mean port?"),
        (["{here}", "--config", "{here}/no.toml"], "no.toml: no such file"),
        (["{here}"], "tokenizer.json: no such file"),
        (["{shape}", "--max-model-len", "65"], "max_model_len = 65 is more than the model's max_position"),
        (["{shape}", "--cache-bytes", "1000"], "cache_bytes = 1,000 has room for 0 positions, and one sequence of"),
        (["{shape}", "--speculate", "2"], "speculate"),
        (["{shape}", "--chat-template", "{here}/no.jinja"], "no.jinja: no such file"),
    ],
)
def test_mistakes_are_one_line_before_weights_are_read(
    arguments: list[str], message: str, shape: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    given = [each.format(here=tmp_path, shape=shape) for each in arguments]
    monkeypatch.setattr(sys, "argv", ["dovetail", "serve", *given])
    with pytest.raises(SystemExit) as done:
        cli.main()
    assert done.value.code == 1
    error = capsys.readouterr().err
    assert error.splitlines()[-1].startswith("dovetail: ") and message in error


def test_every_setting_is_in_the_guide_and_every_option_is_a_setting() -> None:
    guide = (DOCS / "guides" / "serving.md").read_text()
    options = {name.replace("-", "_") for name in re.findall(r"^\| `--([a-z-]+)`", guide, re.MULTILINE)}
    offered = {each.name for record in (Address, Room) for each in fields(record)}
    assert options == offered <= ServeConfig.model_fields.keys()
    assert all(f"`{name}`" in guide for name in ServeConfig.model_fields.keys() - options)


def test_a_file_and_options_over_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "serve.toml").write_text('port = 1\nhost = "h"\nspeculate = "auto"\nmax_requests = 2\n')
    seen: list[ServeConfig] = []
    monkeypatch.setattr("dovetail.server.start.serve", lambda checkpoint, config, say: seen.append(config))
    given = ["serve", "x", "--config", str(tmp_path / "serve.toml"), "--port", "5", "--speculate", "2"]
    monkeypatch.setenv("DOVETAIL_API_KEY", "k")
    monkeypatch.setattr(sys, "argv", ["dovetail", *given, "--set", "drain_seconds=3"])
    with pytest.raises(SystemExit):
        cli.main()
    assert seen == [ServeConfig(port=5, host="h", speculate=2, max_requests=2, drain_seconds=3, api_key="k")]
