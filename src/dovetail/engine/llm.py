"""Completes prompts: `LLM` prefills each prompt into a slot, and decodes them as a batch.

Finished sequences leave the batch.
"""

from __future__ import annotations

import copy
import time
from collections import deque
from collections.abc import Iterable, Iterator
from collections.abc import Sequence as Sequences
from pathlib import Path

import torch
from torch import nn

from dovetail.engine import speculative
from dovetail.engine.cache import ContiguousCache
from dovetail.engine.completion_text import CompletionText
from dovetail.engine.runner import Runner
from dovetail.engine.sampler import SamplingParams, probabilities, sample
from dovetail.engine.sequence import Completion, Sequence
from dovetail.model.checkpoint.inventory import read_spec
from dovetail.model.checkpoint.weights import import_hf
from dovetail.model.transformer import Transformer
from dovetail.numerics import capability
from dovetail.numerics.cpu.process import settle_process
from dovetail.spec.hf.generation import read_generation
from dovetail.spec.model import ModelSpec
from dovetail.text.tokenizer import Tokenizer

Prompt = str | Sequences[int]
MAX_BATCH = 32  # sequences decoded together; further prompts wait for a slot


class LLM:
    """A model and its tokenizer; without one, prompts are token ids and completions have no text.

    A model often has more rows than its tokenizer has tokens, to fill up a multiple of 128. Such a row is never drawn.
    """

    def __init__(
        self,
        model: Transformer,
        spec: ModelSpec,
        tokenizer: Tokenizer | None = None,
        max_batch: int = MAX_BATCH,
        end_tokens: Iterable[int] = (),
    ) -> None:
        """`end_tokens`: further ones than the spec's, as a generation_config.json may name."""
        if max_batch < 1:
            raise ValueError(f"max_batch = {max_batch} sequences; at least 1")
        self.model = model
        self.drawn_from = model  # the same, but for the head
        self.end_tokens = frozenset((*spec.end_tokens, *end_tokens))
        if tokenizer is not None:
            check_tokenizer(tokenizer, spec)
            if not self.end_tokens and tokenizer.eos_id is not None:
                self.end_tokens = frozenset([tokenizer.eos_id])
            num_tokens = max([tokenizer.vocab_size, *(token + 1 for token in self.end_tokens)])
            self.drawn_from = without_rows(model, num_tokens)
        self.spec = spec
        self.tokenizer = tokenizer
        self.max_batch = max_batch
        self.warm_depths = set[int]()  # drafts per step whose kernels have run

    @classmethod
    def load(
        cls,
        checkpoint_dir: str | Path,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        allow_non_finite: bool = False,
    ) -> LLM:
        """From a directory in the Hugging Face layout, its `tokenizer.json` included; on a GPU, if there is one, unless
        told. `dtype`: `fastest_dtype`, unless given. `allow_non_finite` takes weights that are NaN or infinite. Raises
        `ValueError`."""
        settle_process()
        directory = Path(checkpoint_dir)
        spec = read_spec(directory)  # says so where this is no checkpoint
        tokenizer = Tokenizer.load(directory)  # before the weights, which take longest
        check_tokenizer(tokenizer, spec)
        end_tokens = read_generation(directory, spec.vocab_size).end_tokens
        device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        dtype = dtype or fastest_dtype(device)
        model, spec = import_hf(directory, dtype=dtype, device=device, allow_non_finite=allow_non_finite)
        return cls(model, spec, tokenizer, end_tokens=end_tokens)

    def generate(
        self,
        prompts: Sequences[Prompt],
        params: SamplingParams | Sequences[SamplingParams],
        speculate: int = 0,
    ) -> list[Completion]:
        """One completion per prompt, in order; `params` for all, or one per prompt.

        `speculate` drafts per step come from the MTP modules; they change the speed, not what is generated
        (greedy: the same tokens; sampled: the same distribution, from other random numbers). A completion depends on
        its prompt and its params only, so equal prompts want different seeds. On a CPU neither drafts nor other prompts
        change a bit of the logits; on a GPU they do, by rounding, so that near ties may fall otherwise. A completion
        ends early ("length") where the model's max_position_embeddings end. A prompt given as text is put behind the
        beginning-of-sequence token, where the tokenizer has one. No statistics count the compiling of kernels in the
        first call. Raises `ValueError`, naming the prompt, for one without tokens, one that is too long, and an id that
        is no token.
        """
        sequences = self._sequences(prompts, params, speculate)
        for _ in self._run(sequences, speculate):
            pass
        return [sequence.completion() for sequence in sequences]

    def stream(self, prompt: Prompt, params: SamplingParams, speculate: int = 0) -> Iterator[str]:
        """The text of the one completion, in parts as they become sure; errors as in `generate`, on the call."""
        if self.tokenizer is None:
            raise ValueError("stream gives text, which needs a tokenizer; use generate for token ids")
        return self._deltas(self._sequences([prompt], params, speculate), speculate)

    def _deltas(self, sequences: list[Sequence], speculate: int) -> Iterator[str]:
        text = sequences[0].text
        assert text is not None
        for _ in self._run(sequences, speculate):
            if delta := text.take():
                yield delta

    def _sequences(
        self, prompts: Sequences[Prompt], params: SamplingParams | Sequences[SamplingParams], speculate: int
    ) -> list[Sequence]:
        speculative.check_depth(speculate, self.spec.num_nextn_predict_layers)
        if isinstance(prompts, str):
            raise ValueError("prompts is one string; give a list of prompts")
        each = [params] * len(prompts) if isinstance(params, SamplingParams) else list(params)
        if len(each) != len(prompts):
            raise ValueError(f"{len(prompts)} prompts but {len(each)} params; give one for all, or one per prompt")
        return [self._sequence(i, *pair) for i, pair in enumerate(zip(prompts, each, strict=True))]

    def _sequence(self, index: int, prompt: Prompt, params: SamplingParams) -> Sequence:
        tokens = self._tokens(index, prompt)
        if self.tokenizer is None and params.stop:
            raise ValueError("stop strings need a tokenizer; without one use max_tokens or the end-of-sequence token")
        return Sequence(
            tokens=tokens,
            prompt_tokens=len(tokens),
            max_tokens=min(params.max_tokens, self.spec.max_position_embeddings - len(tokens)),
            params=params,
            end_tokens=self.end_tokens,
            text=None if self.tokenizer is None else CompletionText(self.tokenizer, params.stop),
            generator=params.generator(),
        )

    def _tokens(self, index: int, prompt: Prompt) -> list[int]:
        if isinstance(prompt, str):
            if self.tokenizer is None:
                raise ValueError(f"prompt {index} is text, which needs a tokenizer; give token ids")
            bos_id = self.tokenizer.bos_id  # every document began with it in training
            tokens = ([] if bos_id is None else [bos_id]) + self.tokenizer.encode(prompt)
        else:
            tokens = list(prompt)
        if not tokens:
            raise ValueError(f"prompt {index} is empty; give at least one token")
        limit = self.spec.max_position_embeddings
        if len(tokens) >= limit:
            raise ValueError(
                f"prompt {index} has {len(tokens)} tokens; max_position_embeddings = {limit} leaves room for "
                f"{limit - 1} and one new token: shorten it"
            )
        for position, token in enumerate(tokens):
            if not 0 <= token < self.spec.vocab_size:
                raise ValueError(
                    f"prompt {index}: {token} at position {position} is not a token; vocab_size = "
                    f"{self.spec.vocab_size} (is this the model's tokenizer?)"
                )
        return tokens

    def _run(self, sequences: list[Sequence], depth: int) -> Iterator[None]:
        """Generate until all are finished, yielding whenever some have grown."""
        if not sequences:
            return
        batch = min(len(sequences), self.max_batch)
        # The last token of a sequence is never run, but drafts after it may be, to be thrown away.
        capacity = max(len(sequence.tokens) + sequence.max_tokens for sequence in sequences) + depth
        if depth not in self.warm_depths:
            warm_up(self._runner(1, 3 + depth), depth)
            self.warm_depths.add(depth)
        runner = self._runner(batch, capacity)
        waiting, active, free = deque(sequences), list[Sequence](), list(range(batch))
        while waiting or active:
            if waiting and free:
                waiting[0].slot = free.pop()
                start(runner, waiting[0], depth)
                active.append(waiting.popleft())
            else:
                step(runner, active, depth)
            free += [sequence.slot for sequence in active if sequence.finish_reason is not None]
            active = [sequence for sequence in active if sequence.finish_reason is None]
            yield

    def _runner(self, batch: int, capacity: int) -> Runner:
        parameter = self.model.embed_tokens.weight
        return Runner(self.drawn_from, ContiguousCache(self.spec, batch, capacity, parameter.dtype, parameter.device))


def fastest_dtype(device: torch.device) -> torch.dtype:
    """BF16, or FP32 on a CPU that has no instructions to multiply BF16: there BF16 takes ten times as long."""
    is_fast = device.type != "cpu" or capability.has_bf16_instructions()
    return torch.bfloat16 if is_fast else torch.float32


def check_tokenizer(tokenizer: Tokenizer, spec: ModelSpec) -> None:
    """Raise `ValueError` for a tokenizer with ids that the model has no rows for."""
    if tokenizer.vocab_size > spec.vocab_size:
        raise ValueError(
            f"the tokenizer has {tokenizer.vocab_size} ids and the model vocab_size = {spec.vocab_size}: they are not "
            "of one checkpoint; take the model's own tokenizer.json"
        )


def without_rows(model: Transformer, num_tokens: int) -> Transformer:
    """`model` with the first `num_tokens` rows of its head alone; the weights stay where they are."""
    if num_tokens == model.spec.vocab_size:
        return model
    cut = copy.copy(model)
    cut._modules = dict(model._modules)  # the copy's own, so that `model` keeps its head
    cut.lm_head = nn.Linear(model.spec.hidden_size, num_tokens, bias=False, device="meta")
    cut.lm_head.weight = nn.Parameter(model.head_weight[:num_tokens].detach(), requires_grad=False)
    return cut


def warm_up(runner: Runner, depth: int) -> None:
    """A prompt of two tokens and a step, in slot 0: afterwards all kernels are compiled."""
    sequence = Sequence(
        tokens=[0, 0],
        prompt_tokens=2,
        max_tokens=depth + 2,
        params=SamplingParams(temperature=0, ignore_eos=True),
        end_tokens=frozenset(),
        text=None,
        generator=torch.Generator(),
        slot=0,
    )
    start(runner, sequence, depth)
    step(runner, [sequence], depth)


def start(runner: Runner, sequence: Sequence, depth: int) -> None:
    """Prefill the prompt into the sequence's slot and add the first token."""
    begin = time.perf_counter()
    tokens = torch.tensor(sequence.tokens, device=runner.device)
    if depth:
        hidden = runner.prefill(sequence.slot, tokens)
        speculative.fill_prompt(runner, sequence, hidden, depth)
    else:
        hidden = runner.prefill_last(sequence.slot, tokens)
    logits = runner.logits(hidden[-1])
    if sequence.params.is_greedy:
        token = int(logits.argmax())
    else:
        token = sample(probabilities(logits, sequence.params), sequence.generator)
    sequence.prefill_seconds = time.perf_counter() - begin
    sequence.extend([token])


def step(runner: Runner, sequences: Sequences[Sequence], depth: int) -> None:
    """One decoding step of all of them, `depth` tokens drafted for each."""
    begin = time.perf_counter()
    results = speculative.step(runner, sequences, depth)
    seconds = time.perf_counter() - begin
    for sequence, tokens in zip(sequences, results, strict=True):
        kept = sequence.extend(tokens)
        sequence.steps += 1
        sequence.drafted += depth
        sequence.accepted += min(kept, len(tokens) - 1)
        sequence.decode_seconds += seconds
