"""Exponential moving average of the weights, updated in CPU memory beside the step [V3 §3.2.2].

    average <- average + (1 - d) (weight - average),    d = min(decay, (1 + n) / (10 + n)) at update n = 0, 1, ...

V3 gives no decay; the ramp of d is ours: without it a short run's average is mostly its random initial weights.
A thread does the arithmetic while the next forward pass runs. It reads FP32 weights in place on a CPU and from
pinned buffers, filled on a stream of their own, for a GPU. In both cases the caller must say `finish_reading`
before the weights change; the result is then the same, bit for bit, as without the thread.
"""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor


class Ema:
    """The averages of `weights`, FP32 tensors by name that are updated in place, all on one device."""

    def __init__(self, weights: Mapping[str, Tensor], decay: float, in_background: bool = True) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"decay = {decay}: must be at least 0 and below 1, such as 0.999")
        for name, weight in weights.items():
            if weight.dtype != torch.float32:
                raise ValueError(f"{name} is {weight.dtype}: average the FP32 master weights")
        self.decay = decay
        self.average = {name: weight.detach().to("cpu", copy=True) for name, weight in weights.items()}
        self.num_updates = torch.zeros((), dtype=torch.int64)
        self._weights = [weight.detach() for weight in weights.values()]
        self._averages = list(self.average.values())
        self._is_cuda = any(weight.is_cuda for weight in self._weights)
        self._buffers = self._weights
        if self._is_cuda:
            self._buffers = [torch.empty_like(average, pin_memory=True) for average in self._averages]
            self._stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
            self._copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="ema") if in_background else None
        self._work: Future[None] | None = None

    def update(self) -> None:
        """Start to move the averages towards the weights as they are now."""
        self.finish()
        num_updates = int(self.num_updates)
        towards = 1 - min(self.decay, (1 + num_updates) / (10 + num_updates))
        self.num_updates += 1
        if self._is_cuda:
            self._copy_to_buffers()
        if self._thread is None:
            self._blend(towards)
        else:
            self._work = self._thread.submit(self._blend, towards)

    def finish_reading(self) -> None:
        """Call before the weights change. On a GPU the current stream waits for the copies, not the host."""
        if self._is_cuda:
            torch.cuda.current_stream().wait_event(self._copied)
        else:
            self.finish()

    def finish(self) -> None:
        """Block until the averages are up to date."""
        work, self._work = self._work, None
        if work is not None:
            work.result()

    def state(self) -> dict[str, Tensor | dict[str, Tensor]]:
        """What a checkpoint holds; loading into these tensors in place restores the average."""
        self.finish()
        return {"average": self.average, "num_updates": self.num_updates}

    def close(self) -> None:
        self.finish()
        if self._thread is not None:
            self._thread.shutdown()

    def _copy_to_buffers(self) -> None:
        self._stream.wait_stream(torch.cuda.current_stream())  # the update of the weights just launched
        with torch.cuda.stream(self._stream):
            for buffer, weight in zip(self._buffers, self._weights, strict=True):
                buffer.copy_(weight, non_blocking=True)
            self._copied.record()

    def _blend(self, towards: float) -> None:
        if self._is_cuda:
            self._copied.synchronize()
        # One call for all tensors: the interpreter's lock is free for the step from its start to its end.
        torch._foreach_lerp_(self._averages, self._buffers, towards)
