"""What does not fit names its largest part, and remedies with which the same request has a plan."""

import re
from pathlib import Path

import pytest

from dovetail.planner.request import Request, answer

SERVE = {"model": "deepseek-v3", "goal": "serve", "context": "4989"}
MINE = 'name = "mine"\nlike = "{like}"\nnodes = {nodes}\n'


def message(**options: object) -> str:
    with pytest.raises(ValueError, match="no layout that was tried fits: ") as caught:
        answer(Request(**SERVE | options))  # type: ignore[arg-type]
    return str(caught.value)


def test_the_largest_part_is_named_and_the_number_of_gpus_holds_it(tmp_path: Path) -> None:
    text = message(clusters=["rtx4090-node"])
    assert "ep = 8, tp = 4 needs 102.3 GB, most of it weights (weights 93.2" in text and "rtx4090 has 24.0" in text
    (gpus,) = map(int, re.findall(r"what was tried and fits: (\d+) GPUs", text))
    (tmp_path / "mine.toml").write_text(MINE.format(like="rtx4090-node", nodes=gpus // 8), encoding="utf-8")
    answer(Request(**SERVE | {"clusters": [str(tmp_path / "mine.toml")]}))  # type: ignore[arg-type]


def test_the_pool_that_does_not_fit_is_the_one_that_grows() -> None:
    text = message(clusters=["h200-node"], decode_cluster="rtx4090-node")
    assert "a decoding GPU for 1 requests of context 4989" in text and "prefill ep = 8" in text


@pytest.mark.parametrize(
    ("change", "largest"),
    [("prefill_tokens=1000000", "activations"), ("requests_per_gpu=900", "cache")],
)
def test_work_that_is_too_much_at_once_becomes_less(change: str, largest: str) -> None:
    text = message(clusters=["h200-node"], change=[change])
    assert f"most of it {largest} (" in text
    (remedy,) = re.findall(r"--set (\w+=\d+)", text)
    assert remedy.split("=")[0] == change.split("=")[0]
    answer(Request(**SERVE | {"clusters": ["h200-node"], "change": [remedy]}))  # type: ignore[arg-type]


def test_contexts_that_are_too_long_become_shorter() -> None:
    text = message(clusters=["h200-node"], context="4M")
    (shorter,) = re.findall(r"--context (\d+)", text)
    answer(Request(**SERVE | {"clusters": ["h200-node"], "context": shorter}))  # type: ignore[arg-type]


def test_layouts_that_were_given_may_be_what_does_not_fit() -> None:
    assert "what was tried and fits: other --ep, --prefill-ep and --tp (" in message(
        clusters=["h800-2048"], ep=8, prefill_ep=8
    )


def test_weights_in_bf16_may_be_what_does_not_fit() -> None:
    text = message(clusters=["h200-node"], precision="bf16")
    assert "--precision deepseek-v3, with weights in FP8 (" in text
    answer(Request(**SERVE | {"clusters": ["h200-node"]}))  # type: ignore[arg-type]


def test_nothing_that_fits_says_what_a_gpu_would_need() -> None:
    text = message(clusters=["rtx4090-node"], precision="bf16")
    assert re.search(r"; on 288 GPUs each would need [34]\d\.\d GB, most of it weights$", text)
