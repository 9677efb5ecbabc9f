"""What each rank tells all others at the end of a step."""

from __future__ import annotations

from dataclasses import astuple, dataclass

import torch
import torch.distributed as dist

from dovetail.parallel.turns import Waited
from dovetail.parallel.wire import Traffic


@dataclass(frozen=True, slots=True, kw_only=True)
class Told:
    sent: Traffic  # in the step
    sent_in_steps: Traffic  # since the process began
    sent_beside: Traffic  # likewise, and not in steps: to measure held-out text
    waited: Waited  # in the step
    worked: float  # seconds of the step, to the sums of gradients and without the waits
    memory: float  # bytes, the most that the rank has taken


def tell(own: Told, device: torch.device) -> list[Told]:
    """What all ranks tell, by their number; they call it together."""
    parts = (own.sent, own.sent_in_steps, own.sent_beside, own.waited)
    numbers = torch.tensor([*sum(map(astuple, parts), ()), own.worked, own.memory], dtype=torch.float64, device=device)
    rows = numbers.new_empty(dist.get_world_size() * len(numbers))
    dist.all_gather_into_tensor(rows, numbers)
    return [
        Told(
            sent=Traffic(int(row[0]), int(row[1])),
            sent_in_steps=Traffic(int(row[2]), int(row[3])),
            sent_beside=Traffic(int(row[4]), int(row[5])),
            waited=Waited(*row[6:-2]),
            worked=row[-2],
            memory=row[-1],
        )
        for row in rows.view(-1, len(numbers)).tolist()
    ]
