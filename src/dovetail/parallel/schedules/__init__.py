"""Pipeline schedules as data: 1F1B, interleaved, zero-bubble, DualPipe and DualPipeV."""
