"""Sends one request to a server of OpenAI's API, and notes when the pieces of its answer come."""

from __future__ import annotations

import json
from dataclasses import dataclass
from time import perf_counter
from typing import Any, Literal

import httpx

from dovetail.bench.answer import Answer, BrokenAnswer, said
from dovetail.bench.outcome import Outcome
from dovetail.bench.workload import Request, Ruler, prompt_ids, prompt_text

Api = Literal["completions", "chat"]
PATHS: dict[Api, str] = {"completions": "/v1/completions", "chat": "/v1/chat/completions"}
CONNECT_SECONDS = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """A server as it takes requests: what `probe` found out."""

    model: str
    api: Api
    ruler: Ruler | None  # for prompts of words; None: prompts are token ids
    vocab_size: int  # below it are the ids
    has_ignore_eos: bool  # the server takes this field
    has_usage: bool  # the server takes `stream_options`


def open_client(url: str, api_key: str | None, timeout: float) -> httpx.AsyncClient:
    """Return a client for `url`, with or without its /v1. It holds as many connections as there are requests.

    `timeout` is how many seconds a server may be silent. Proxies of the environment are not used.
    """
    address = url.rstrip("/").removesuffix("/v1")
    try:
        return httpx.AsyncClient(
            base_url=address,
            headers={"authorization": f"Bearer {api_key}"} if api_key else {},
            timeout=httpx.Timeout(timeout, connect=CONNECT_SECONDS, pool=None),
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=None),
            trust_env=False,
        )
    except (httpx.InvalidURL, UnicodeEncodeError) as error:
        raise ValueError(f"{url}: {error}; write an address such as http://127.0.0.1:8000") from None


def body_of(request: Request, target: Target, seed: int, temperature: float) -> bytes:
    """Return the JSON of a streamed request."""
    if target.ruler is None:
        prompt: list[int] | str = prompt_ids(request, seed, target.vocab_size)
    else:
        prompt = prompt_text(request, seed, target.ruler)
    body: dict[str, Any] = {
        "model": target.model,
        **prompt_field(target.api, prompt),
        "max_tokens": request.output_tokens,
        "temperature": temperature,
        "seed": request.index,
        "stream": True,
    }
    if target.has_usage:
        body["stream_options"] = {"include_usage": True, "continuous_usage_stats": True}
    if target.has_ignore_eos:
        body["ignore_eos"] = True
    return json.dumps(body).encode()


def prompt_field(api: Api, prompt: list[int] | str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": prompt}]} if api == "chat" else {"prompt": prompt}


async def send(client: httpx.AsyncClient, target: Target, request: Request, body: bytes, start: float) -> Outcome:
    """Send `body`, read the answer to its end, and return how it went; failures are part of that.

    `start` is the moment of `perf_counter` from which times are counted.
    """
    answer = Answer()
    error = message = None
    sent = perf_counter() - start
    try:
        await _listen(client, target, body, answer, start)
    except BrokenAnswer as problem:
        error, message = problem.kind, str(problem)
    except httpx.HTTPError as problem:
        error, message = kind_of(problem), f"{type(problem).__name__}: {problem}"
    chunks, counting = answer.counted()
    return Outcome(
        index=request.index,
        arrival=request.arrival,
        sent=sent,
        end=perf_counter() - start,
        input_tokens=request.input_tokens,
        output_tokens=request.output_tokens,
        prompt_tokens=answer.usage.get("prompt_tokens"),
        cached_tokens=(answer.usage.get("prompt_tokens_details") or {}).get("cached_tokens"),
        chunks=chunks,
        counting=counting,
        finish_reason=answer.finish_reason,
        error=error,
        message=message or "",
    )


async def _listen(client: httpx.AsyncClient, target: Target, body: bytes, answer: Answer, start: float) -> None:
    headers = {"content-type": "application/json"}
    async with client.stream("POST", PATHS[target.api], content=body, headers=headers) as response:
        if response.status_code >= 400:
            raise BrokenAnswer(f"HTTP {response.status_code}", said(await response.aread()))
        is_whole = False
        async for line in response.aiter_lines():
            if line.startswith("data:"):
                moment, data = perf_counter() - start, line[5:].strip()
                is_whole = data == "[DONE]"
                if not is_whole:
                    answer.take(data, moment)
    if not is_whole and answer.finish_reason is None:
        raise BrokenAnswer("cut off", "the stream ended without a finish reason and without [DONE]")
    if not answer.counted()[0]:
        raise BrokenAnswer("empty answer", f"no token came (finish reason {answer.finish_reason})")


def kind_of(problem: httpx.HTTPError) -> str:
    if isinstance(problem, httpx.ConnectError | httpx.ConnectTimeout):
        return "cannot connect"
    return "timed out" if isinstance(problem, httpx.TimeoutException) else "connection lost"
