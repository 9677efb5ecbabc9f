"""Completes prompts: `LLM` has a model and its tokenizer, makes sequences of prompts, and runs them."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from collections.abc import Sequence as Sequences
from pathlib import Path

import torch
from torch import nn

from dovetail.engine import speculative
from dovetail.engine.completion_text import CompletionText
from dovetail.engine.core import Core, Outputs, Room
from dovetail.engine.grammar import Grammar, GrammarCompiler, GrammarState
from dovetail.engine.sampler import SamplingParams
from dovetail.engine.sequence import Completion, Sequence
from dovetail.engine.stream import Token
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
PAGE = 64  # positions
PROMPT_TOKENS = 2048  # of a step at most


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
        self._compiler: GrammarCompiler | None = None
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

        `params` for all: prompt i then draws with seed + i, so that equal prompts get different completions.
        `speculate` drafts per step come from the MTP modules; they change the speed, not what is generated. A
        completion depends on its prompt and its params only: on a CPU neither drafts nor other prompts change a bit of
        the logits; on a GPU they do, by rounding, so that near ties may fall otherwise. A completion ends early
        ("length") where the model's max_position_embeddings end. A prompt given as text is put behind the
        beginning-of-sequence token, where the tokenizer has one. No statistics count the compiling of kernels in the
        first call. Raises `ValueError`, naming the prompt, for one without tokens, one that is too long, and an id that
        is no token.
        """
        sequences = self._sequences(prompts, params, speculate)
        tokens: dict[int, list[Token]] = {id(sequence): [] for sequence in sequences}
        for outputs in self._run(sequences, speculate):
            for sequence, output in outputs:
                tokens[id(sequence)] += output.tokens
        return [sequence.completion(tuple(tokens[id(sequence)])) for sequence in sequences]

    def stream(self, prompt: Prompt, params: SamplingParams, speculate: int = 0) -> Iterator[str]:
        """The text of the one completion, in parts as they become sure; errors as in `generate`, on the call."""
        if self.tokenizer is None:
            raise ValueError("stream gives text, which needs a tokenizer; use generate for token ids")
        return self._deltas(self._sequences([prompt], params, speculate), speculate)

    def _deltas(self, sequences: list[Sequence], speculate: int) -> Iterator[str]:
        for outputs in self._run(sequences, speculate):
            for _, output in outputs:
                if delta := "".join(token.text for token in output.tokens) + output.text:
                    yield delta

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
        tokens = [self._tokens(i, prompt) for i, prompt in enumerate(prompts)]
        return [self.sequence(*pair) for pair in zip(tokens, each, strict=True)]

    def sequence(self, tokens: list[int], params: SamplingParams, max_length: int | None = None) -> Sequence:
        """A prompt of tokens, ready to be worked on. Raises `ValueError` for params that this model cannot follow."""
        if self.tokenizer is None and params.stop:
            raise ValueError("stop strings need a tokenizer; without one use max_tokens or the end-of-sequence token")
        limit = min(self.spec.max_position_embeddings, max_length or self.spec.max_position_embeddings)
        return Sequence(
            tokens=tokens,
            prompt_tokens=len(tokens),
            max_tokens=min(params.max_tokens, limit - len(tokens)),
            params=params,
            shares=params.prompt_logprobs is None,
            end_tokens=self.end_tokens,
            text=None if self.tokenizer is None else CompletionText(self.tokenizer, params.stop, params.include_stop),
            grammar=None if params.grammar is None else self._grammar(params.grammar),
        )

    def _grammar(self, grammar: Grammar) -> GrammarState:
        if self.tokenizer is None:
            raise ValueError("a grammar needs a tokenizer")
        if self._compiler is None:
            self._compiler = GrammarCompiler(self.tokenizer, self.end_tokens)
        return self._compiler.start(grammar)

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

    def _run(self, sequences: list[Sequence], depth: int) -> Iterator[Outputs]:
        """Generate until all are finished, yielding what each step gave."""
        if not sequences:
            return
        self.warm_up(depth)
        together = min(len(sequences), self.max_batch)
        most = max(len(sequence.tokens) + sequence.max_tokens for sequence in sequences)
        pages = together * -(-(most + depth + 1) // PAGE)
        core = Core(
            self.drawn_from,
            Room(sequences=together, positions=most, num_pages=pages, page_size=PAGE, prompt_tokens=PROMPT_TOKENS),
            depth,
        )
        for sequence in sequences:
            core.add(sequence)
        while core.has_work:
            yield core.step()

    def warm_up(self, depth: int) -> None:
        """A prompt of two tokens and a step with so many drafts: afterwards all kernels are compiled."""
        if depth in self.warm_depths:
            return
        core = Core(
            self.drawn_from, Room(sequences=1, positions=depth + 4, num_pages=1, page_size=2 * depth + 8), depth
        )
        params = SamplingParams(temperature=0, ignore_eos=True, max_tokens=depth + 2)
        core.add(
            Sequence(
                tokens=[0, 0], prompt_tokens=2, max_tokens=depth + 2, params=params, end_tokens=frozenset(), text=None
            )
        )
        while core.has_work:
            core.step()
        self.warm_depths.add(depth)


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
