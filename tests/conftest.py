"""The smallest models that still have every part, random weights for them, random numbers by test name, and ranks."""

import os
import random
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from rank_processes import Ranks
from torch import Tensor

from dovetail.model.transformer import Transformer, initialize
from dovetail.numerics import capability
from dovetail.spec.hf_config import read_flat
from dovetail.spec.model import ModelSpec
from dovetail.text.documents import DataConfig
from dovetail.train.run.run_file import ModelConfig, RunConfig, TrainConfig

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when Triton is imported: its kernels then run on a CPU

TINY = {
    "model_type": "deepseek_v3",
    "vocab_size": 96,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "intermediate_size": 48,
    "num_attention_heads": 2,
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "first_k_dense_replace": 1,
    "n_group": 4,
    "topk_group": 2,
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "num_nextn_predict_layers": 1,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
}


@pytest.fixture(scope="session")
def tiny_spec() -> Callable[..., ModelSpec]:
    """`tiny_spec(key=value)`: the tiny model with some keys of its config changed; None removes a key."""

    def build(**changes: object) -> ModelSpec:
        table = {**TINY, **changes}
        return read_flat({key: value for key, value in table.items() if value is not None})

    return build


@pytest.fixture(scope="session")
def random_model() -> Callable[..., Transformer]:
    """`random_model(spec, dtype=..., seed=...)`: every weight random, norms and router biases too."""

    def build(spec: ModelSpec, dtype: torch.dtype = torch.float32, seed: int = 0) -> Transformer:
        model = Transformer(spec, dtype=dtype)
        initialize(model, seed)
        generator = torch.Generator().manual_seed(seed + 1)
        with torch.no_grad():
            for name, tensor in model.state_dict().items():
                if name.endswith("norm.weight"):
                    tensor.uniform_(0.5, 1.5, generator=generator)
                elif name.endswith("e_score_correction_bias"):
                    tensor.uniform_(-0.3, 0.3, generator=generator)
        return model

    return build


@pytest.fixture
def draw(request: pytest.FixtureRequest) -> Callable[..., Tensor]:
    """`draw(*shape, dtype=..., scale=...)`: normal numbers, the same in every run of this test."""
    generator = torch.Generator().manual_seed(zlib.crc32(request.node.nodeid.encode()))

    def normal(*shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Tensor:
        return (torch.randn(*shape, generator=generator) * scale).to(dtype)

    return normal


@pytest.fixture
def with_triton(monkeypatch: pytest.MonkeyPatch) -> Callable[[], object]:
    """`with with_triton() as device`: tensors there go through the Triton kernels, a CPU's where there is no GPU."""

    @contextmanager
    def pretend() -> Iterator[torch.device]:
        with monkeypatch.context() as patch:
            if not torch.cuda.is_available():
                for name in ("on_gpu", "on_fp8_gpu"):
                    patch.setattr(capability, name, lambda *tensors: True)
            yield torch.device("cuda" if torch.cuda.is_available() else "cpu")

    return pretend


TINY_RUN = {
    "vocab_size": 300,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "intermediate_size": 64,
    "num_attention_heads": 2,
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "n_routed_experts": 8,
    "moe_intermediate_size": 32,
    "num_experts_per_tok": 2,
}


@pytest.fixture(scope="session")
def write_text() -> Callable[[Path], Path]:
    """`write_text(directory)`: twenty files of four words; returns the directory."""

    def write(directory: Path) -> Path:
        directory.mkdir()
        words = random.Random(0)
        for number in range(20):
            lines = (" ".join(words.choices(["alpha", "beta", "gamma", "delta"], k=12)) for _ in range(30))
            (directory / f"{number}.txt").write_text("\n".join(lines))
        return directory

    return write


@pytest.fixture(scope="session")
def tiny_run() -> Callable[..., RunConfig]:
    """`tiny_run(out, text, key=value)`: eight steps of a tiny model; changes go into [train]."""
    return build


def build(out: Path, text: Path, **changes: object) -> RunConfig:
    settings = {"steps": 8, "sequence_length": 32, "microbatch_size": 4, "checkpoint_every": 3, "ema_decay": 0.9}
    return RunConfig(
        out=out,
        model=ModelConfig(preset="quickstart", change=TINY_RUN),
        data=DataConfig(kind="files", path=text, held_out_share=0.2),
        train=TrainConfig(**{**settings, **changes}),
        schedule="quickstart",
    )


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    """Four ranks, started once for the tests of a module."""
    started = Ranks(4, Path(tmp_path_factory.mktemp("ranks")))
    yield started
    started.stop()


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    """Two ranks, likewise."""
    started = Ranks(2, Path(tmp_path_factory.mktemp("ranks")))
    yield started
    started.stop()
