"""Runs of a tiny model on a tiny text."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest

from dovetail.text.documents import DataConfig
from dovetail.train.run.run_file import ModelConfig, RunConfig, TrainConfig

TINY = {
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


@pytest.fixture
def text(tmp_path: Path) -> Path:
    directory = tmp_path / "text"
    directory.mkdir()
    words = random.Random(0)
    for number in range(20):
        lines = (" ".join(words.choices(["alpha", "beta", "gamma", "delta"], k=12)) for _ in range(30))
        (directory / f"{number}.txt").write_text("\n".join(lines))
    return directory


@pytest.fixture(scope="session")
def tiny_run() -> Callable[..., RunConfig]:
    """`tiny_run(out, text, key=value)`: eight steps of a tiny model; changes go into [train]."""
    return build


def build(out: Path, text: Path, **changes: object) -> RunConfig:
    settings = {"steps": 8, "sequence_length": 32, "microbatch_size": 4, "checkpoint_every": 3, "ema_decay": 0.9}
    return RunConfig(
        out=out,
        model=ModelConfig(preset="quickstart", change=TINY),
        data=DataConfig(kind="files", path=text, held_out_share=0.2),
        train=TrainConfig(**{**settings, **changes}),
        schedule="quickstart",
    )
