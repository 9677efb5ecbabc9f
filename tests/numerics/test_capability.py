"""Kernels are chosen by what numba compiles for and what torch multiplies with."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import dovetail
from dovetail.numerics import capability

PRODUCT = """
import torch
from dovetail.numerics import capability
from dovetail.numerics.products.grouped import fprop, fprop_reference
generator = torch.Generator().manual_seed(0)
rows, weight = (torch.randn(*shape, generator=generator).bfloat16() for shape in ((64, 32), (2, 16, 32)))
error = (fprop(rows, weight, [0, 30, 64]).double() - fprop_reference(rows.double(), weight.double(), [0, 30, 64])).abs()
print(capability.has_bf16_instructions(), float(error.max()) < 0.1)
"""


@pytest.mark.parametrize(
    "target", [{"NUMBA_CPU_NAME": "generic"}, {"NUMBA_ENABLE_AVX": "0"}, {"NUMBA_CPU_FEATURES": "+avx2"}], ids=str
)
def test_a_numba_that_compiles_for_less_than_this_cpu_is_not_given_its_instructions(target: dict[str, str]) -> None:
    """LLVM aborts the process over an instruction that its target lacks."""
    source = {"PYTHONPATH": str(Path(dovetail.__file__).parents[1])}
    command = [sys.executable, "-c", PRODUCT]
    run = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **source, **target}, timeout=120)
    assert (run.returncode, run.stdout.split(), run.stderr) == (0, ["False", "True"], "")


def test_amx_is_torchs_and_may_be_taken_away(monkeypatch: pytest.MonkeyPatch) -> None:
    has_amx = capability.has_amx.__wrapped__  # not what an earlier call found
    for has_tiles in (True, False):
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda has_tiles=has_tiles: has_tiles)
        for most, takes in [(None, True), ("ALL", True), ("avx512_core_amx", True), ("AVX512_CORE_BF16", False)]:
            monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)
            if most is not None:
                monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", most)
            assert has_amx() == (has_tiles and takes)
