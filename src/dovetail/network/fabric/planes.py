"""One plane of a fabric: its switches, its cables, and the switch of each endpoint."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int32]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Plane:
    """One plane. Switches are numbered from 0; two that are joined by several cables appear that often."""

    switches: int
    cables: Ints  # [cables, 2] the switches at both ends
    layer: NDArray[np.int8]  # [switches] layer 0 has the endpoints
    group: Ints  # [switches] pod, group or column; -1 without one
    attached: Ints  # [endpoints] the switch of each endpoint


def ports_used(plane: Plane) -> NDArray[np.int64]:
    """Return the number of ports with a cable at each switch [switches]."""
    ends = np.concatenate([plane.cables.ravel(), plane.attached])
    return np.bincount(ends, minlength=plane.switches)
