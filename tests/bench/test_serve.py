"""A server that answers by a script is measured: what is counted, how it was asked, and what failed."""

from __future__ import annotations

import asyncio
import io
import json
import sys
from pathlib import Path

import pytest
from rich.console import Console
from scripted_server import Scripted, serving

from dovetail.bench.outcome import Outcome
from dovetail.bench.probe import GUESS, ruler_of
from dovetail.bench.progress import Watch
from dovetail.bench.serve import Question, bench_serve
from dovetail.bench.workload import Request, Ruler, Workload, draw_requests, prompt_ids
from dovetail.cli import app as cli

WORKLOAD = Workload(requests=6, input_tokens=(40, 40), output_tokens=(7, 7))


def measured(server: Scripted, **changes: object) -> tuple[list[Outcome], list[str]]:
    """Outcomes by number, and remarks."""
    remarks: list[str] = []
    with serving(server.app()) as url:
        settings = {"url": url, "workload": WORKLOAD, "warmup": 0, **changes}
        _, outcomes = bench_serve(Question(**settings), lambda outcome: None, remarks.append)
    return sorted(outcomes, key=lambda outcome: outcome.index), remarks


def answers_to(server: Scripted) -> list[dict[str, object]]:
    """What was asked, without the probe's single tokens."""
    return [body for body in server.bodies if body["max_tokens"] > 1]


@pytest.mark.parametrize(
    ("usage", "per_chunk", "tokens", "counting"),
    [
        ("each", 3, [3, 3, 1], "usage of every chunk"),
        ("end", 3, [7 / 3, 7 / 3, 7 / 3], "usage at the end"),
        ("never", 1, [1] * 7, "one token a chunk"),
    ],
)
def test_tokens_are_counted(usage: str, per_chunk: int, tokens: list[float], counting: str) -> None:
    outcomes, remarks = measured(Scripted(usage=usage, per_chunk=per_chunk))
    assert remarks == []
    for outcome in outcomes:
        assert [count for _, count in outcome.chunks] == tokens
        assert (outcome.counting, outcome.error, outcome.finish_reason) == (counting, None, "length")
        moments = [outcome.sent, *(moment for moment, _ in outcome.chunks), outcome.end]
        assert moments == sorted(moments)
        assert outcome.prompt_tokens == (None if usage == "never" else 40)


def test_ids_are_sent_where_they_are_taken() -> None:
    server = Scripted()
    measured(server)
    bodies = {body["seed"]: body for body in answers_to(server)}
    for request in draw_requests(WORKLOAD):
        assert bodies[request.index]["prompt"] == prompt_ids(request, 0, 1024)
        assert (bodies[request.index]["max_tokens"], bodies[request.index]["ignore_eos"]) == (7, True)


def test_words_are_sent_where_ids_are_not_taken() -> None:
    server = Scripted(takes_ids=False, refused=("ignore_eos",))
    outcomes, remarks = measured(server)
    assert {outcome.prompt_tokens for outcome in outcomes} == {40}  # two for each of twenty words
    assert len({body["prompt"] for body in answers_to(server)}) == 6
    assert len(remarks) == 2 and "no token ids" in remarks[0] and "no ignore_eos" in remarks[1]
    assert not any("ignore_eos" in body for body in answers_to(server))


def test_a_chat_is_measured_with_its_template_counted() -> None:
    server = Scripted(refused=("stream_options",), usage="end")
    outcomes, (remark,) = measured(server, api="chat")
    assert {outcome.prompt_tokens for outcome in outcomes} == {41}  # 18 words and the template's five
    assert {len(outcome.chunks) for outcome in outcomes} == {7}
    assert "no stream_options" in remark


def test_the_tokens_of_words_are_a_line() -> None:
    assert ruler_of([125, 485]) == Ruler(tokens_per_word=2.0, tokens_around=5.0)
    assert ruler_of([0, 0]) == GUESS


def test_failures_are_counted_by_kind() -> None:
    answers = {0: "cut off", 1: "error", 2: "empty", 3: "refused", 4: "not json"}
    outcomes, _ = measured(Scripted(answers=answers))
    kinds = ["cut off", "error in the stream", "empty answer", "HTTP 429", "not JSON", None]
    assert [outcome.error for outcome in outcomes] == kinds
    assert [outcome.message for outcome in outcomes[1:4:2]] == ["out of memory", "the waiting room is full"]
    assert len(outcomes[0].chunks) == 1 and outcomes[5].generated_tokens == 7


@pytest.mark.parametrize(("concurrency", "most"), [(1, 1), (3, 3), (9, 6)])
def test_so_many_are_under_way(concurrency: int, most: int) -> None:
    server = Scripted(pause=0.01)
    outcomes, _ = measured(server, concurrency=concurrency)
    assert server.most_under_way == most and {outcome.arrival for outcome in outcomes} == {None}


def test_an_open_loop_sends_what_is_due_however_many_are_under_way(tmp_path: Path) -> None:
    workload = WORKLOAD.model_copy(update={"rate": 1000.0, "arrivals": "burst", "burst_size": 6})
    server = Scripted(pause=0.05)
    outcomes, _ = measured(server, workload=workload)
    assert server.most_under_way == 6
    trace = tmp_path / "trace.jsonl"
    trace.write_text('{"arrival": 0.1, "input_tokens": 9, "output_tokens": 3}\n')
    (outcome,), _ = measured(Scripted(), trace=trace)
    assert outcome.sent >= outcome.arrival == 0.1 and outcome.generated_tokens == 3


def test_warm_up_is_not_measured_and_its_failures_are_said() -> None:
    server = Scripted(answers={1_000_001: "refused"})
    outcomes, (remark,) = measured(server, warmup=3)
    assert [outcome.index for outcome in outcomes] == [0, 1, 2, 3, 4, 5]
    assert {body["seed"] for body in answers_to(server)} == {1_000_000, 1_000_002, 0, 1, 2, 3, 4, 5}
    assert remark == "1 of 3 requests to warm up failed: HTTP 429: the waiting room is full"


def run(monkeypatch: pytest.MonkeyPatch, *options: str) -> int:
    monkeypatch.setattr(sys, "argv", ["dovetail", "bench", "serve", *options])
    with pytest.raises(SystemExit) as done:
        cli.main()
    return int(done.value.code or 0)


def test_the_command_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    rows, picture = tmp_path / "rows.jsonl", tmp_path / "picture.png"
    options = ("--requests", "4", "--input-tokens", "20:30", "--output-tokens", "5", "--goodput", "e2e=60s")
    with serving(Scripted(answers={2: "refused"}).app()) as url:
        files = ("--out", str(rows), "--picture", str(picture))
        assert run(monkeypatch, "--url", f"{url}/v1/", *options, *files) == 0
        printed = capsys.readouterr().out
        assert run(monkeypatch, "--url", url, *options, "--json", "--api-key", "secret") == 0
        as_json = capsys.readouterr().out
    for said in (
        "3 of 4 requests",
        "15 out",
        "3 (75%) kept e2e <= 60 s",
        "errors: 1\n  1 x HTTP 429: the waiting",
    ):
        assert said in printed
    assert {json.loads(line)["index"] for line in rows.read_text().splitlines()} == {0, 1, 2, 3} and picture.exists()
    record = json.loads(as_json)
    assert record["measures"]["generated_tokens"] == 15 and record["measures"]["good"] == 3
    assert "secret" not in as_json


@pytest.mark.parametrize(
    ("server", "options", "said"),
    [
        (Scripted(key="k"), (), "HTTP 401: the server wants a key; give --api-key"),
        (Scripted(), ("--model", "huge"), "--model huge: not served at"),
        (Scripted(models=("a", "b")), (), "serves 2 models: name one by --model: a, b"),
        (Scripted(), ("--concurrency", "2", "--rate", "1"), "--concurrency and --rate each say when"),
        (Scripted(), ("--goodput", "speed=1s"), "--goodput speed=1s"),
        (Scripted(), ("--api", "responses"), "api = 'responses'"),
        (Scripted(refused=("max_tokens",)), (), "HTTP 400: not taken"),
        (Scripted(answers={-1: "refused"}), (), "HTTP 429: the waiting room is full; measure it when"),
        (Scripted(answers={0: "empty"}), ("--requests", "1"), "every request failed"),
    ],
)
def test_mistakes_are_one_line(
    server: Scripted,
    options: tuple[str, ...],
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with serving(server.app()) as url:
        assert run(monkeypatch, "--url", url, "--warmup", "0", *options) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("dovetail: ") and said in last


@pytest.mark.parametrize("url", ["http://127.0.0.1:9", "127.0.0.1:9", "http://a:b", "nowhere"])
def test_a_server_that_is_not_there(
    url: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "--url", url) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("dovetail: ") and url in line


def test_progress_is_plain_lines_where_there_is_no_terminal() -> None:
    out = io.StringIO()
    outcome = asyncio.run(_lost())
    with Watch(2, Console(file=out, width=80), clock=iter([0.0, 0.0, 1.0, 1.0]).__next__) as watch:
        watch.hear(outcome)
        watch.hear(outcome)
    assert out.getvalue() == (
        "1 of 2 requests done, 0 tokens/s, 1 failed\n2 of 2 requests done, 0 tokens/s, 2 failed\n"
    )


async def _lost() -> Outcome:
    from dovetail.bench.wire import Target, open_client, send

    target = Target(model="m", api="completions", ruler=None, vocab_size=99, has_ignore_eos=False, has_usage=False)
    request = Request(index=0, arrival=None, input_tokens=1, shared_tokens=0, output_tokens=1)
    async with open_client("http://127.0.0.1:9", None, 1.0) as client:
        outcome = await send(client, target, request, b"{}", 0.0)
    assert outcome.error == "cannot connect"
    return outcome
