"""A grammar that becomes too complex on the way ends its own request, and no other one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from dovetail.engine.engine import Engine
from dovetail.engine.grammar import Grammar, GrammarState
from dovetail.engine.llm import LLM
from dovetail.engine.room import EngineConfig
from dovetail.engine.sampler import SamplingParams
from dovetail.text.tokenizer import Tokenizer


def test_only_its_request_ends(
    engine_spec: Callable[..., Any], engine_model: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = engine_spec(vocab_size=261, eos_token_id=1)
    llm = LLM(engine_model(spec, seed=1), spec, Tokenizer.train([], 261))
    plain = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    alone = llm.generate(["ab"], plain)[0]
    mask, asked = GrammarState.mask, []

    def failing(self: GrammarState) -> np.ndarray:
        asked.append(self)
        if len(asked) > 5:
            raise ValueError("too many states")
        return mask(self)

    monkeypatch.setattr(GrammarState, "mask", failing)
    engine = Engine(llm, EngineConfig(cache_bytes=10**7))
    try:
        held = plain.model_copy(update={"grammar": Grammar(kind="regex", text="[a-z]*")})
        streams = [engine.submit(llm.prompt_tokens("ab"), params) for params in (held, plain)]
        failed, other = ([*stream] for stream in streams)
        assert (failed[-1].finish_reason, failed[-1].error) == ("error", "too many states")
        assert [token.id for output in other for token in output.tokens] == alone.token_ids
        assert engine.is_ready and engine.drain(20) and engine.statistics().cache_usage == 0
    finally:
        engine.close()
