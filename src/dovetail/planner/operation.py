"""How long one operation of a plan takes on a cluster, whatever its kind."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dovetail.cost.ops.ops import Collective, Exchange, Op, Send
from dovetail.cost.roofline import Timed, op_time
from dovetail.network.demands.closed_forms import Mode, Transfer, collective_time, exchange_time, send_time
from dovetail.spec.hardware import Cluster

if TYPE_CHECKING:  # it loads NumPy, which closed forms do not need
    from dovetail.network.delivery.layout_traffic import LayoutTraffic


def operation_time(
    op: Op | Send,
    cluster: Cluster,
    multiprocessors: int | None = None,
    mode: Mode = "normal",
    traffic: LayoutTraffic | None = None,
) -> Timed | Transfer:
    """Return the time of `op`.

    `multiprocessors` (None: all) are those left to arithmetic, and `mode` is that of exchanges with experts. With
    `traffic` an exchange is slowed as if all groups of the layout had theirs at once. Raises ValueError as `op_time`,
    `exchange_time`, `collective_time` and `LayoutTraffic.slowed` do.
    """
    if isinstance(op, Exchange):
        alone = exchange_time(op, cluster, mode)
    elif isinstance(op, Collective):
        alone = collective_time(op, cluster)
    elif isinstance(op, Send):
        alone = send_time(op.bytes, cluster, is_within_node=op.gpus <= cluster.gpus_per_node)
    else:
        return op_time(op, cluster.gpu, multiprocessors)
    return traffic.slowed(alone, op, mode) if traffic else alone
