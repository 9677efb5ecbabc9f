"""A whole model's life, with the CPU's kernels and without, in FP32 and BF16: train, resume, export, load, complete."""

from __future__ import annotations

import math
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from dovetail.convert import ExportOptions, export
from dovetail.engine.llm import LLM
from dovetail.engine.sampler import SamplingParams
from dovetail.numerics import capability
from dovetail.numerics.formats.errors import network_terms, tolerance
from dovetail.spec.model import ModelSpec
from dovetail.train.report.metrics import StepMetrics, read_metrics
from dovetail.train.run import loop
from dovetail.train.run.run_file import DTYPES, RunConfig, load_weights
from dovetail.train.run.stop import Interrupted

STEPS, STOP = 8, 5
ROUNDINGS_PER_LAYER = 12  # of the residual stream's branches: norms, projections, heads, SwiGLU, experts, sums
GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
Lives = dict[bool, "Life"]


class Life(NamedTuple):
    """What became of one model: the weights of a run that was never stopped and of one that was, and the rest."""

    spec: ModelSpec
    steps: list[StepMetrics]
    whole: dict[str, Tensor]
    resumed: dict[str, Tensor]
    loaded: dict[str, Tensor]
    completions: dict[int, list[list[int]]]  # by the number of drafts per step


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def lives(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    tiny_run: Callable[..., RunConfig],
    write_text: Callable[[Path], Path],
) -> Lives:
    """Of one dtype: the model with kernels (True) and without (False)."""
    found, text = {}, write_text(tmp_path_factory.mktemp("source") / "text")
    for has_kernels in (True, False):
        with pytest.MonkeyPatch.context() as patch:
            if not has_kernels:
                for name in ("on_cpu", "on_bf16_cpu"):
                    patch.setattr(capability, name, lambda *tensors: False)
                patch.setattr(capability, "has_bf16_instructions", lambda: False)
            directory = tmp_path_factory.mktemp("run")

            def config(name: str, directory: Path = directory) -> RunConfig:
                return tiny_run(directory / name, text, steps=STEPS, dtype=request.param)

            found[has_kernels] = live(directory, config, DTYPES[request.param], patch)
    return found


def live(directory: Path, config: Callable[[str], RunConfig], dtype: torch.dtype, patch: pytest.MonkeyPatch) -> Life:
    spec = loop.train(config("whole")).spec
    with patch.context() as stopping:
        stopping.setattr(loop, "_one_step", interrupted(loop._one_step))
        with pytest.raises(Interrupted, match=f"after step {STOP} of {STEPS}"):
            loop.train(config("resumed"))
    loop.train(config("resumed"))
    list(export(directory / "whole", directory / "hf", ExportOptions()))
    llm = LLM.load(directory / "hf", dtype, "cpu")
    prompts = ["alpha beta", "gamma", "delta delta alpha"]
    return Life(
        spec=spec,
        steps=[each for each in read_metrics(directory / "whole" / "metrics.jsonl") if isinstance(each, StepMetrics)],
        whole=load_weights(directory / "whole")[0],
        resumed=load_weights(directory / "resumed")[0],
        loaded=llm.model.state_dict(),
        completions={
            drafts: [each.token_ids for each in llm.generate(prompts, GREEDY, speculate=drafts)] for drafts in (0, 1)
        },
    )


def interrupted(step: Callable[..., object]) -> Callable[..., object]:
    def one_step(state: loop.Run, counters: loop.Counters) -> object:
        if counters.step == STOP - 1:
            os.kill(os.getpid(), signal.SIGINT)
        return step(state, counters)

    return one_step


def unequal(first: dict[str, Tensor], second: dict[str, Tensor]) -> list[str]:
    assert first.keys() == second.keys()
    return [name for name, tensor in first.items() if not torch.equal(tensor, second[name])]


@pytest.mark.parametrize("has_kernels", [True, False])
def test_a_resumed_run_has_the_bits_of_one_that_was_never_stopped(lives: Lives, has_kernels: bool) -> None:
    assert unequal(lives[has_kernels].whole, lives[has_kernels].resumed) == []


@pytest.mark.parametrize("has_kernels", [True, False])
def test_the_exported_weights_are_those_of_the_run(lives: Lives, has_kernels: bool) -> None:
    assert unequal(lives[has_kernels].whole, lives[has_kernels].loaded) == []


@pytest.mark.parametrize("has_kernels", [True, False])
def test_drafts_change_no_token(lives: Lives, has_kernels: bool) -> None:
    plain, drafted = lives[has_kernels].completions.values()
    assert [len(each) for each in plain] == 3 * [GREEDY.max_tokens]
    assert drafted == plain


def test_kernels_change_the_first_step_by_rounding_alone(lives: Lives) -> None:
    """Later steps are not compared: AdamW turns a gradient near zero into a whole step, one way or the other."""
    ours, reference = (lives[has_kernels].steps for has_kernels in (True, False))
    spec = lives[True].spec
    layers = spec.num_hidden_layers + spec.num_nextn_predict_layers
    dtype = next(tensor.dtype for name, tensor in lives[True].whole.items() if name.startswith("embed_tokens"))
    bound = tolerance(dtype, roundings=math.sqrt(layers * ROUNDINGS_PER_LAYER), terms=network_terms(spec, 32))
    for name in ("loss", "mtp_loss", "grad_norm"):
        mine, theirs = (getattr(steps[0], name) for steps in (ours, reference))
        assert abs(mine / theirs - 1) < bound
    for steps in (ours, reference):
        assert steps[-1].loss < steps[0].loss
