"""What is wrong with a request is found before anything is searched; the keys of figures are known beforehand."""

from pathlib import Path

import pytest

from dovetail.planner import request as requests
from dovetail.planner.figure_keys import KEYS
from dovetail.planner.report import html
from dovetail.planner.request import Request, answer

TRAIN = {"model": "deepseek-v3", "clusters": ["h800-2048"], "goal": "train", "batch": "15360"}
SERVE = {"model": "deepseek-v3", "clusters": ["h800-2048"], "goal": "serve", "context": "4989"}
DENSE = (
    "vocab_size = 4096\nhidden_size = 512\nnum_hidden_layers = 4\nintermediate_size = 1024\nnum_attention_heads = 8\n"
    "kv_lora_rank = 128\nqk_nope_head_dim = 64\nqk_rope_head_dim = 32\nv_head_dim = 64\n"
)


def keys(**options: object) -> set[str]:
    (choice,) = answer(Request(**options)).choices
    return {figure.key for figure in choice.figures()}


def test_the_keys_that_are_listed_are_those_of_plans(tmp_path: Path) -> None:
    dense = tmp_path / "dense.toml"
    dense.write_text(DENSE, encoding="utf-8")
    fixed = {"pp": 16, "ep": 64, "tp": 1, "schedule": "dualpipe", "tokens": "14.8T"}
    small = {"model": str(dense), "clusters": ["h200-node"], "gpus": 1, "schedule": "1f1b"}
    assert keys(**TRAIN, **fixed) | keys(**TRAIN | small | {"batch": "16"}) == set(KEYS["train"])
    assert keys(**SERVE, ep=144, prefill_ep=32, output_length="1211") == set(KEYS["serve"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (TRAIN | {"explain": "step_tim"}, "no figure 'step_tim' to explain; did you mean step_time"),
        (TRAIN | {"explain": "decode.tpot"}, "no figure 'decode.tpot' to explain; known: step_time"),
        (SERVE | {"explain": "decode.tpod"}, "did you mean decode.tpot"),
        (TRAIN | {"clusters": ["h800-2048", "h80"]}, "no cluster 'h80'"),
        (TRAIN | {"clusters": ["h800-2048", "h200-node"], "gpus": 64}, "--gpus 64: h200-node has 8"),
        (TRAIN | {"precision": "fp7"}, "'fp7' is no precision recipe"),
        (TRAIN | {"vary": ["topk_grop=2,4"]}, "did you mean topk_group"),
        (TRAIN | {"network": "simulate", "fabric": "mpff"}, "no fabric 'mpff'"),
        (SERVE | {"network": "simulate", "fabric": "mpff"}, "no fabric 'mpff'"),
        (SERVE | {"network": "simulate", "fail": ["plan:3"]}, "did you mean plane"),
        (SERVE | {"network": "simulate", "routing": "adptive"}, "did you mean adaptive"),
        (SERVE | {"decode_cluster": "h80"}, "no cluster 'h80'"),
        (SERVE | {"change": ["cache_hits=1"]}, "did you mean cache_hit"),
    ],
)
def test_mistakes_are_found_before_a_search(
    options: dict[str, object], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for search in ("search_all", "best_pools"):
        monkeypatch.setattr(requests, search, lambda *arguments, **named: pytest.fail("searched first"))
    with pytest.raises(ValueError, match=message):
        answer(Request(**options))  # type: ignore[arg-type]


def test_files_that_cannot_be_written_are_found_before_a_search(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    for path, message in (
        (tmp_path / "nowhere" / "plan.html", "there is no folder"),
        (tmp_path, "is a directory; give the name of a file"),
        (tmp_path / "file" / "plan.html", "there is no folder"),
    ):
        with pytest.raises(ValueError, match=f"^--html .*{message}"):
            html.check(Request(**TRAIN), path, None)
    two = Request(**TRAIN | {"clusters": ["h800-2048", "h200-node"]})
    for request in (two, Request(**SERVE)):
        with pytest.raises(ValueError, match="--trace is the timeline of a training step on one cluster"):
            html.check(request, None, tmp_path / "step.json")
