"""A model that is ready to generate, its tokenizer, and what of its vocabulary ends a completion."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from collections.abc import Sequence as Sequences
from pathlib import Path
from typing import Self

import torch
from torch import nn

from dovetail.engine.completion_text import CompletionText
from dovetail.engine.core import Core
from dovetail.engine.grammar import Grammar, GrammarCompiler, GrammarState
from dovetail.engine.room import Room
from dovetail.engine.sampler import SamplingParams
from dovetail.engine.sequence import Sequence
from dovetail.model.checkpoint.inventory import read_spec
from dovetail.model.checkpoint.weights import import_hf
from dovetail.model.transformer import Transformer
from dovetail.numerics import capability
from dovetail.numerics.cpu.allocator import use_huge_pages
from dovetail.numerics.cpu.process import settle_process
from dovetail.spec.hf.generation import read_generation
from dovetail.spec.model import ModelSpec
from dovetail.text.tokenizer import Tokenizer

Prompt = str | Sequences[int]


class LoadedModel:
    """A model and its tokenizer; without one, prompts are token ids and completions have no text.

    A model often has more rows than its tokenizer has tokens, to fill up a multiple of 128. Such a row is never drawn.
    """

    def __init__(
        self,
        model: Transformer,
        spec: ModelSpec,
        tokenizer: Tokenizer | None = None,
        end_tokens: Iterable[int] = (),
    ) -> None:
        """`end_tokens`: further ones than the spec's, as a generation_config.json may name."""
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
        self._compiler: GrammarCompiler | None = None
        self.warm_depths = set[int]()  # drafts per step whose kernels have run

    @classmethod
    def load(
        cls,
        checkpoint_dir: str | Path,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        allow_non_finite: bool = False,
    ) -> Self:
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

    def prompt_tokens(self, prompt: Prompt, name: str = "the prompt", max_length: int | None = None) -> list[int]:
        """The tokens of a prompt; text is put behind the beginning-of-sequence token, where the tokenizer has one.

        Raises `ValueError`, naming it, for a prompt without tokens, one that leaves no room for a new token, and an id
        that is no token.
        """
        if isinstance(prompt, str):
            if self.tokenizer is None:
                raise ValueError(f"{name} is text, which needs a tokenizer; give token ids")
            bos_id = self.tokenizer.bos_id  # every document began with it in training
            tokens = ([] if bos_id is None else [bos_id]) + self.tokenizer.encode(prompt)
        else:
            tokens = list(prompt)
        if not tokens:
            raise ValueError(f"{name} is empty; give at least one token")
        limit = self.spec.max_position_embeddings
        key = "max_position_embeddings"
        if max_length is not None:
            limit, key = min(max_length, limit), "max_model_len"
        if len(tokens) >= limit:
            raise ValueError(
                f"{name} has {len(tokens)} tokens; {key} = {limit} leaves room for {limit - 1} and one new token: "
                "shorten it"
            )
        for position, token in enumerate(tokens):
            if not 0 <= token < self.spec.vocab_size:
                raise ValueError(
                    f"{name}: {token} at position {position} is not a token; vocab_size = {self.spec.vocab_size} "
                    "(is this the model's tokenizer?)"
                )
        return tokens

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

    def warm_up(self, depth: int) -> None:
        """A prompt of two tokens and a step with so many drafts: afterwards all kernels are compiled."""
        if depth in self.warm_depths:
            return
        for parameter in self.model.parameters():
            use_huge_pages(parameter)
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
