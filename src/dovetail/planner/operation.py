"""How long one operation of a plan takes on a cluster, whichever kind it is of."""

from __future__ import annotations

from dovetail.cost.ops import Collective, Exchange, Op
from dovetail.cost.roofline import Timed, op_time
from dovetail.network.collectives import Mode, Transfer, collective_time, exchange_time
from dovetail.spec.hardware import Cluster


def operation_time(
    op: Op, cluster: Cluster, multiprocessors: int | None = None, mode: Mode = "normal"
) -> Timed | Transfer:
    """`multiprocessors` (None: all) are those left to arithmetic; `mode` is that of exchanges with experts.

    Raises ValueError as `op_time`, `exchange_time` and `collective_time` do.
    """
    if isinstance(op, Exchange):
        return exchange_time(op, cluster, mode)
    if isinstance(op, Collective):
        return collective_time(op, cluster)
    return op_time(op, cluster.gpu, multiprocessors)
