"""Compiles the numba kernels, keeps their machine code, and gives them tensors.

Tensors reach a kernel as NumPy arrays (`array`): FP32 as float32, BF16 as the uint16 that holds its bits.

Kernels use numba's OpenMP threads. Importing torch first (done here) makes numba bind to the OpenMP library
that torch has loaded, so both share one pool and do not fight for cores.
"""

from __future__ import annotations

import functools
from typing import Any

import numba
import numpy as np
import torch
from torch import Tensor

from dovetail.kernel_cache import compiled


def use_threads_of_torch() -> None:
    """Kernels run on as many threads as torch, whose number stays; of the calling thread, as numba has it."""
    count = torch.get_num_threads()
    numba.set_num_threads(min(count, numba.config.NUMBA_NUM_THREADS))
    if torch.get_num_threads() != count:  # numba starts with all cores, and OpenMP keeps one number for both
        torch.set_num_threads(count)


use_threads_of_torch()

# Reassociation and fused multiply-add are allowed; NaN and infinity are not assumed away, since the training
# loop looks for them.
FAST = {"reassoc", "contract", "nsz", "arcp"}


def kernel(function: Any, parallel: bool = True, fast: bool = True) -> Any:
    """Compile `function` on first use, parallel over its pranges; the machine code is cached on disk.

    Other Python threads go on meanwhile. `fast` lets the compiler regroup sums and multiply by reciprocals.
    """
    return compiled(
        parallel=parallel, fastmath=FAST if fast else False, error_model="numpy", boundscheck=False, nogil=True
    )(function)


serial_kernel = functools.partial(kernel, parallel=False)
exact_kernel = functools.partial(kernel, fast=False)  # IEEE arithmetic, bit for bit


def array(tensor: Tensor) -> np.ndarray:
    """`tensor` (CPU, contiguous) as the array a kernel takes: no copy, BF16 as uint16."""
    assert tensor.is_contiguous(), "numba kernels take contiguous tensors"
    tensor = tensor.detach()
    return (tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor).numpy()
