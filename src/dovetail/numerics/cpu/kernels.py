"""Compiles the numba kernels, keeps their machine code, and gives them tensors.

Tensors reach a kernel as NumPy arrays (`array`): FP32 as float32, BF16 as the uint16 that holds its bits.

Kernels use numba's OpenMP threads. Importing torch first (done here) makes numba bind to the OpenMP library
that torch has loaded, so both share one pool and do not fight for cores.
"""

from __future__ import annotations

import functools
import hashlib
import os
import tempfile
from pathlib import Path
from typing import Any

import numba
import numpy as np
import torch
from torch import Tensor

# One pool of threads means one number of them: OMP_NUM_THREADS, say, counts for both.
numba.set_num_threads(min(torch.get_num_threads(), numba.config.NUMBA_NUM_THREADS))

# Reassociation and fused multiply-add are allowed; NaN and infinity are not assumed away, since the training
# loop looks for them.
FAST = {"reassoc", "contract", "nsz", "arcp"}


def kernel(function: Any, parallel: bool = True, fast: bool = True) -> Any:
    """Compile `function` on first use, parallel over its pranges; the machine code is cached on disk.

    `fast` lets the compiler regroup sums and multiply by reciprocals.
    """
    before, numba.config.CACHE_DIR = numba.config.CACHE_DIR, str(kernel_directory())
    try:
        options = {"fastmath": FAST if fast else False, "error_model": "numpy", "boundscheck": False}
        return numba.njit(parallel=parallel, cache=True, **options)(function)
    finally:
        numba.config.CACHE_DIR = before


serial_kernel = functools.partial(kernel, parallel=False)
exact_kernel = functools.partial(kernel, fast=False)  # IEEE arithmetic, bit for bit


@functools.cache
def kernel_directory() -> Path:
    """Where compiled kernels are kept: one directory per version of their sources.

    numba looks at a kernel's own file only, and would go on using one compiled with an older `load` or `exp`.
    """
    digest = hashlib.sha256()
    for path in sorted([Path(__file__), *Path(__file__).parents[2].rglob("*_numba.py")]):
        digest.update(path.read_bytes())
    caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    directory = caches / "dovetail" / f"kernels-{digest.hexdigest()[:16]}"
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError:  # a home that cannot be written to: compile once per process
        return Path(tempfile.mkdtemp(prefix="dovetail-kernels-"))
    return directory


def array(tensor: Tensor) -> np.ndarray:
    """`tensor` (CPU, contiguous) as the array a kernel takes: no copy, BF16 as uint16."""
    assert tensor.is_contiguous(), "numba kernels take contiguous tensors"
    tensor = tensor.detach()
    return (tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor).numpy()
