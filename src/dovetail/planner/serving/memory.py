"""What one GPU of a serving pool holds, and the error that it is too much."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal

from dovetail.spec.hardware import Gpu
from dovetail.spec.layout import Layout

Pool = Literal["prefill", "decode"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Holding:
    """Bytes on one GPU by use."""

    weights: float
    activations: float = 0.0
    cache: float
    buffers: float = 0.0
    runtime: float

    @property
    def total(self) -> float:
        return sum(self.parts.values())

    @property
    def parts(self) -> dict[str, float]:
        return {each.name: getattr(self, each.name) for each in fields(self)}

    @property
    def largest(self) -> str:
        """The name of the largest part."""
        return max(self.parts, key=self.parts.__getitem__)

    def __str__(self) -> str:
        return ", ".join(f"{name} {size / 1e9:.1f}" for name, size in self.parts.items() if size)


class DoesNotFitError(ValueError):
    """A GPU of a pool would hold more than it has room for; `whose` is "a prefill GPU", say."""

    def __init__(self, pool: Pool, whose: str, layout: Layout, holding: Holding, gpu: Gpu) -> None:
        super().__init__(
            f"{whose} with ep = {layout.ep}, tp = {layout.tp} needs {holding.total / 1e9:.1f} GB, most of it "
            f"{holding.largest} ({holding}), and {gpu.name} has {gpu.memory_bytes / 1e9:.1f}"
        )
        self.pool = pool
        self.holding = holding
