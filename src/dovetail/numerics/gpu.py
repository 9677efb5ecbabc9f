"""Whose tensors the Triton kernels take: what `cpu_numba.takes` is to those of a CPU.

They are imported where one of these says yes, and nowhere else: Triton comes with torch's CUDA builds only.
"""

from __future__ import annotations

import functools
import importlib.util

import torch
from torch import Tensor

FP8_CAPABILITY = (8, 9)  # the first that casts to E4M3 and multiplies it [PTX ISA]
FP8 = ("e4m3", "e5m2")  # formats of its products


def takes(*tensors: Tensor) -> bool:
    """Whether all lie on an NVIDIA GPU that Triton is installed for."""
    return all(tensor.device.type == "cuda" for tensor in tensors) and _has_triton()


def multiplies_fp8(*tensors: Tensor) -> bool:
    """Whether that GPU's Tensor Cores also take FP8."""
    return takes(*tensors) and all(
        torch.cuda.get_device_capability(tensor.device) >= FP8_CAPABILITY for tensor in tensors
    )


@functools.cache
def _has_triton() -> bool:
    return torch.version.hip is None and importlib.util.find_spec("triton") is not None
