"""Finds what is wrong with a run before anything is written: its model, text, tokenizer and place.

A mistake that is found here costs seconds, and the run file can be corrected: nothing has claimed the directory yet.
"""

from __future__ import annotations

from collections import Counter

import torch

from dovetail.atomic import check_folder
from dovetail.spec.model import ModelSpec
from dovetail.text.documents import DataConfig, read_documents, source_files
from dovetail.text.prepare import check_special_tokens
from dovetail.text.tokenizer import check_vocabulary
from dovetail.train.run.ranks import rank_and_world
from dovetail.train.run.run_file import RunConfig, build_model, load_tokenizer


def check_run(config: RunConfig, spec: ModelSpec) -> None:
    """Raise ValueError, one line, for what stands against the run; nothing is written."""
    check_folder(config.out)
    build_model(config, torch.device("meta"))  # without memory, which is enough to see that it can be built
    if config.train.steps is None and rank_and_world()[1] > 1 and not (config.out / "budget.json").exists():
        raise ValueError("train.minutes is measured by one process; under torchrun set train.steps")
    check_text(config.data)
    check_tokenizer(config, spec)


def check_text(config: DataConfig) -> None:
    """Raise ValueError where the text cannot be read, or where one of its splits would be empty."""
    source_files(config)
    for split in ("train", "held_out") if config.held_out_share else ("train",):
        left_out: Counter[str] = Counter()
        documents = read_documents(config, split, lambda name, reason, seen=left_out: seen.update([reason]))
        if next(documents, None) is None:
            raise ValueError(_empty(config, "to train on" if split == "train" else "held out", left_out))


def _empty(config: DataConfig, kind: str, left_out: Counter[str]) -> str:
    where = "Python's own library" if config.path is None else str(config.path)
    reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(left_out.items()))
    share = f"data.held_out_share = {config.held_out_share:g} (0 holds nothing out)"
    remedy = "give more documents" + (f", or change {share}" if config.held_out_share else "")
    return f"{where}: no document is {kind}{f', left out: {reasons}' if reasons else ''}; {remedy}"


def check_tokenizer(config: RunConfig, spec: ModelSpec) -> None:
    """Raise ValueError for a tokenizer that cannot be had, does not fit the model, or lacks tokens."""
    if (config.out / "tokenizer" / "tokenizer_config.json").exists():  # the run's own, checked when the run began
        return
    if config.tokenizer.path is None:
        check_vocabulary(spec.vocab_size)
    else:
        check_special_tokens(load_tokenizer(config.tokenizer.path, spec), config.data)
