"""Checkpoints that ranks write in pieces: any other cutting has every bit of them, and what is missing is named."""

from __future__ import annotations

import json
import pickle
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from checkpoints_on_ranks import (
    SHAPES,
    Cutting,
    bits,
    load,
    refused_for_one,
    save,
    save_evenly,
    saved,
    size_of,
    whole_state,
)
from rank_processes import Ranks
from torch.distributed.checkpoint import state_dict_saver
from torch.distributed.checkpoint.filesystem import FileSystemWriter

from dovetail.config import dump
from dovetail.model.transformer import Transformer, initialize
from dovetail.parallel.weights.pieces import Span
from dovetail.train.run import manifest
from dovetail.train.run.checkpoint import CheckpointError, load_checkpoint
from dovetail.train.run.run_file import RunConfig, load_weights, resolve_model

Build = Callable[..., RunConfig]
RANKS = 4
EXPERTS = "optimizer.moment1.experts"


def whole(ranks: int) -> Cutting:
    return [dict.fromkeys(SHAPES) for _ in range(ranks)]


def even(ranks: int) -> Cutting:
    """ZeRO-1: every rank has its part of every tensor, empty where there is too little."""
    parts: Cutting = [{} for _ in range(ranks)]
    for name in SHAPES:
        width = -(-size_of(name) // ranks)
        for rank, part in enumerate(parts):
            part[name] = (min(rank * width, size_of(name)), min((rank + 1) * width, size_of(name)))
    return parts


def by_name(ranks: int) -> Cutting:
    """Pipeline stages: a rank has its own tensors, whole."""
    return [{name: None for index, name in enumerate(SHAPES) if index % ranks == rank} for rank in range(ranks)]


def ragged(ranks: int, seed: int) -> Cutting:
    """Pieces that overlap, of any lengths, beside whole tensors and none."""
    draw, parts = random.Random(seed), list[dict[str, Span | None]]({} for _ in range(ranks))
    for name in SHAPES:
        cuts = [0, *sorted(draw.randint(0, size_of(name)) for _ in range(ranks - 1)), size_of(name)]
        order = draw.sample(range(ranks), ranks)
        for index, rank in enumerate(order):
            overlap = draw.choice([0, 0, 3])
            parts[rank][name] = (max(0, cuts[index] - overlap), cuts[index + 1])
        if draw.random() < 0.3:
            parts[order[0]][name] = None
    return parts


CUTTINGS = {10: whole(RANKS), 20: even(RANKS), 30: by_name(RANKS), 40: ragged(RANKS, 0), 50: ragged(RANKS, 1)}


def check_whole(path: Path) -> None:
    state = whole_state(99)
    step = load_checkpoint(path, state)["step"]
    assert bits(state) == bits(whole_state(step))


def test_any_cutting_reads_any_other(ranks: Ranks, two: Ranks, tmp_path: Path) -> None:
    assert ranks.run(save, tmp_path / "run", CUTTINGS) == [[]] * RANKS
    assert saved(tmp_path / "run") == ["step-00000030", "step-00000040", "step-00000050"]  # the newest three
    assert ranks.run(save, tmp_path / "more", {10: CUTTINGS[10], 20: CUTTINGS[20]}) == [[]] * RANKS
    for path in (*(tmp_path / "run").iterdir(), *(tmp_path / "more").iterdir()):
        check_whole(path)
        assert ranks.run(load, path, [*CUTTINGS.values(), ragged(RANKS, 2)]) == [[]] * RANKS
        assert two.run(load, path, [whole(2), even(2), by_name(2), ragged(2, 3)]) == [[]] * 2
        written = sum((path / f"__{rank}_0.distcp").exists() for rank in range(RANKS))
        assert written == RANKS


def test_each_element_is_written_once(ranks: Ranks, tmp_path: Path) -> None:
    """Replicas cost no room: what four ranks write in whole tensors is what they write in pieces of them."""
    ranks.run(save, tmp_path, {40: CUTTINGS[40]})
    path = tmp_path / "step-00000040"
    metadata = pickle.loads((path / ".metadata").read_bytes())
    for name, (shape, dtype) in SHAPES.items():
        tensor = metadata.state_dict_metadata[name]
        assert (tuple(tensor.size), tensor.properties.dtype) == (shape, dtype)
        assert sum(chunk.sizes.numel() for chunk in tensor.chunks) == size_of(name)
    about = json.loads((path / "manifest.json").read_text())
    assert about["tensors"][EXPERTS] == "bfloat16 [6, 5, 7]"
    assert about["tensors"].keys() == SHAPES.keys()


def with_change(cutting: Cutting, change: Callable[[dict[str, Span | None]], object], rank: int = 2) -> Cutting:
    changed = [dict(part) for part in cutting]
    change(changed[rank])
    return changed


def test_a_gap_is_refused_by_all_ranks_and_leaves_nothing(ranks: Ranks, tmp_path: Path) -> None:
    lost = with_change(even(RANKS), lambda part: part.pop(EXPERTS))
    short = with_change(even(RANKS), lambda part: part.update({EXPERTS: (107, 159)}))
    refused = ranks.run(save, tmp_path, {10: lost, 20: short, 30: even(RANKS)})
    assert refused == [refused[0]] * RANKS
    words = [f"no rank holds elements {gap} of {EXPERTS}, bfloat16 [6, 5, 7]" for gap in ("106 to 158", "106 to 106")]
    assert len(refused[0]) == 2 and all(each in line for each, line in zip(words, refused[0], strict=True))
    assert saved(tmp_path) == ["step-00000030"]  # without a gap
    check_whole(tmp_path / "step-00000030")


def test_a_rank_that_fails_while_it_writes(ranks: Ranks, tmp_path: Path) -> None:
    assert ranks.run(save, tmp_path, {10: even(RANKS)}) == [[]] * RANKS
    refused = ranks.run(save, tmp_path, {20: even(RANKS)}, 2)
    assert all("rank 2: OSError: the disk is full" in line for [line] in refused)
    assert saved(tmp_path) == ["step-00000010"]


def test_directories_that_ranks_do_not_share(ranks: Ranks, tmp_path: Path) -> None:
    refused = ranks.run(save, tmp_path, {10: even(RANKS)}, None, False)
    assert all("__1_0.distcp is not there" in line and "one directory to all ranks" in line for [line] in refused)
    assert saved(tmp_path / "0") == []


def test_what_does_not_fit_is_refused_by_all_ranks(ranks: Ranks, tmp_path: Path) -> None:
    ranks.run(save, tmp_path, {10: even(RANKS)})
    path = tmp_path / "step-00000010"
    lost = with_change(even(RANKS), lambda part: part.update({EXPERTS: (106, 110)}))
    fewer = [{name: span for name, span in part.items() if name != EXPERTS} for part in even(RANKS)]
    found = ranks.run(load, path, [lost, fewer, by_name(RANKS)])
    assert found == [found[0]] * RANKS
    assert found[0] == [
        f"ValueError: {path}: no rank holds elements 110 to 158 of {EXPERTS}, bfloat16 [6, 5, 7]",
        f"ValueError: {path}: 1 tensors are not in the state: {EXPERTS}; was the model changed?",
    ]
    assert ranks.run(load, path, [lost, fewer], True) == [[]] * RANKS
    ranks.run(save, tmp_path, {20: fewer})
    found = ranks.run(load, tmp_path / "step-00000020", [by_name(RANKS)])  # one rank has that tensor
    assert found == [found[0]] * RANKS and f"1 tensors are not in the checkpoint: {EXPERTS}" in found[0][0]


def test_what_is_wrong_on_one_rank_is_heard_by_all(ranks: Ranks, tmp_path: Path) -> None:
    ranks.run(save, tmp_path / "run", {10: even(RANKS)})
    said = ranks.run(refused_for_one, tmp_path / "none", tmp_path / "run" / "step-00000010")
    words = "state 'buffers.count' is a int, not a tensor or a Piece; plain values belong in `extra`"
    assert said == [2 * [f"rank 3: ValueError: {words}"]] * RANKS
    assert saved(tmp_path / "none") == []


def test_what_is_missing_from_the_disk_is_named(ranks: Ranks, tmp_path: Path) -> None:
    ranks.run(save, tmp_path, {10: even(RANKS), 20: even(RANKS)})
    path = tmp_path / "step-00000010"
    (path / "__2_0.distcp").unlink()
    found = ranks.run(load, path, [even(RANKS)])
    assert found == [[f"CheckpointError: {path}: damaged checkpoint (__2_0.distcp: No such file or directory)"]] * RANKS

    path = tmp_path / "step-00000020"
    metadata = pickle.loads((path / ".metadata").read_bytes())
    chunks = metadata.state_dict_metadata[EXPERTS].chunks
    chunks[:] = [chunk for chunk in chunks if chunk.offsets[0] != 3]
    (path / ".metadata").write_bytes(pickle.dumps(metadata))
    manifest.write(path, {each.name: manifest.fingerprint(each) for each in path.iterdir() if each.name[0] != "m"}, {})
    words = rf"damaged checkpoint \(elements 105 to 139 of {EXPERTS}, bfloat16 \[6, 5, 7\], are not in it\)"
    with pytest.raises(CheckpointError, match=words):
        check_whole(path)
    found = ranks.run(load, path, [even(RANKS)])
    assert found == [found[0]] * RANKS and "elements 105 to 139" in found[0][0]


def test_a_checkpoint_of_before_pieces(ranks: Ranks, tmp_path: Path) -> None:
    """It was written by the library's own planner, and its manifest does not list tensors."""
    path = tmp_path / "step-00000010"
    with pytest.warns(UserWarning, match="single process"):
        state_dict_saver.save(whole_state(10), storage_writer=FileSystemWriter(path), no_dist=True)
    (path / "extra.json").write_text('{"step": 10}')
    manifest.write(path, {each.name: manifest.fingerprint(each) for each in path.iterdir()}, {"step": 10})
    check_whole(path)
    assert ranks.run(load, path, [whole(RANKS), even(RANKS), ragged(RANKS, 4)]) == [[]] * RANKS


def test_the_weights_of_a_run_that_ranks_wrote(ranks: Ranks, tmp_path: Path, text: Path, tiny_run: Build) -> None:
    config = tiny_run(tmp_path / "run", text, dtype="float32")
    model = Transformer(resolve_model(config.model), dtype=torch.float32)
    initialize(model, 0)
    config.out.mkdir()
    (config.out / "run.toml").write_text(dump(config))
    masters = {f"optimizer.master.{name}": each.detach() for name, each in model.named_parameters()}
    buffers = {f"buffers.{name}": each for name, each in model.named_buffers()}
    assert ranks.run(save_evenly, config.out / "checkpoints", 10, {**masters, **buffers}) == [None] * RANKS
    weights, _, step = load_weights(config.out)
    assert step == 10 and weights.keys() == model.state_dict().keys()
    assert all(torch.equal(weights[name], each) for name, each in model.state_dict().items())
