"""Expert exchanges of a question: sizes of published kernels, tokens counted by hand, recordings that do not fit."""

from pathlib import Path

import numpy as np
import pytest

from dovetail.catalog.fabrics import load_fabric
from dovetail.network.ask.expert_traffic import check_exchange, exchange_demand, recorded_tokens, zipf
from dovetail.network.ask.jobs import check_task
from dovetail.network.ask.question import Question
from dovetail.network.fabric.topology import build

FABRIC = build(load_fabric("mpft", 512))


def question(**changes: object) -> Question:
    return Question(**({"fabrics": ("mpft",), "collective": "dispatch"} | changes))  # type: ignore[arg-type]


def recording(folder: Path, values: object) -> str:
    path = folder / "chosen.npy"
    np.save(path, np.asarray(values))
    return str(path)


@pytest.mark.parametrize(
    ("name", "mode", "precision", "size"),
    [
        ("dispatch", "normal", None, 7168 + 56 * 4 + 8 * 8),  # FP8, scales, ids and weights
        ("dispatch", "low-latency", None, 7168 + 56 * 4 + 16),  # [DeepEP]
        ("dispatch", "low-latency", "bf16", 2 * 7168 + 16),
        ("combine", "normal", None, 2 * 7168),
        ("combine", "low-latency", "combine-logfmt-8", 7168 + 4 * 56),
    ],
)
def test_a_copy_has_the_bytes_of_the_recipe(name: str, mode: str, precision: str | None, size: float) -> None:
    asked = question(collective=name, mode=mode, precision=precision)
    demand, copies = exchange_demand(asked, name, FABRIC, 16, 3)
    assert copies.bytes_per_copy == size and demand.size == 3 * size and demand.name == name


def test_copies_of_a_recording_are_those_counted_by_hand(tmp_path: Path) -> None:
    """Two nodes of 8, 16 experts of each GPU: GPU 0 has one token for its own expert, for two of GPU 1 and for one of
    GPU 9; all others have none."""
    chosen = np.full((16, 1, 8), -1)
    chosen[0, 0, :4] = [0, 16, 17, 9 * 16]
    path = recording(tmp_path, chosen)
    asked = question(recorded=path)
    assert recorded_tokens(asked) == 1
    _, copies = exchange_demand(asked, "dispatch", FABRIC, 16, 1)
    assert copies.across_nodes == pytest.approx(1 / 16)  # to GPU 8, once
    assert copies.within_nodes == pytest.approx(2 / 16)  # 0 to 1, 8 to 9
    assert copies.busiest_gpu == pytest.approx(2 / (4 / 16))  # two of four rows are on GPU 1
    assert copies.counted_bytes == pytest.approx(2 / 16 * copies.bytes_per_copy)  # both nodes
    _, direct = exchange_demand(question(recorded=path, mode="low-latency"), "dispatch", FABRIC, 16, 1)
    assert direct.across_nodes == pytest.approx(1 / 16) and direct.within_nodes == pytest.approx(2 / 16)
    assert direct.counted_bytes == pytest.approx(4 / 16 * direct.bytes_per_copy)


def test_a_drawn_token_reaches_at_most_four_nodes() -> None:
    """The model's own gate: 4 of 8 groups, which are the nodes of 64 GPUs [V3 §2.1.2]."""
    _, copies = exchange_demand(question(), "dispatch", FABRIC, 64, 64)
    assert 3.2 < copies.across_nodes < 4 and 6 < copies.within_nodes < 8
    _, alone = exchange_demand(question(), "dispatch", FABRIC, 8, 64)
    assert alone.across_nodes == 0 and alone.counted_bytes / alone.bytes_per_copy / 64 < 8


def test_skew_makes_one_gpu_busier() -> None:
    even, skewed, more = (
        exchange_demand(question(skew=skew), "dispatch", FABRIC, 16, 256)[1].busiest_gpu for skew in (0.0, 0.5, 1.0)
    )
    assert 1 <= even < 1.1 < skewed < more
    assert sorted(zipf(4, 1.0, 0), reverse=True) == pytest.approx([1, 1 / 2, 1 / 3, 1 / 4])
    assert not np.array_equal(zipf(64, 1.0, 0), zipf(64, 1.0, 1))


def test_the_same_seed_draws_the_same() -> None:
    one, other, third = (exchange_demand(question(seed=seed), "dispatch", FABRIC, 8, 16)[0] for seed in (0, 0, 1))
    assert np.array_equal(one.steps[0].flows.bytes, other.steps[0].flows.bytes)
    assert not np.array_equal(one.steps[0].flows.bytes, third.steps[0].flows.bytes)


@pytest.mark.parametrize(
    ("gpus", "nearest"), [(48, "--gpus 32"), (512, "--gpus 256"), (12, "--gpus 8"), (3, "--gpus 2")]
)
def test_experts_are_split_evenly(gpus: int, nearest: str) -> None:
    with pytest.raises(ValueError, match=f"gpus = {gpus}: the 256 experts of deepseek-v3 .* {nearest} is nearest"):
        check_exchange(question(), "dispatch", FABRIC, gpus, 64)


def test_more_tokens_than_can_be_drawn_are_refused_with_how_many_can() -> None:
    asked = question(tokens=(128,))
    with pytest.raises(
        ValueError, match=r"tokens = 100000000 for each of 16 GPUs: .* more than 4: use (\d+) at most"
    ) as error:
        check_exchange(asked, "dispatch", FABRIC, 16, 10**8)
    most = int(str(error.value).split("use ")[1].split()[0])
    check_exchange(asked, "dispatch", FABRIC, 16, most)
    with pytest.raises(ValueError, match="at most"):
        check_exchange(asked, "dispatch", FABRIC, 16, most + 1)


def test_models_without_experts_have_no_dispatch() -> None:
    with pytest.raises(ValueError, match="llama-3.1-405b has no experts"):
        check_exchange(question(model="llama-3.1-405b"), "dispatch", FABRIC, 16, 64)


@pytest.mark.parametrize(("gpus", "most"), [(8, 645277), (256, 26214)])
def test_no_more_tokens_are_drawn_than_memory_has_room_for(gpus: int, most: int) -> None:
    check_exchange(question(), "dispatch", FABRIC, gpus, most)
    with pytest.raises(ValueError, match=f"more than 4: use {most} at most"):
        check_exchange(question(), "dispatch", FABRIC, gpus, most + 1)
    with pytest.raises(ValueError, match="tokens = 900000 for each of 8 GPUs"):
        check_task(question(collective="all-to-all", beside="combine:900000"), "combine", FABRIC, 8)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.zeros((8, 5, 8), int), "holds 5 tokens of 8 GPUs, but 5 of 16 are asked for: use --gpus 8"),
        (np.full((16, 1, 8), 256), "experts 256 to 256, but deepseek-v3 has 0 to 255"),
        (np.zeros((16, 1, 4), int), "holds 4 choices of a token, but deepseek-v3 makes 8: give the --model"),
        (np.full((16, 1, 8), 7), "a token has the same expert twice"),
        (np.full((16, 1, 8), -2), "experts -2 to -2"),
        (np.zeros((16, 8), int), "expected whole numbers .GPUs, tokens, choices."),
        (np.zeros((16, 1, 8)), "holds float64 of shape .16, 1, 8."),
    ],
)
def test_recordings_that_do_not_fit(tmp_path: Path, values: np.ndarray, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        check_exchange(question(recorded=recording(tmp_path, values)), "dispatch", FABRIC, 16, values.shape[1])
    assert "\n" not in str(error.value) and "chosen.npy" in str(error.value)


def test_what_runs_beside_a_recording_has_its_tokens(tmp_path: Path) -> None:
    path = recording(tmp_path, np.tile(np.arange(8), (16, 5, 1)))
    asked = question(recorded=path, beside="combine:7")
    with pytest.raises(ValueError, match="holds 5 tokens of 16 GPUs, but 7 of 16 are asked for: use 5 tokens"):
        check_task(asked, "combine", FABRIC, 16)


def test_recordings_that_are_none(tmp_path: Path) -> None:
    path = tmp_path / "text.npy"
    path.write_text("not a recording")
    for name in (path, tmp_path / "none.npy"):
        with pytest.raises(ValueError, match="cannot be read as .npy"):
            recorded_tokens(question(recorded=str(name)))
