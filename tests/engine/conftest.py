"""Models for the engine: random ones, and one whose MTP drafts are right exactly where all of the contract is kept.

And engines that run, or stand still, as a test says.
"""

import copy
import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dovetail.engine.core import Core, Outputs
from dovetail.engine.engine import Engine
from dovetail.engine.llm import LLM
from dovetail.engine.room import EngineConfig
from dovetail.model.transformer import Mtp, Transformer, initialize
from dovetail.spec.model import Mla, ModelSpec, Moe
from dovetail.text.documents import DataConfig
from dovetail.text.tokenizer import Tokenizer
from dovetail.train.run.loop import train
from dovetail.train.run.run_file import ModelConfig, RunConfig, TrainConfig

VOCAB = 32  # of the periodic model: a token is a dimension, and its two kinds of features fill hidden_size
PERIOD = 12
EMBEDDED = slice(VOCAB, 2 * VOCAB)  # where an MTP module keeps the token it is given


TRAINED = {
    "vocab_size": 320,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "intermediate_size": 64,
    "num_attention_heads": 2,
    "q_lora_rank": 32,
    "kv_lora_rank": 24,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "n_routed_experts": 8,
    "moe_intermediate_size": 32,
    "num_experts_per_tok": 2,
    "num_nextn_predict_layers": 2,
}


def build_spec(**changes: object) -> ModelSpec:
    defaults: dict[str, object] = {
        "vocab_size": 64,
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "intermediate_size": 96,
        "num_nextn_predict_layers": 2,
        "max_position_embeddings": 128,
        "initializer_range": 0.15,
        "attention": Mla(
            num_attention_heads=4, kv_lora_rank=24, qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=16
        ),
        "moe": Moe(
            n_routed_experts=4,
            n_shared_experts=1,
            num_experts_per_tok=2,
            moe_intermediate_size=32,
            first_k_dense_replace=1,
            n_group=2,
            topk_group=1,
        ),
    }
    return ModelSpec(**{**defaults, **changes})


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[torch.dtype, Transformer], list[int]]:
    """A model with two MTP modules, trained on Python's json package, in either dtype; and the tokens of that text."""
    config = RunConfig(
        out=tmp_path_factory.mktemp("lossless"),
        model=ModelConfig(preset="quickstart", change=TRAINED),
        data=DataConfig(kind="files", path=Path(json.__file__).parent, patterns=("*.py",), held_out_share=0.0),
        train=TrainConfig(steps=300, sequence_length=64, microbatch_size=4, checkpoint_every=1000),
        schedule="quickstart",
    )
    state = train(config)
    models = {}
    for dtype in (torch.bfloat16, torch.float32):
        models[dtype] = Transformer(state.spec, dtype)
        models[dtype].load_state_dict(state.model.state_dict())
    files = Path(json.__file__).parent.glob("*.py")
    return models, state.tokenizer.encode("".join(file.read_text("utf-8") for file in sorted(files)))


@pytest.fixture(scope="session")
def p_value() -> Callable[[Tensor, Tensor], float]:
    """`p_value(counts, expected)`: chance of a deviation at least this large, by Pearson's chi-square."""

    def pearson(counts: Tensor, expected: Tensor) -> float:
        counts, expected = counts.double().flatten(), expected.double().flatten()
        is_small = expected < 5  # cells that are put together
        if bool(is_small.any()):
            counts = torch.cat((counts[~is_small], counts[is_small].sum()[None]))
            expected = torch.cat((expected[~is_small], expected[is_small].sum()[None]))
        expected = expected.clamp(min=1e-9)  # nothing expected and something seen is as wrong as can be
        statistic = ((counts - expected) ** 2 / expected).sum()
        return float(torch.special.gammaincc(torch.tensor((len(counts) - 1) / 2).double(), statistic / 2))

    return pearson


@pytest.fixture(scope="session")
def engine_spec() -> Callable[..., ModelSpec]:
    """`engine_spec(field=value)`: a tiny spec of two layers, the second with experts, and two MTP modules."""
    return build_spec


@pytest.fixture(scope="session")
def engine_model() -> Callable[..., Transformer]:
    """`engine_model(spec, seed)`: FP32, every weight random, norms too (a norm of ones hides a missing norm)."""

    def build(spec: ModelSpec, seed: int = 0) -> Transformer:
        model = Transformer(spec, torch.float32)
        initialize(model, seed)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith("norm.weight"):
                    parameter.uniform_(0.5, 1.5, generator=generator)
        return model

    return build


@dataclass(frozen=True)
class Periodic:
    model: Transformer
    follows: list[int]  # token -> the token after it; every cycle has PERIOD tokens

    def run(self, first: int, length: int) -> list[int]:
        tokens = [first]
        while len(tokens) < length:
            tokens.append(self.follows[tokens[-1]])
        return tokens


@pytest.fixture(scope="session")
def periodic() -> Periodic:
    """The main model goes round cycles of PERIOD tokens; a draft is right if two votes out of two are.

    The main model looks at its last token only. An MTP module at position i adds up: one vote for the right
    token from the hidden state; one from what its own attention finds PERIOD - 1 positions back, the embedding
    of the token given there; and 1.5 votes for a wrong token, from its own embedding. So a draft fails when
    its hidden state is not what the contract says (the norms' weights are -1, which the modules' projections and
    the head undo), when the embedding is not that of the right token, and when the cache entry of one
    period ago is missing or stale. Drafts are right from position PERIOD - 1 on.
    """
    attention = Mla(num_attention_heads=1, kv_lora_rank=64, qk_nope_head_dim=8, qk_rope_head_dim=16, v_head_dim=VOCAB)
    spec = build_spec(vocab_size=VOCAB, attention=attention, rope_theta=10.0)
    model = Transformer(spec, torch.float32)
    initialize(model, 0)
    follows = [PERIOD * (v // PERIOD) + (v % PERIOD + 1) % PERIOD for v in range(2 * PERIOD)]
    follows += list(range(2 * PERIOD, VOCAB))
    next_of = torch.eye(VOCAB)[follows].T  # one-hot of v -> one-hot of the token after v
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight", "down_proj")):
                parameter.zero_()
        model.embed_tokens.weight.copy_(torch.eye(VOCAB, 2 * VOCAB))
        model.norm.weight.fill_(-1.0)
        model.head_weight.copy_(-torch.eye(VOCAB, 2 * VOCAB)[torch.tensor(follows).argsort()])
        for k, module in enumerate(model.mtp):
            assert isinstance(module, Mtp)
            _set_module(module, k, next_of)
    return Periodic(model=model, follows=follows)


@pytest.fixture(scope="session")
def noisy(periodic: Periodic) -> Transformer:
    """The periodic model with noise on its modules: some drafts are right, some are wrong."""
    model = copy.deepcopy(periodic.model)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.mtp.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    return model


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=str)
def llm(
    request: pytest.FixtureRequest,
    engine_spec: Callable[..., ModelSpec],
    random_model: Callable[..., Transformer],
) -> LLM:
    """A model with two MTP modules that says all kinds of bytes."""
    spec = engine_spec(vocab_size=261, eos_token_id=1)
    return LLM(random_model(spec, request.param, 1), spec, Tokenizer.train([], 261))


@pytest.fixture
def engine_of(llm: LLM) -> Iterator[Callable[..., Engine]]:
    """`engine_of(field=value)`: an engine that is ready; all are closed in the end."""
    engines: list[Engine] = []

    def build(**changes: object) -> Engine:
        engines.append(Engine(llm, EngineConfig(**{"max_model_len": 120, "page_size": 16, **changes})))
        assert engines[-1].wait_until_ready(60)
        return engines[-1]

    yield build
    for engine in engines:
        engine.close()


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Semaphore]:
    """Each of the engine's steps waits for one `release`; in the end all go on."""
    steps, step, is_open = threading.Semaphore(0), Core.step, threading.Event()

    def wait(core: Core) -> Outputs:
        while not steps.acquire(timeout=0.01):
            if is_open.is_set():
                break
        return step(core)

    monkeypatch.setattr(Core, "step", wait)
    yield steps
    is_open.set()


def _set_module(module: Mtp, depth: int, next_of: Tensor) -> None:
    spec_dim, attention = 2 * VOCAB, module.block.self_attn
    module.norm.weight.fill_(-1.0)
    wrong = torch.linalg.matrix_power(next_of, 2 + 3 * depth)
    embedding, hidden = torch.zeros(spec_dim, spec_dim), torch.zeros(spec_dim, spec_dim)
    embedding[EMBEDDED, :VOCAB] = torch.eye(VOCAB)
    embedding[:VOCAB, :VOCAB] = 1.5 * wrong
    # Module 0 gets the main model's state (t_i) at twice the size of what module 1 gets (mostly its successor).
    hidden[:VOCAB, :VOCAB] = -next_of if depth == 0 else -1.4 * next_of
    module.eh_proj.weight.copy_(torch.cat((embedding, hidden), dim=1))
    _attend_one_period_back(attention, next_of)


def _attend_one_period_back(attention: torch.nn.Module, next_of: Tensor) -> None:
    """Query and key are constants, apart by a rotation: the score peaks PERIOD - 1 positions back."""
    rope, latent = 16, 2 * VOCAB
    angles = (PERIOD - 1) * 10.0 ** (-torch.arange(rope // 2) / (rope // 2))
    query = torch.stack((angles.cos(), -angles.sin()), dim=-1).flatten()
    key = torch.tensor([1.0, 0.0]).repeat(rope // 2)
    attention.kv_a_proj_with_mqa.weight.zero_()
    attention.kv_a_proj_with_mqa.weight[:latent] = torch.eye(latent)
    attention.kv_a_proj_with_mqa.weight[latent:, EMBEDDED] = key[:, None]
    attention.q_proj.weight.zero_()
    attention.q_proj.weight[8:, EMBEDDED] = 10.0 * query[:, None]
    attention.kv_b_proj.weight.zero_()
    attention.kv_b_proj.weight[8:, EMBEDDED] = next_of.T  # the predecessor, which the head turns round again
    attention.o_proj.weight.zero_()
    attention.o_proj.weight[:VOCAB] = 2.1 * torch.eye(VOCAB)  # undoes the norm before it: a vote of 8
