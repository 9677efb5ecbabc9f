"""Saves and loads a run's checkpoints: asynchronous, atomic and checked.

They are those of `torch.distributed.checkpoint`.

    root/step-00000120/  __0_0.distcp ...  tensors, one file per rank, as torch.distributed.checkpoint writes them
                         .metadata         which tensor is where (its own index)
                         extra.json        counters, schedules' positions, anything else that is JSON
                         manifest.json     bytes and SHA-256 of every other file; written last

A save copies the tensors into host buffers that are kept between saves (the only part a step waits for), and a
thread does the rest: write into `root/.step-*.partial`, flush every file and the directory to the disk, rename, flush
`root`. So a directory of the final name is whole or, after damage, does not match its manifest; `latest` then
names it and falls back to the one before. All ranks of a process group call together; without one, the same code
runs alone. The state must be dictionaries of tensors: nothing of it is pickled, and all of it loads in place.

In place of a tensor a rank may give a `Piece` of it, or nothing. What is stored is the whole tensor under its name,
and no layout: ranks of any number read it whole or in other pieces. What several ranks hold is taken to be the same
and written once; what none holds is refused.
"""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import warnings
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.tensor import DTensor

from dovetail.atomic import clear_leftovers, partial_name, publish, remove_directory, write_bytes
from dovetail.parallel.weights import resharding
from dovetail.parallel.weights.pieces import Piece
from dovetail.parallel.weights.resharding import Holders, Leaf
from dovetail.train.layout.ranks import PATIENCE
from dovetail.train.run import manifest
from dovetail.train.run.manifest import Fingerprint

Result = TypeVar("Result")
State = Mapping[str, Any]  # of tensors and pieces, or of more such mappings

_FINAL = re.compile(r"step-(\d{8,})")
_LEFTOVER = re.compile(r"\.(step-\d{8,})\.(partial|old)")
_SINGLE_PROCESS = "torch.distributed is disabled, unavailable or uninitialized"  # a warning that says all is well


class CheckpointError(RuntimeError):
    """A checkpoint could not be written, or what is on the disk is damaged."""


class Save:
    """One save under way: `path` exists once `wait` has returned."""

    def __init__(self, path: Path, work: Future[None]) -> None:
        self.path = path
        self.is_reported = False  # whether a failure has reached the caller
        self._work = work

    def done(self) -> bool:
        return self._work.done()

    def wait(self) -> Path:
        """Block until the checkpoint is on the disk. Raises CheckpointError if it could not be written."""
        error = self._work.exception()
        self.is_reported = True
        if error is not None:
            raise CheckpointError(
                f"{self.path}: checkpoint not written: {_cause(error)}; earlier checkpoints in {self.path.parent} "
                "are untouched"
            ) from error
        return self.path


class Checkpointer:
    """Writes the checkpoints of one run into `root` and keeps the newest `keep`.

    Everything left behind by a killed run (`.step-*`) is removed at the start; so only one run may use `root`.
    """

    def __init__(self, root: Path, keep: int = 3) -> None:
        if keep < 1:
            raise ValueError(f"keep = {keep}: at least the newest checkpoint must be kept")
        self.root, self.keep = Path(root), keep
        # The writing thread needs a group of its own: its collectives would interleave with those of the step.
        self._group = dist.new_group(backend="gloo", timeout=PATIENCE) if dist.is_initialized() else None
        has_gpu = torch.cuda.is_available()
        self._stager = DefaultStager(StagingOptions(has_gpu, False, False, has_gpu))
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._last: Save | None = None
        warnings.filterwarnings("ignore", message=_SINGLE_PROCESS, category=UserWarning)
        if _rank(self._group) == 0:
            self.root.mkdir(parents=True, exist_ok=True)
            for leftover in sorted(self.root.iterdir()):
                if match := _LEFTOVER.fullmatch(leftover.name):
                    clear_leftovers(self.root / match[1])

    def save(self, step: int, state: State, extra: Mapping[str, Any] | None = None) -> Save:
        """Copy `state` and write it as the checkpoint of `step` beside the caller's work.

        Returns once the tensors are copied, so they may change right after. First waits for the save before, if
        it is still being written, and raises its CheckpointError if it failed. `extra` must be JSON. What is wrong
        with one rank's `state` is raised on all.
        """
        self.wait()  # so the group is free
        holders = _holders(state, self._group)
        text = json.dumps(dict(extra or {}), indent=1, allow_nan=False)
        leaves = _flatten(state)
        tensors = {name: leaf.flat if isinstance(leaf, Piece) else leaf for name, leaf in leaves.items()}
        staged = self._stager.stage(tensors)
        assert isinstance(staged, dict)
        for name, leaf in leaves.items():
            if isinstance(leaf, Piece):
                staged[name] = dataclasses.replace(leaf, flat=staged[name])
        path = self.root / f"step-{step:08d}"
        work = self._thread.submit(_write, path, staged, holders, text, self.keep, self._group)
        self._last = Save(path, work)
        return self._last

    def wait(self) -> None:
        """Block until nothing is being written; raises CheckpointError once if the last save failed."""
        last, self._last = self._last, None
        if last is not None and not last.is_reported:
            last.wait()

    def close(self) -> None:
        """Wait, and free the buffers. Raises CheckpointError if the last save failed."""
        try:
            self.wait()
        finally:
            self._thread.shutdown()
            self._stager.close()


def latest(root: Path) -> Path | None:
    """The newest whole checkpoint in `root`, or None; a damaged one is named in a warning and passed over."""
    for _, path in sorted(checkpoints(root), reverse=True):
        problem = manifest.damage(path)
        if problem is None:
            return path
        warnings.warn(f"{path}: damaged checkpoint passed over ({problem})", stacklevel=2)
    return None


def step_of(path: Path) -> int:
    """The step that the checkpoint directory `path` was written after."""
    match = _FINAL.fullmatch(path.name)
    if match is None:
        raise ValueError(f"{path}: not the name of a checkpoint directory (step-00000000)")
    return int(match[1])


def load_checkpoint(path: Path, state: State, partial: bool = False) -> dict[str, Any]:
    """Fill the tensors and pieces of `state` in place, bit for bit, and return `extra`.

    With `partial` the checkpoint may hold more than the `state` of all ranks together asks for.
    Raises CheckpointError if a file is missing or does not match its checksum, or a tensor is not whole, and ValueError
    if names, shapes or dtypes of `state` are not those of the checkpoint; in both cases no tensor has been touched. It
    is raised on all ranks.
    """
    group = dist.group.WORLD if dist.is_initialized() else None
    for problem in _together(lambda: manifest.damage(path, _rank(group), _num_ranks(group)), group):
        if problem is not None:
            raise CheckpointError(f"{path}: damaged checkpoint ({problem})")
    holders = _holders(state, group)
    reader = FileSystemReader(path)
    stored: dict[str, Any] = reader.read_metadata().state_dict_metadata  # of tensors alone
    lost = resharding.stored_gap(stored)
    if lost is not None:
        raise CheckpointError(f"{path}: damaged checkpoint ({lost})")
    problem = resharding.misfit(holders, stored, partial)
    if problem is not None:
        raise ValueError(f"{path}: {problem}")
    cuts = {name: resharding.cut(leaf) for name, leaf in _flatten(state).items()}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=_SINGLE_PROCESS, category=UserWarning)
        planner = resharding.LoadPlanner()
        state_dict_loader.load(cuts, storage_reader=reader, planner=planner, no_dist=group is None)
    extra: dict[str, Any] = json.loads((path / "extra.json").read_text(encoding="utf-8"))
    return extra


def _write(
    path: Path, leaves: dict[str, Leaf], holders: Holders, extra: str, keep: int, group: dist.ProcessGroup | None
) -> None:
    """Runs in the writing thread, on every rank."""
    temporary = partial_name(path)
    rank = _rank(group)
    try:
        lost = resharding.gap(holders)
        if lost is not None:
            raise CheckpointError(lost)
        own_share = resharding.share(holders, _num_ranks(group))[rank]
        cuts = {name: resharding.cut(leaves[name], span) for name, span in own_share.items()}
        writer, planner = FileSystemWriter(temporary, sync_files=True), resharding.SavePlanner()
        state_dict_saver.save(cuts, storage_writer=writer, planner=planner, process_group=group, no_dist=group is None)
        # Each rank hashes what it wrote, while it is still in the page cache.
        own = f"__{rank}_*"
        shares = _together(lambda: {each.name: manifest.fingerprint(each) for each in temporary.glob(own)}, group)
        files = {name: found for share in shares for name, found in share.items()}
        about = {"step": step_of(path), "torch": torch.__version__, "tensors": resharding.summary(holders)}
        _together(lambda: _publish(path, extra, files, about, keep) if rank == 0 else None, group)
    except BaseException:
        if rank == 0:
            shutil.rmtree(temporary, ignore_errors=True)
        raise


def _publish(path: Path, extra: str, files: dict[str, Fingerprint], about: Mapping[str, Any], keep: int) -> None:
    """Add the manifest, give the directory its final name, and remove the checkpoints that are now too old."""
    temporary = partial_name(path)
    unseen = sorted(name for name in files if not (temporary / name).exists())
    if unseen:
        raise CheckpointError(f"{unseen[0]} is not there: {path.parent} must be one directory to all ranks")
    write_bytes(temporary / "extra.json", extra.encode())
    for name in ("extra.json", ".metadata"):
        files[name] = manifest.fingerprint(temporary / name)
    manifest.write(temporary, files, about)
    publish(temporary, path)  # in place of an older one where the run came back to this step
    # Later steps than this one belong to a run that was rewound: not ours to count, and not ours to remove.
    older = sorted(found for found in checkpoints(path.parent) if found[0] <= step_of(path))
    for _, each in older[:-keep]:
        remove_directory(each)


def checkpoints(root: Path) -> list[tuple[int, Path]]:
    """The steps and directories of all checkpoints in `root`, whole or damaged, in no order."""
    if not root.is_dir():
        return []
    return [(int(match[1]), path) for path in root.iterdir() if (match := _FINAL.fullmatch(path.name))]


def _flatten(state: State, prefix: str = "") -> dict[str, Leaf]:
    flat: dict[str, Leaf] = {}
    for key, leaf in state.items():
        name = f"{prefix}{key}"
        if isinstance(leaf, Tensor) and not isinstance(leaf, DTensor):
            found: dict[str, Leaf] = {name: leaf.detach()}
        elif isinstance(leaf, Piece):
            found = {name: dataclasses.replace(leaf, flat=leaf.flat.detach())}
        elif isinstance(leaf, Mapping):
            found = _flatten(leaf, f"{name}.")
        else:
            kind = type(leaf).__name__
            raise ValueError(f"state {name!r} is a {kind}, not a tensor or a Piece; plain values belong in `extra`")
        clash = sorted(found.keys() & flat.keys())
        if clash:
            raise ValueError(f"state {clash[0]!r} is there twice, once as a key with a dot; rename one")
        flat |= found
    return flat


def _holders(state: State, group: dist.ProcessGroup | None) -> Holders:
    """What all ranks hold. What is wrong with the state of one is raised on all."""
    return resharding.holders_of(_together(lambda: resharding.held(_flatten(state)), group))


def _rank(group: dist.ProcessGroup | None) -> int:
    return 0 if group is None else dist.get_rank(group)


def _num_ranks(group: dist.ProcessGroup | None) -> int:
    return 1 if group is None else dist.get_world_size(group)


def _together(work: Callable[[], Result], group: dist.ProcessGroup | None) -> list[Result]:
    """Results of all ranks; an exception on one of them is raised on all, so that none waits for ever."""
    if group is None:
        return [work()]
    mine: Result | CheckpointError
    try:
        mine = work()
    except Exception as error:
        mine = CheckpointError(f"rank {_rank(group)}: {type(error).__name__}: {error}")
    everyone: list[Any] = [None] * _num_ranks(group)
    dist.all_gather_object(everyone, mine, group)
    for each in everyone:
        if isinstance(each, CheckpointError):
            raise each
    return everyone


def _cause(error: BaseException) -> str:
    """The failure underneath, without the traceback text that torch.distributed.checkpoint packs around it."""
    if isinstance(error, CheckpointException):
        return "; ".join(f"rank {rank}: {_cause(each)}" for rank, (each, _) in error.failures.items())
    under = error.__cause__ or error.__context__
    if under is not None and not isinstance(error, OSError):
        return _cause(under)
    return f"{type(error).__name__}: {error}"
