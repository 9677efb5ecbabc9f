"""The ranks of a run as one: what all of them sent, how long they waited, what the fullest takes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import Any

from dovetail.atomic import write_bytes
from dovetail.parallel.told import Told
from dovetail.train.report.metrics import StepMetrics


def of_ranks(told: Sequence[Told]) -> dict[str, Any]:
    """The fields of `StepMetrics` that tell of ranks; none for a process alone."""
    if not told:
        return {}
    return {
        "nic_bytes": sum(each.sent.nic for each in told),
        "node_bytes": sum(each.sent.node for each in told),
        "expected_nic_bytes": sum(each.expected.nic for each in told),
        "expected_node_bytes": sum(each.expected.node for each in told),
        "stage_wait": fmean(each.waited.stages for each in told),
        "expert_wait": fmean(each.waited.experts for each in told),
        "gradient_wait": fmean(each.waited.gradients for each in told),
        "rank_memory": max(each.memory for each in told),
    }


def write_traffic(path: Path, told: Sequence[Told]) -> None:
    """Write the bytes that each rank has sent, by kind of link: in steps, as expected and in fact, and beside them."""
    tables = {
        "predicted": {rank: asdict(each.expected_in_steps) for rank, each in enumerate(told)},
        "in_steps": {rank: asdict(each.sent_in_steps) for rank, each in enumerate(told)},
        "beside": {rank: asdict(each.sent_beside) for rank, each in enumerate(told)},
    }
    write_bytes(path, json.dumps(tables).encode())


def ranks_line(now: StepMetrics) -> list[str]:
    """What a step of several ranks says of them, in parts of a line."""
    waits = {"stages": now.stage_wait, "experts": now.expert_wait, "gradients": now.gradient_wait}
    shares = ", ".join(f"{what} {seconds / now.seconds:.0%}" for what, seconds in waits.items() if seconds)
    nic, node, expected_nic, expected_node = (
        f"{size / 1e6:.1f}" for size in (now.nic_bytes, now.node_bytes, now.expected_nic_bytes, now.expected_node_bytes)
    )
    parts = [f"sent {nic} MB to other nodes (expected {expected_nic}), {node} inside ({expected_node})"]
    parts.append(f"waiting for {shares}")
    if any(now.rank_max_vio):
        parts.append(f"busiest rank {1 + max(now.rank_max_vio):.2f} x the mean")
    return [*parts, f"memory {now.rank_memory / 1e9:.2f} GB"]
