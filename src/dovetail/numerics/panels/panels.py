"""The fastest products of packed BF16 operands that this CPU has.

Which they are depends on what numba compiles for, and on nothing else: it is the same in each process of a machine.
"""

from __future__ import annotations

from dovetail.numerics import capability
from dovetail.numerics.panels import amx_panels_numba, vectors_numba

panels = amx_panels_numba if capability.has_tiles() else vectors_numba
