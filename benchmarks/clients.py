"""What other people's clients make of a server: litellm, langchain-openai, and lm-eval on a local task.

    dovetail serve CHECKPOINT &
    pip install "dovetail[clients]"
    python benchmarks/clients.py http://127.0.0.1:8000 CHECKPOINT

CHECKPOINT is there for its tokenizer, with which lm-eval counts. Each line says what was asked and what came.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ASK = [{"role": "user", "content": "What is a list?"}]
SCHEMA = {"type": "object", "properties": {"kind": {"enum": ["list", "dict"]}}, "required": ["kind"]}
SCHEMA["additionalProperties"] = False
CHOICES = {
    "task": "local_choices",
    "dataset_path": "json",
    "test_split": "test",
    "output_type": "multiple_choice",
    "doc_to_text": "{{question}}",
    "doc_to_choice": "{{choices}}",
    "doc_to_target": "{{answer}}",
    "metric_list": [{"metric": "acc"}],
}
WORDS = {
    "task": "local_words",
    "dataset_path": "json",
    "test_split": "test",
    "output_type": "generate_until",
    "doc_to_text": "{{question}}",
    "doc_to_target": "{{choices[answer]}}",
    "generation_kwargs": {"until": ["\n"], "max_gen_toks": 8, "temperature": 0},
    "metric_list": [{"metric": "exact_match"}],
}
ROWS = [
    {"question": "import", "choices": [" os", " %%"], "answer": 0},
    {"question": "def f(", "choices": ["::::", "self"], "answer": 1},
    {"question": "for i in", "choices": [" range", " }}}"], "answer": 0},
]


def litellm(url: str, model: str) -> None:
    """Whole, streamed, and with tools."""
    import litellm

    common = {"model": f"openai/{model}", "api_base": f"{url}/v1", "api_key": "none", "messages": ASK}
    whole = litellm.completion(**common, max_tokens=12, seed=1)
    chunks = list(litellm.completion(**common, max_tokens=12, seed=1, stream=True))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text == whole.choices[0].message.content and whole.usage.completion_tokens == 12
    print("litellm, whole and streamed:", repr(text))
    tool = {"type": "function", "function": {"name": "look", "parameters": SCHEMA}}
    called = litellm.completion(
        **common, tools=[tool], tool_choice="required", parallel_tool_calls=False, max_tokens=64
    )
    call = called.choices[0].message.tool_calls[0].function
    assert json.loads(call.arguments)["kind"] in ("list", "dict")
    print("litellm, a tool:", call.name, call.arguments)


def langchain(url: str, model: str) -> None:
    """Whole, streamed, and a structured answer."""
    from langchain_openai import ChatOpenAI

    chat = ChatOpenAI(model=model, base_url=f"{url}/v1", api_key="none", max_tokens=12, seed=1)
    whole = chat.invoke("What is a list?")
    text = "".join(chunk.content for chunk in chat.stream("What is a list?"))
    assert text == whole.content and whole.usage_metadata["output_tokens"] == 12
    print("langchain-openai, whole and streamed:", repr(text))
    kind = chat.with_structured_output({"title": "kind", **SCHEMA}, method="json_schema").invoke("A list or a dict?")
    assert kind["kind"] in ("list", "dict")
    print("langchain-openai, a schema:", kind)


def lm_eval(url: str, model: str, checkpoint: str) -> None:
    """Log-probabilities of choices, and generated words."""
    with tempfile.TemporaryDirectory() as folder:
        rows = Path(folder) / "rows.jsonl"
        rows.write_text("\n".join(map(json.dumps, ROWS)))
        for task in (CHOICES, WORDS):
            kwargs = {"data_files": {"test": str(rows)}}
            (Path(folder) / f"{task['task']}.yaml").write_text(json.dumps({**task, "dataset_kwargs": kwargs}))
        given = f"model={model},base_url={url}/v1/completions,tokenizer={checkpoint},num_concurrent=4"
        command = [sys.executable, "-m", "lm_eval", "--model", "local-completions", "--model_args", given]
        command += ["--tasks", "local_choices,local_words", "--include_path", folder]
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OPENAI_API_KEY": "none"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
    print(done.stdout or done.stderr[-3000:])
    assert done.returncode == 0


def main() -> None:
    url, checkpoint = sys.argv[1].rstrip("/"), sys.argv[2]
    import httpx

    model = httpx.get(f"{url}/v1/models").json()["data"][0]["id"]
    litellm(url, model)
    langchain(url, model)
    lm_eval(url, model, checkpoint)


if __name__ == "__main__":
    main()
