"""Finds out how a server takes requests, before any is measured.

That is the model's name, the form that prompts may have, and the fields that it knows.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import httpx

from dovetail.bench.answer import said
from dovetail.bench.wire import PATHS, Api, Target, kind_of, prompt_field
from dovetail.bench.workload import FIRST_ID, WORDS, Ruler, words_text

RULER_WORDS = (60, 240)  # two prompts, whose difference is of words alone
GUESS = Ruler(tokens_per_word=1.3, tokens_around=0.0)
BUSY = (429, 503)
OPTIONAL: dict[str, dict[str, Any]] = {
    "ignore_eos": {"ignore_eos": True},
    "stream_options": {"stream": True, "stream_options": {"include_usage": True, "continuous_usage_stats": True}},
}


async def find_model(client: httpx.AsyncClient, model: str | None) -> str:
    """Return the model to ask: the named one, or the only one that is served.

    Raises ValueError if the server is not reached, wants a key, or does not serve the model.
    """
    response = await ask(client, "GET", "/v1/models")
    if response.status_code == 404 and model is not None:
        return model  # a server without this list
    if response.status_code >= 400:
        raise ValueError(f"{client.base_url}v1/models: HTTP {response.status_code}: {said(response.content)}")
    try:
        names = [entry["id"] for entry in response.json()["data"]]
    except (json.JSONDecodeError, KeyError, TypeError):
        raise ValueError(f"{client.base_url}v1/models: no list of models; is this a server of OpenAI's API?") from None
    if model is None and len(names) != 1:
        raise ValueError(f"{client.base_url}: serves {len(names)} models: name one by --model: {', '.join(names)}")
    if model is not None and names and model not in names:
        raise ValueError(f"--model {model}: not served at {client.base_url}, which has {', '.join(names)}")
    return model or str(names[0])


async def probe(
    client: httpx.AsyncClient, model: str | None, api: Api, vocab_size: int, is_eos_ignored: bool
) -> tuple[Target, list[str]]:
    """Ask for single tokens until it is clear what the server takes; return that, and remarks for the user.

    Raises ValueError if the server does not answer even the plainest request.
    """
    name = await find_model(client, model)
    path = PATHS[api]
    plain = {"model": name, "max_tokens": 1, "temperature": 0.0}
    remarks: list[str] = []
    ids = list(range(FIRST_ID, FIRST_ID + 8)) + [vocab_size - 1]
    ruler: Ruler | None = None
    if api == "chat" or (await ask(client, "POST", path, {**plain, "prompt": ids})).status_code >= 400:
        ruler = await measure_ruler(client, path, api, plain)
        if ruler == GUESS:
            remarks.append(f"the server counts no tokens of prompts: {GUESS.tokens_per_word} a word are assumed")
        if api == "completions":
            remarks.append(f"the server takes no token ids up to {vocab_size - 1} as a prompt: prompts are words")
    sample = prompt_field(api, ids if ruler is None else WORDS[0])
    takes = {
        field: (await ask(client, "POST", path, {**plain, **sample, **values})).status_code < 400
        for field, values in OPTIONAL.items()
        if field != "ignore_eos" or is_eos_ignored
    }
    if is_eos_ignored and not takes["ignore_eos"]:
        remarks.append("the server takes no ignore_eos: answers may end before their length")
    if not takes["stream_options"]:
        remarks.append("the server takes no stream_options: a chunk is taken for one token unless usage comes anyway")
    target = Target(
        model=name,
        api=api,
        ruler=ruler,
        vocab_size=vocab_size,
        has_ignore_eos=takes.get("ignore_eos", False),
        has_usage=takes["stream_options"],
    )
    return target, remarks


async def measure_ruler(client: httpx.AsyncClient, path: str, api: Api, plain: dict[str, Any]) -> Ruler:
    """Return how many tokens the server makes of words, by the usage of two prompts.

    Raises ValueError if it refuses them.
    """
    counts: list[int] = []
    for words in RULER_WORDS:
        prompt = words_text([number % len(WORDS) for number in range(words)])
        response = await ask(client, "POST", path, {**plain, **prompt_field(api, prompt)})
        if response.status_code >= 400:
            raise ValueError(f"{client.base_url}: HTTP {response.status_code}: {said(response.content)}")
        counts.append(prompt_tokens(response))
    return ruler_of(counts)


def ruler_of(counts: Sequence[int]) -> Ruler:
    """Return the line through the token counts of `RULER_WORDS` words; `GUESS` where the server counts nothing."""
    if counts[1] <= counts[0]:
        return GUESS
    per_word = (counts[1] - counts[0]) / (RULER_WORDS[1] - RULER_WORDS[0])
    return Ruler(tokens_per_word=per_word, tokens_around=counts[0] - per_word * RULER_WORDS[0])


def prompt_tokens(response: httpx.Response) -> int:
    try:
        return int(response.json()["usage"]["prompt_tokens"])
    except (json.JSONDecodeError, KeyError, TypeError):
        return 0


async def ask(client: httpx.AsyncClient, method: str, path: str, body: dict[str, Any] | None = None) -> httpx.Response:
    """Send a plain request. Raises ValueError if the server is not reached, wants another key, or has no time."""
    try:
        response = await client.request(method, path, json=body)
    except httpx.HTTPError as error:
        remedy = "is the server running there?" if kind_of(error) == "cannot connect" else "is it the right address?"
        raise ValueError(f"{client.base_url}: {kind_of(error)} ({error or type(error).__name__}); {remedy}") from None
    if response.status_code in (401, 403):
        raise ValueError(f"{client.base_url}: HTTP {response.status_code}: the server wants a key; give --api-key")
    if response.status_code in BUSY:  # this says nothing of what it takes
        problem = f"HTTP {response.status_code}: {said(response.content)}"
        raise ValueError(f"{client.base_url}: {problem}; measure it when it has nothing else to do")
    return response
