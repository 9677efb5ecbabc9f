"""Generates greedily with llama.cpp over pipes: one JSON line in, one out. Runs in the environment of llama-cpp-python.

    python _llama_server.py MODEL.gguf '{"n_ctx": 320, ...}'      arguments of llama_cpp.Llama

First line out: {"versions": ...}. Then for each {"prompts": [[ids], ...], "new_tokens": n} a line {"tokens": [[ids],
...]}. No token ends a text. Ends where its input ends. As `_vllm_server.py`, but without times.
"""

import json
import os
import sys
from importlib.metadata import version


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    import llama_cpp
    import numpy as np

    llm = llama_cpp.Llama(sys.argv[1], **json.loads(sys.argv[2]))
    print(json.dumps({"versions": {"llama-cpp-python": version("llama-cpp-python")}}), file=answers, flush=True)

    def greedy(prompt: list[int], new_tokens: int) -> list[int]:
        llm.reset()
        tokens, given = [], prompt
        for _ in range(new_tokens):
            llm.eval(given)
            logits = np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(llm.ctx, -1), (llm.n_vocab(),))
            given = [int(logits.argmax())]
            tokens += given
        return tokens

    for line in sys.stdin:
        asked = json.loads(line)
        tokens = [greedy(prompt, asked["new_tokens"]) for prompt in asked["prompts"]]
        print(json.dumps({"tokens": tokens}), file=answers, flush=True)


if __name__ == "__main__":
    main()
