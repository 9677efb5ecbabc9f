"""The same flows for SimGrid, which the system's own Python runs (`_simgrid.py`)."""

from __future__ import annotations

import json
import subprocess
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from dovetail.network.flows.flows import Floats, Flows, Routes

PYTHON = "/usr/bin/python3"  # what Debian's python3-simgrid is for
RUNNER = Path(__file__).with_name("_simgrid.py")
MISSING = f"no SimGrid for {PYTHON}; on Debian: apt-get install python3-simgrid"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Answer:
    end: Floats  # [flows] seconds
    build_s: float  # of the clock: making network and routes
    run_s: float  # starting flows and running them
    run_cpu_s: float  # the same, of the processor
    peak_gib: float
    version: str


def is_installed() -> bool:
    try:
        return subprocess.run([PYTHON, "-c", "import simgrid"], capture_output=True).returncode == 0
    except OSError:
        return False


def without_latency(routes: Routes) -> Routes:
    """SimGrid would weigh flows by it."""
    return replace(routes, latency=np.zeros(len(routes)))


def on_routes(capacity: Floats, flows: Flows, routes: Routes, latency: Floats | None = None) -> dict[str, Any]:
    """The demand over our routes, each of which must be one path. Latency of links is 0 where not given."""
    assert not len(routes.shares) and not len(routes.bundles), "SimGrid sends a flow over one path"
    starts = routes.offsets.tolist()
    items = routes.items.tolist()
    return {
        **_columns(flows),
        "capacity": capacity.tolist(),
        "latency": np.broadcast_to(0.0 if latency is None else latency, len(capacity)).tolist(),
        "route": [items[first:last] for first, last in zip(starts[:-1], starts[1:], strict=True)],
    }


def on_own_network(zone: dict[str, Any], flows: Flows) -> dict[str, Any]:
    """The demand on a network that SimGrid wires and routes."""
    return {**_columns(flows), "zone": zone}


def _columns(flows: Flows) -> dict[str, Any]:
    whole = np.rint(flows.bytes).astype(np.int64)
    assert (whole == flows.bytes).all(), "SimGrid sends whole bytes"
    return {
        "hosts": int(max(flows.source.max(), flows.destination.max())) + 1,
        "source": flows.source.tolist(),
        "destination": flows.destination.tolist(),
        "bytes": whole.tolist(),
        "start": flows.start.tolist(),
    }


def ask_simgrid(demand: dict[str, Any], limit_seconds: float | None = None) -> Answer:
    """Raises subprocess.TimeoutExpired when it takes longer than the limit."""
    done = subprocess.run(
        [PYTHON, str(RUNNER)], input=json.dumps(demand), capture_output=True, text=True, timeout=limit_seconds
    )
    if done.returncode:
        raise RuntimeError(f"SimGrid: {done.stderr}")
    answer = json.loads(done.stdout)
    return Answer(**{**answer, "end": np.array(answer["end"])})
