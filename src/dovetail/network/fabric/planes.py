"""One network of switches and where its endpoints are attached, before vertices, capacities and nodes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int32]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Plane:
    """Switches are numbered from 0; two that are joined by several cables appear as often."""

    switches: int
    cables: Ints  # [cables, 2] switches at both ends
    layer: NDArray[np.int8]  # [switches] 0 has endpoints
    group: Ints  # [switches] pod, group or column; -1 in none
    attached: Ints  # [endpoints] the switch of each


def ports_used(plane: Plane) -> NDArray[np.int64]:
    """[switches] ports with a cable in them."""
    ends = np.concatenate([plane.cables.ravel(), plane.attached])
    return np.bincount(ends, minlength=plane.switches)
