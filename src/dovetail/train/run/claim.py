"""Whose a run's directory is: one process, one set of settings, one text.

A second process is refused, and so are other settings once a checkpoint is there. What the run learns from is recorded
with every checkpoint, because text and tokenizer lie outside the settings. Paths may differ between two calls of a run,
as after it was moved; what they name may not.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from dovetail.atomic import check_folder, only_process, write_bytes
from dovetail.catalog.presets import read_model_file
from dovetail.config import as_table, differences, dump, read_toml
from dovetail.spec.hf_config import write_hf
from dovetail.spec.model import ModelSpec
from dovetail.text.prepare import Source, kept_sources, read_sources
from dovetail.text.shards import TokenStore
from dovetail.text.tokenizer import Tokenizer
from dovetail.train.layout.ranks import first_rank_first, rank_and_world
from dovetail.train.run import checkpoint
from dovetail.train.run.run_file import RunConfig

PATHS = ("out", "data.path", "tokenizer.path", "model.config")
SHOWN = "tensorboard"  # of [train]: how a run is shown, which changes nothing in it
SHARED = "microbatch_size"
TEXT = "text"  # the key of extra.json

Text = Mapping[str, str | None]


@contextmanager
def only_run(out: Path, refusal: str = "this run is being trained by another process") -> Iterator[None]:
    """Hold the directory `out` for this process, or for the ranks that it is the first of.

    Raises ValueError if another one holds it. A directory made for this in which nothing was made is taken away.
    """
    with ExitStack() as held:
        with first_rank_first():
            if rank_and_world()[0] == 0:
                check_folder(out)
                for folder in [each for each in (*reversed(out.parents), out) if not each.exists()]:
                    folder.mkdir()
                    held.callback(_remove_if_empty, folder)
                held.enter_context(only_process(out / ".lock", f"{out}: {refusal}"))
        yield


def _remove_if_empty(folder: Path) -> None:
    with contextlib.suppress(OSError):
        folder.rmdir()


def claim(config: RunConfig, spec: ModelSpec) -> None:
    """Write the run's settings and model, or check that the run that is there has the same ones.

    Before the first checkpoint they may change: what was made from the former ones is made again.
    """
    path, model = config.out / "run.toml", config.out / "config.json"
    there = read_toml(path) if path.exists() else {}
    hf_there = write_hf(read_model_file(model).spec) if model.exists() else {}
    here, hf_here = as_table(config), write_hf(spec)
    if there and checkpoint.checkpoints(config.out / "checkpoints"):
        remedy = "set out to a new directory"
        check_same(_learnt(there), _learnt(here), f"{config.out} holds a run with other settings", remedy, PATHS)
        check_same(hf_there or hf_here, hf_here, f"{config.out} holds a run with other keys of the model", remedy)
        _check_same_tokenizer(config, there.get("tokenizer", {}).get("path"))
    elif there and (changed := differences({**there, "model": hf_there}, {**here, "model": hf_here})):
        (config.out / "budget.json").unlink(missing_ok=True)
        if any(key.startswith(("model.", "data.", "tokenizer.")) for key in changed):
            shutil.rmtree(config.out / "tokenizer", ignore_errors=True)
    if hf_there != hf_here:
        write_bytes(model, (json.dumps(hf_here, indent=2) + "\n").encode())
    if there != here:  # run.toml is last: a directory with one is a run's
        write_bytes(path, dump(config).encode())


def _learnt(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Without what may change as a run goes on: what is shown of it, and how ranks share its batches."""
    train = {key: value for key, value in settings.get("train", {}).items() if key not in (SHOWN, SHARED)}
    return {**settings, "train": train, "layout": None}


def check_same(
    there: Mapping[str, Any], here: Mapping[str, Any], what: str, remedy: str, paths: Collection[str] = ()
) -> None:
    """Raise ValueError, which opens with `what`, for two tables that differ, with the first keys that do.

    Where both name a path, under one of the keys `paths`, it may be another one.
    """
    found = differences(there, here).items()
    if told := [(key, pair) for key, pair in found if key not in paths or None in pair]:
        changes = "; ".join(f"{key} was {was!r} and is now {now!r}" for key, (was, now) in told[:4])
        raise ValueError(f"{what} ({changes}); {remedy}, or delete this one")


def _check_same_tokenizer(config: RunConfig, path_there: str | None) -> None:
    """Raise ValueError if another path names another tokenizer than that of the run."""
    path = config.tokenizer.path
    if path is None or str(path) == path_there:
        return
    own = config.out / "tokenizer"
    if Tokenizer.load(path).fingerprint != Tokenizer.load(own).fingerprint:
        raise ValueError(f"{path} is another tokenizer than {own}, the run's own; set out to a new directory")


def text_of(tokenizer: Tokenizer, train: TokenStore, held_out: TokenStore | None) -> Text:
    """Return what a checkpoint records of the text: digests of tokenizer and tokens, and where the list of files is."""
    return {
        "tokenizer": tokenizer.fingerprint,
        "train": train.index.digest,
        "held_out": None if held_out is None else held_out.index.digest,
        "store": train.directory.name,
    }


def check_sources(config: RunConfig) -> None:
    """Raise ValueError if files of the text changed since the newest checkpoint; nothing is tokenised for this."""
    newest = max(checkpoint.checkpoints(config.out / "checkpoints"), default=None)
    if newest is None:
        return
    try:
        text = json.loads((newest[1] / "extra.json").read_bytes())[TEXT]
    except (OSError, ValueError, KeyError):  # damaged, which loading it will say, or of an earlier version
        return
    stores = config.out / "tokens"
    before, now = kept_sources(stores / text["store"]), read_sources(config.data, stores)
    if before and sorted(each.sha256 for each in before) != sorted(each.sha256 for each in now):
        raise ValueError(_changed(config.out, newest[0], _file_changes(before, now)))


def check_text(out: Path, step: int, there: Text | None, here: Text) -> None:
    """Raise ValueError if a checkpoint was trained on other tokens; None is one of a version that did not say."""
    names = {"tokenizer": f"{out / 'tokenizer'} is another one", "train": "other tokens to train on"}
    names["held_out"] = "other held-out tokens"
    if found := [words for key, words in names.items() if there is not None and there[key] != here[key]]:
        raise ValueError(_changed(out, step, ", ".join(found)))


def _changed(out: Path, step: int, what: str) -> str:
    remedy = "restore it, set out to a new directory, or go on with it as it is by --accept-changed-text"
    return f"{out}: the text is not that of the run up to step {step} ({what}); {remedy}"


def _file_changes(before: list[Source], now: list[Source]) -> str:
    old, new = ({each.name: each.sha256 for each in sources} for sources in (before, now))
    kinds = {
        "new": new.keys() - old.keys(),
        "gone": old.keys() - new.keys(),
        "changed": {name for name in old.keys() & new.keys() if old[name] != new[name]},
    }
    parts = []
    for kind, names in kinds.items():
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        parts += [f"{kind}: {', '.join(sorted(names)[:3])}{more}"] if names else []
    return "; ".join(parts)
