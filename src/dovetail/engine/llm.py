"""Completes prompts: whole calls of `generate`, and requests that are handed in one by one."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from collections.abc import Sequence as Sequences

from dovetail.engine import speculative
from dovetail.engine.core import Core, Outputs
from dovetail.engine.engine import Engine
from dovetail.engine.loaded import LoadedModel, Prompt
from dovetail.engine.room import PAGE, Room, positions_of
from dovetail.engine.sampler import SamplingParams
from dovetail.engine.sequence import Completion, Sequence
from dovetail.engine.stream import Stream, Token

MAX_BATCH = 32  # sequences decoded together; further prompts wait for a slot
PROMPT_TOKENS = 2048  # of a step at most
_STARTING = threading.Lock()  # one engine, however many threads ask first


class LLM(LoadedModel):
    """A model and its tokenizer; without one, prompts are token ids and completions have no text."""

    engine: Engine | None = None  # runs what `submit` hands in; from the first call on

    def generate(
        self,
        prompts: Sequences[Prompt],
        params: SamplingParams | Sequences[SamplingParams],
        speculate: int = 0,
    ) -> list[Completion]:
        """One completion per prompt, in order; `params` for all, or one per prompt.

        `params` for all: prompt i then draws with seed + i, so that equal prompts get different completions.
        `speculate` drafts per step come from the MTP modules; they change the speed, not what is generated. A
        completion depends on its prompt and its params only: on a CPU neither drafts nor other prompts change a bit of
        the logits; on a GPU they do, by rounding, so that near ties may fall otherwise. A completion ends early
        ("length") where the model's max_position_embeddings end. No statistics count the compiling of kernels in the
        first call. Errors are those of `prompt_tokens`, which name the prompt.
        """
        sequences = self._sequences(prompts, params, speculate)
        tokens: dict[int, list[Token]] = {id(sequence): [] for sequence in sequences}
        for outputs in self._run(sequences, speculate):
            for sequence, output in outputs:
                tokens[id(sequence)] += output.tokens
        return [sequence.completion(tuple(tokens[id(sequence)])) for sequence in sequences]

    def stream(self, prompt: Prompt, params: SamplingParams, speculate: int = 0) -> Iterator[str]:
        """The text of the one completion, in parts as they become sure; errors as in `generate`, on the call. Raises
        `ValueError` on the way where a grammar becomes too complex."""
        if self.tokenizer is None:
            raise ValueError("stream gives text, which needs a tokenizer; use generate for token ids")
        return self._deltas(self._sequences([prompt], params, speculate), speculate)

    def submit(self, prompt: Prompt, params: SamplingParams, priority: int = 0) -> Stream:
        """Hand a prompt to the engine, which works on all that were handed in; iterate over what comes back, in a
        thread or in an event loop. The first call starts the engine with `EngineConfig`'s values; for others set
        `engine`."""
        with _STARTING:
            if self.engine is None:
                self.engine = Engine(self)
        return self.engine.submit(self.prompt_tokens(prompt), params, priority=priority)

    def _deltas(self, sequences: list[Sequence], speculate: int) -> Iterator[str]:
        for outputs in self._run(sequences, speculate):
            for _, output in outputs:
                if delta := "".join(token.text for token in output.tokens) + output.text:
                    yield delta
                if output.error is not None:
                    raise ValueError(output.error)

    def _sequences(
        self, prompts: Sequences[Prompt], params: SamplingParams | Sequences[SamplingParams], speculate: int
    ) -> list[Sequence]:
        speculative.check_depth(speculate, self.spec.num_nextn_predict_layers)
        if isinstance(prompts, str):
            raise ValueError("prompts is one string; give a list of prompts")
        if isinstance(params, SamplingParams):
            each = [params.model_copy(update={"seed": (params.seed + i) % 2**63}) for i in range(len(prompts))]
        else:
            each = list(params)
        if len(each) != len(prompts):
            raise ValueError(f"{len(prompts)} prompts but {len(each)} params; give one for all, or one per prompt")
        tokens = [self.prompt_tokens(prompt, f"prompt {i}") for i, prompt in enumerate(prompts)]
        return [self.sequence(*pair) for pair in zip(tokens, each, strict=True)]

    def _run(self, sequences: list[Sequence], depth: int) -> Iterator[Outputs]:
        """Generate until all are finished, yielding what each step gave."""
        if not sequences:
            return
        self.warm_up(depth)
        together = min(len(sequences), MAX_BATCH)
        most = max(len(sequence.tokens) + sequence.max_tokens for sequence in sequences)
        pages = together * -(-positions_of(most, depth) // PAGE)
        room = Room(sequences=together, positions=most, num_pages=pages, prompt_tokens=PROMPT_TOKENS)
        core = Core(self.drawn_from, room, depth)
        for sequence in sequences:
            core.add(sequence)
        while core.has_work:
            yield core.step()
