"""Processes that are the ranks of a gloo group, and run the functions that tests send them.

They start once for many tests, from a process that has imported torch already. A function and what it takes and
returns are pickled; it must be importable, which functions of test modules are not. Every call has a stop watch: ranks
that hang are killed, and the test fails.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

STARTING = 60.0  # seconds that the first call may take longer, on a busy machine


class Ranks:
    def __init__(self, count: int, directory: Path) -> None:
        """`directory` is for the file through which ranks find each other."""
        self.count = count
        self.directory = directory
        self._starts = 0
        self._processes: list[BaseProcess] = []
        self._pipes: list[Connection] = []

    def run(self, function: Callable[..., Any], *arguments: Any, seconds: float = 30.0) -> list[Any]:
        """What `function` returns on each rank. AssertionError where one raises, dies, or takes longer than that."""
        if not self._processes:
            self._start()
            seconds += STARTING
        for pipe in self._pipes:
            pipe.send_bytes(pickle.dumps((function, arguments)))
        end, answers = time.monotonic() + seconds, dict[int, Any]()
        while len(answers) < self.count:
            missing = [rank for rank in range(self.count) if rank not in answers]
            ready = wait([self._pipes[rank] for rank in missing], max(0.0, end - time.monotonic()))
            if not ready:
                self._fail(f"{function.__name__}: ranks {missing} hang, after {seconds} s")
            for rank in missing:
                if self._pipes[rank] in ready:
                    answers[rank] = self._answer(rank, function.__name__)
        return [answers[rank] for rank in range(self.count)]

    def stop(self) -> None:
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            process.kill()
            process.join()
        self._pipes, self._processes = [], []

    def _start(self) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["torch"])
        self._starts += 1
        store = self.directory / f"ranks-{self._starts}"
        for rank in range(self.count):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, self.count, store, theirs), daemon=True)
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)

    def _answer(self, rank: int, name: str) -> Any:
        try:
            is_well, answer = pickle.loads(self._pipes[rank].recv_bytes())
        except EOFError:
            self._fail(f"{name}: rank {rank} died")
        if not is_well:
            self._fail(f"{name}: rank {rank} raised\n{answer}")
        return answer

    def _fail(self, message: str) -> None:
        self.stop()
        raise AssertionError(message)


def _serve(rank: int, count: int, store: Path, pipe: Connection) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"  # as torchrun has it
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=count)
    while True:
        try:
            function, arguments = pickle.loads(pipe.recv_bytes())
        except EOFError:
            return
        try:
            answer = True, function(*arguments)
        except Exception:
            answer = False, traceback.format_exc()
        pipe.send_bytes(pickle.dumps(answer))
