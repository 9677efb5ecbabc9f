"""A checkpoint with random weights, the real engine on it, and the application behind a port."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from openai import OpenAI
from torch import Tensor
from transformers import DeepseekV3ForCausalLM

from dovetail.engine.engine import Engine
from dovetail.engine.llm import LLM
from dovetail.engine.room import EngineConfig
from dovetail.server.conversation import Conversation
from dovetail.server.exchange import Desk
from dovetail.server.served import Served
from dovetail.server.settings import ServeConfig
from dovetail.server.start import DrainingServer, listen

ROOM = EngineConfig(
    cache_bytes=800_000, max_batch_tokens=64, max_sequences=6, page_size=16
)  # 104 pages: some sequences are put back


@dataclass
class Real:
    """A server of this process, and what it serves."""

    directory: Path
    desk: Desk
    port: int

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def engine(self) -> Engine:
        return self.desk.served.engine

    @property
    def client(self) -> OpenAI:
        return OpenAI(base_url=self.url + "/v1", api_key="none", max_retries=0, timeout=60)

    @cached_property
    def theirs(self) -> DeepseekV3ForCausalLM:
        return DeepseekV3ForCausalLM.from_pretrained(self.directory, dtype=torch.float32)

    def their_greedy(self, prompt: Sequence[int], count: int) -> list[int]:
        """Tokens that transformers generates."""
        found = self.theirs.generate(
            torch.tensor([list(prompt)]), do_sample=False, max_new_tokens=count, eos_token_id=None
        )
        return found[0, len(prompt) :].tolist()

    def their_logprobs(self, tokens: Sequence[int]) -> Tensor:
        """[T - 1, vocabulary] log-probabilities of what follows each token but the last."""
        with torch.no_grad():
            return self.theirs(torch.tensor([list(tokens)])).logits[0, :-1].log_softmax(dim=-1)

    def is_empty(self) -> bool:
        """Whether nothing runs, waits or holds a page."""
        now = self.engine.statistics()
        return not (now.running or now.waiting or now.cache_usage or self.desk.running)


def until(is_so: Callable[[], bool], seconds: float = 30.0) -> None:
    end = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < end, "it never came to be"
        time.sleep(0.005)


@contextmanager
def serving(directory: Path, config: ServeConfig) -> Iterator[Real]:
    """The checkpoint in FP32 behind a free port; at the end nothing is left of it."""
    llm = LLM.load(directory, dtype=torch.float32)
    engine = Engine(llm, ROOM)
    try:
        assert engine.wait_until_ready()
        template = Conversation.load(directory, None, llm.tokenizer)
        served = Served(
            engine=engine, tokenizer=llm.tokenizer, template=template, name="real", config=config, created=5
        )
        desk = Desk(served)
        listener = listen("127.0.0.1", 0, config.slow_client_seconds)
        server = DrainingServer(desk)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        real = Real(directory, desk, listener.getsockname()[1])
        yield real
        until(real.is_empty)
        server.should_exit = True
        thread.join(10)
    finally:
        engine.close()
