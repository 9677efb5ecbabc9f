"""Finds what is wrong with a run before anything is written: its model, text, tokenizer and place.

A mistake that is found here costs seconds, and the run file can be corrected: nothing has claimed the directory yet.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable

import torch

from dovetail.atomic import check_folder
from dovetail.spec.model import ModelSpec
from dovetail.text.documents import DataConfig, only_document, read_documents, source_files
from dovetail.text.prepare import check_special_tokens
from dovetail.text.tokenizer import check_vocabulary
from dovetail.train.layout.ranks import rank_and_world
from dovetail.train.report.reporter import check_tensorboard
from dovetail.train.run.run_file import RunConfig, build_model, build_optimizer, load_tokenizer, resolve_schedule
from dovetail.train.run.team import check_team
from dovetail.train.step.team import Alone


def check_run(config: RunConfig, spec: ModelSpec, report: Callable[[str], None]) -> bool:
    """Return whether some of the text is held out; nothing is written. Raises ValueError, one line, for what stands
    against the run."""
    check_folder(config.out)
    model = build_model(config, torch.device("meta"))  # without memory: enough to see what is wrong
    build_optimizer(config, Alone(model))
    check_team(config, spec, resolve_schedule(config), int(os.environ.get("LOCAL_WORLD_SIZE", "1")))  # set by torchrun
    if config.train.tensorboard:
        check_tensorboard()
    if config.train.steps is None and rank_and_world()[1] > 1 and not (config.out / "budget.json").exists():
        raise ValueError("train.minutes is measured by one process; under torchrun set train.steps")
    is_held_out = check_text(config.data, report)
    check_tokenizer(config, spec)
    return is_held_out


def check_text(config: DataConfig, report: Callable[[str], None]) -> bool:
    """Return whether some text is held out, and tell `report` where that is not as one would think.

    Raises ValueError where the text cannot be read, or where there is none to train on.
    """
    source_files(config)
    left_out: Counter[str] = Counter()
    if next(read_documents(config, "train", lambda name, reason: left_out.update([reason])), None) is None:
        raise ValueError(_empty(config, left_out))
    if config.held_out_share == 0:
        return False
    held_out = next(read_documents(config, "held_out"), None)
    share = f"data.held_out_share = {config.held_out_share:g}"
    if held_out is None:
        report(f"{_source(config)}: no document is held out at {share}; training without held-out text")
    elif document := only_document(config):
        report(f"{document.name} is the only document: its last {held_out.num_bytes:,} bytes are held out ({share})")
    return held_out is not None


def _source(config: DataConfig) -> str:
    return "Python's own library" if config.path is None else str(config.path)


def _empty(config: DataConfig, left_out: Counter[str]) -> str:
    reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(left_out.items()))
    share = f"data.held_out_share = {config.held_out_share:g} (0 holds nothing out)"
    remedy = "give more documents" + (f", or change {share}" if config.held_out_share else "")
    return f"{_source(config)}: no document is to train on{f', left out: {reasons}' if reasons else ''}; {remedy}"


def check_tokenizer(config: RunConfig, spec: ModelSpec) -> None:
    """Raise ValueError for a tokenizer that cannot be had, does not fit the model, or lacks tokens."""
    if (config.out / "tokenizer" / "tokenizer_config.json").exists():  # the run's own, checked when the run began
        return
    if config.tokenizer.path is None:
        check_vocabulary(spec.vocab_size)
    else:
        check_special_tokens(load_tokenizer(config.tokenizer.path, spec), config.data)
