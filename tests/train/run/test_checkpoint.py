import os
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dovetail.train.run.checkpoint import Checkpointer, CheckpointError, latest, load_checkpoint, step_of

pytestmark = pytest.mark.filterwarnings("error")


def make_state(seed: int = 0) -> dict[str, Any]:
    torch.manual_seed(seed)
    return {
        "master": {"layers": {"0.weight": torch.randn(7, 5)}, "norm": torch.randn(3)},
        "moments": {"first": torch.randn(7, 5).bfloat16(), "second": torch.randn(5, 7).bfloat16().t()},
        "count": {"consumed": torch.tensor(2**53 + 1), "loads": torch.arange(4)},
        "empty": torch.zeros(0, 3),
        "bits": torch.tensor([float("nan"), float("-inf"), -0.0, 1e-42]),
    }


def leaves(state: dict[str, Any]) -> Iterator[Tensor]:
    for leaf in state.values():
        if isinstance(leaf, Tensor):
            yield leaf
        else:
            yield from leaves(leaf)


def bits(state: dict[str, Any]) -> list[bytes]:
    return [leaf.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() for leaf in leaves(state)]


def saved(root: Path) -> list[str]:
    return sorted(os.listdir(root))


def write(root: Path, steps: list[int], keep: int = 3) -> None:
    with closing(Checkpointer(root, keep)) as checkpointer:
        for step in steps:
            checkpointer.save(step, make_state(step), {"step": step}).wait()


def check_loads(path: Path) -> int:
    state = make_state(99)
    step = load_checkpoint(path, state)["step"]
    assert isinstance(step, int)
    assert step == step_of(path)
    assert bits(state) == bits(make_state(step))
    return step


def test_every_bit_comes_back(tmp_path: Path) -> None:
    state, extra = make_state(1), {"rng": [1, 2], "name": "run", "rate": 0.1}
    with closing(Checkpointer(tmp_path)) as checkpointer:
        path = checkpointer.save(12, state, extra).wait()
    assert (path, latest(tmp_path), step_of(path)) == (tmp_path / "step-00000012", path, 12)
    loaded = make_state(2)
    assert bits(loaded) != bits(state)
    assert load_checkpoint(path, loaded) == extra
    assert bits(loaded) == bits(state)
    assert [leaf.dtype for leaf in leaves(loaded)] == [leaf.dtype for leaf in leaves(state)]


def test_tensors_may_change_once_save_returns(tmp_path: Path) -> None:
    state = make_state(1)
    with closing(Checkpointer(tmp_path)) as checkpointer:
        for step in range(1, 4):
            before = bits(state)
            save = checkpointer.save(step, state)
            for leaf in leaves(state):
                leaf.add_(1)
            loaded = make_state(2)
            load_checkpoint(save.wait(), loaded)
            assert bits(loaded) == before


def test_views_of_one_buffer_and_parameters(tmp_path: Path) -> None:
    flat = torch.arange(12.0)
    state = {"a": flat[:4].view(2, 2), "b": torch.nn.Parameter(flat[4:].clone())}
    with closing(Checkpointer(tmp_path)) as checkpointer:
        path = checkpointer.save(1, state).wait()
    loaded = {"a": torch.zeros(2, 2), "b": torch.zeros(8)}
    load_checkpoint(path, loaded)
    assert torch.equal(loaded["a"], state["a"])
    assert torch.equal(loaded["b"], state["b"])


def test_host_buffers_are_reused(tmp_path: Path) -> None:
    state = {"weight": torch.randn(64, 64), "moment": torch.randn(64, 64).bfloat16()}
    with closing(Checkpointer(tmp_path)) as checkpointer:
        addresses = []
        stage = checkpointer._stager.stage

        def watched(flat: dict[str, Tensor]) -> Any:
            staged: Any = stage(flat)
            addresses.append([tensor.data_ptr() for tensor in staged.values()])
            return staged

        checkpointer._stager.stage = watched  # type: ignore[method-assign, assignment]
        for step in range(1, 4):
            checkpointer.save(step, state)
    assert addresses[0] == addresses[1] == addresses[2]
    assert not set(addresses[0]) & {tensor.data_ptr() for tensor in state.values()}


def test_newest_are_kept(tmp_path: Path) -> None:
    write(tmp_path, [5, 10, 15, 20, 100_000_000_000], keep=2)
    assert saved(tmp_path) == ["step-00000020", "step-100000000000"]
    assert latest(tmp_path) == tmp_path / "step-100000000000"


def test_a_rewound_run_keeps_its_own_newest(tmp_path: Path) -> None:
    write(tmp_path, [10, 20, 30])
    write(tmp_path, [12, 14], keep=2)  # a count over all steps would keep 20 and 30 and drop what was just written
    assert saved(tmp_path) == ["step-00000012", "step-00000014", "step-00000020", "step-00000030"]
    write(tmp_path, [20], keep=2)
    assert saved(tmp_path) == ["step-00000014", "step-00000020", "step-00000030"]


def test_same_step_again_replaces(tmp_path: Path) -> None:
    write(tmp_path, [10])
    with closing(Checkpointer(tmp_path)) as checkpointer:
        checkpointer.save(10, make_state(77), {"step": 10}).wait()
    state = make_state(99)
    load_checkpoint(tmp_path / "step-00000010", state)
    assert bits(state) == bits(make_state(77))
    assert saved(tmp_path) == ["step-00000010"]


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("harm", "problem"),
    [
        (lambda path: flip_a_bit(path / "__0_0.distcp"), "__0_0.distcp does not match its SHA-256"),
        (lambda path: flip_a_bit(path / ".metadata"), ".metadata does not match its SHA-256"),
        (lambda path: (path / "extra.json").write_text('{ "step": 40 }'), "extra.json has"),
        (lambda path: os.truncate(path / "__0_0.distcp", 100), "__0_0.distcp has 100 of"),
        (lambda path: (path / "__0_0.distcp").unlink(), "__0_0.distcp: No such file"),
        (lambda path: (path / "manifest.json").unlink(), "manifest.json: No such file"),
        (lambda path: (path / "manifest.json").write_text("{"), "manifest.json is not readable"),
        (lambda path: (path / "manifest.json").write_text("[]"), "manifest.json is not readable"),
    ],
)
def test_damage_is_named_and_passed_over(tmp_path: Path, harm: Callable[[Path], object], problem: str) -> None:
    write(tmp_path, [10, 20])
    harm(tmp_path / "step-00000020")
    with pytest.warns(UserWarning, match=f"step-00000020: damaged checkpoint passed over .{problem}"):
        assert latest(tmp_path) == tmp_path / "step-00000010"
    state = make_state(99)
    before = bits(state)
    with pytest.raises(CheckpointError, match=problem):
        load_checkpoint(tmp_path / "step-00000020", state)
    assert bits(state) == before
    check_loads(tmp_path / "step-00000010")


def test_nothing_to_resume_from(tmp_path: Path) -> None:
    assert latest(tmp_path) is None
    assert latest(tmp_path / "absent") is None
    (tmp_path / ".step-00000010.partial").mkdir()
    (tmp_path / "notes").mkdir()
    assert latest(tmp_path) is None
    with pytest.raises(ValueError, match="not the name of a checkpoint"):
        step_of(tmp_path)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda state: state.pop("empty"), "1 tensors are not in the state: empty"),
        (lambda state: state.update(ema=torch.zeros(2)), "1 tensors are not in the checkpoint: ema"),
        (lambda state: state.update(bits=torch.zeros(5)), r"bits is float32 \[4\] in the checkpoint and float32 \[5\]"),
        (
            lambda state: state.update(bits=torch.zeros(4).bfloat16()),
            r"float32 \[4\] in the checkpoint and bfloat16",
        ),
    ],
)
def test_another_model_is_refused(tmp_path: Path, change: Callable[[Any], object], problem: str) -> None:
    write(tmp_path, [10])
    state = make_state(99)
    change(state)
    before = bits(state)
    with pytest.raises(ValueError, match=problem):
        load_checkpoint(tmp_path / "step-00000010", state)
    assert bits(state) == before


def test_a_part_can_be_loaded_when_asked_for(tmp_path: Path) -> None:
    write(tmp_path, [10])
    part = {"master": make_state(99)["master"]}
    assert load_checkpoint(tmp_path / "step-00000010", part, partial=True) == {"step": 10}
    assert bits(part) == bits({"master": make_state(10)["master"]})
    with pytest.raises(ValueError, match="1 tensors are not in the checkpoint: ema"):
        load_checkpoint(tmp_path / "step-00000010", {"ema": torch.zeros(2)}, partial=True)


def test_only_tensors_and_json(tmp_path: Path) -> None:
    with closing(Checkpointer(tmp_path)) as checkpointer:
        with pytest.raises(ValueError, match=r"'count.step' is a int, not a tensor or a Piece"):
            checkpointer.save(1, {"count": {"step": 3}})
        with pytest.raises(ValueError, match=r"'a.b' is there twice"):
            checkpointer.save(1, {"a": {"b": torch.zeros(1)}, "a.b": torch.zeros(1)})
        with pytest.raises(TypeError, match="JSON"):
            checkpointer.save(1, {"a": torch.zeros(1)}, {"tensor": torch.zeros(1)})
    with pytest.raises(ValueError, match="keep = 0"):
        Checkpointer(tmp_path, keep=0)
    assert saved(tmp_path) == []
