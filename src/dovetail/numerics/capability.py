"""Says which kernels can take which tensors on this machine.

An operation has a plain reference and up to four faster paths. Its module lists them and picks by these answers:

    on_cpu        numba kernels: FP32 or BF16 in CPU memory
    on_bf16_cpu   numba kernels made of AVX-512 BF16 instructions: BF16 in CPU memory
    multiplies_bf16   the same, unless torch alone multiplies in AMX tiles
    on_gpu        Triton kernels: memory of an NVIDIA GPU
    on_fp8_gpu    Triton kernels that multiply FP8: the same, of compute capability 8.9 or more

Where none of them says yes, the reference runs. Modules of Triton kernels are imported behind `on_gpu` or `on_fp8_gpu`
and nowhere else, since Triton comes with torch's CUDA builds only.
"""

from __future__ import annotations

import functools
import importlib.util
import os

import torch
from numba.core.registry import cpu_target
from torch import Tensor

FP8_CAPABILITY = (8, 9)  # the first that casts to E4M3 and multiplies it [PTX ISA]
FP8 = ("e4m3", "e5m2")  # formats of its products


def on_cpu(*tensors: Tensor) -> bool:
    return all(t.device.type == "cpu" and t.dtype in (torch.bfloat16, torch.float32) for t in tensors)


def on_bf16_cpu(*tensors: Tensor) -> bool:
    return has_bf16_instructions() and all(t.device.type == "cpu" and t.dtype == torch.bfloat16 for t in tensors)


def multiplies_bf16(*tensors: Tensor) -> bool:
    return on_bf16_cpu(*tensors) and (has_tiles() or not has_amx())


def on_gpu(*tensors: Tensor) -> bool:
    return all(t.device.type == "cuda" for t in tensors) and _has_triton()


def on_fp8_gpu(*tensors: Tensor) -> bool:
    return on_gpu(*tensors) and all(torch.cuda.get_device_capability(t.device) >= FP8_CAPABILITY for t in tensors)


@functools.cache
def has_bf16_instructions() -> bool:
    """Whether numba compiles VDPBF16PS, the instruction that the kernels of `on_bf16_cpu` are made of.

    Its target is this machine's CPU, unless NUMBA_CPU_NAME, NUMBA_CPU_FEATURES or NUMBA_ENABLE_AVX say otherwise.
    """
    return _compiles("avx512bf16")


@functools.cache
def has_tiles() -> bool:
    """Whether numba compiles AMX's BF16 products, and the system lets this process use them."""
    return has_bf16_instructions() and _compiles("amx-tile", "amx-bf16") and bool(torch.cpu._init_amx())


def _compiles(*features: str) -> bool:
    _, _, known = cpu_target.target_context.codegen().magic_tuple()
    return {f"+{each}" for each in features} <= set(known.split(","))


@functools.cache
def has_amx() -> bool:
    """Whether torch multiplies BF16 in AMX tiles, which AVX-512 cannot keep up with.

    Measured on an Emerald Rapids CPU, GFLOP/s per core of AVX-512 BF16 kernels and of torch: 71 and 267 for 8 experts
    of 64 rows, 256 x 512; 81 and 760 for 512 rows, 1,024 x 2,048; 56 and 98 for 64 experts of 16 rows, 512 x 1,024.
    ONEDNN_MAX_CPU_ISA takes AMX away from torch, as in a comparison.
    """
    most = os.environ.get("ONEDNN_MAX_CPU_ISA", "ALL").upper()
    return torch.cpu._is_amx_tile_supported() and (most in ("ALL", "DEFAULT") or "AMX" in most)


@functools.cache
def _has_triton() -> bool:
    return torch.version.hip is None and importlib.util.find_spec("triton") is not None
