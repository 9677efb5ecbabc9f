"""Settles a process that is about to compute on a CPU for long: its memory and its threads."""

from __future__ import annotations

import ctypes
import os

import torch

from dovetail.numerics.cpu.allocator import keep_freed_memory
from dovetail.numerics.cpu.kernels import use_threads_of_torch
from dovetail.threads import num_threads

OMP_PAUSE_SOFT = 1  # omp.h


def settle_process() -> None:
    """Called where training and generation begin; importing dovetail changes nothing.

    torch takes the cores of the affinity mask. In a container that may use fewer it gets fewer threads, unless
    OMP_NUM_THREADS or torch.set_num_threads has said how many.
    """
    keep_freed_memory()
    is_unsaid = "OMP_NUM_THREADS" not in os.environ
    if is_unsaid and num_threads() < torch.get_num_threads() == len(os.sched_getaffinity(0)):
        torch.set_num_threads(num_threads())
    use_threads_of_torch()


def leave_threads() -> None:
    """End the threads that wait for this one's next parallel region; a later region starts others.

    Called before another thread computes in this one's place. OpenMP keeps threads for each of a program's own. Where
    these are more than the cores, libgomp lets all of them sleep at every wait, which takes half a step's time.
    """
    pause = getattr(ctypes.CDLL(None), "omp_pause_resource_all", None)
    if pause is not None:
        pause(OMP_PAUSE_SOFT)
