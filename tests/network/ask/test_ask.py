"""Answers against closed forms, and what a user is told."""

import json
import re
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
from balanced_collectives import all_to_all_seconds

from dovetail.catalog.fabrics import load_fabric
from dovetail.network.ask import ask as asking
from dovetail.network.ask import pictures, report
from dovetail.network.ask.answer import Answer
from dovetail.network.ask.ask import ask
from dovetail.network.ask.jobs import task_of
from dovetail.network.ask.question import Question, changes_of
from dovetail.network.delivery.memory import needed_bytes
from dovetail.network.delivery.symmetry import classes_of
from dovetail.network.fabric.price import bill
from dovetail.network.fabric.topology import build
from dovetail.network.flows.failures import parse_failure, random_links
from dovetail.network.flows.simulation import Change
from dovetail.network.routing.route import Adaptive, Ecmp

GIB = 2.0**30


def answer_to(*fabrics: str, gpus: int | None = 64, size: float = GIB, **changes: object) -> Answer:
    given = {"fabrics": fabrics, "sizes": (size,), "gpu_counts": (gpus,)} | changes
    return ask(Question(**given))  # type: ignore[arg-type]


def text_of(answer: Answer) -> str:
    cells = [cell for _, header, rows in report.tables(answer) for row in (header, *rows) for cell in row]
    return "\n".join([*cells, *report.notes(answer)])


@pytest.mark.parametrize(
    ("name", "gpus", "is_folded"),
    [("mpft", 256, True), ("mpft", 2048, True), ("mpft", 24, True), ("mpft", 8, False), ("mrft", 2048, True)],
)
def test_all_to_all_is_folded_where_nodes_are_alike(name: str, gpus: int, is_folded: bool) -> None:
    (case,) = answer_to(name, gpus=gpus).cases
    seconds = all_to_all_seconds(build(load_fabric(name)), gpus, GIB)
    assert case.healthy.is_folded == is_folded
    assert case.healthy.seconds == pytest.approx(seconds, rel=1e-9)
    assert case.healthy.algorithm_bandwidth == pytest.approx(GIB / seconds, rel=1e-9)
    assert case.healthy.bus_bandwidth == pytest.approx(GIB / seconds * (gpus - 1) / gpus, rel=1e-9)


@pytest.mark.parametrize(
    ("name", "gpus", "endpoints", "size", "failures"),
    [
        ("mrft", 500, 2048, GIB, ()),
        ("mrft", 500, 2048, 2.0**20, ()),
        ("mpft", 300, 512, 0.0, ()),
        ("mpft", 300, 512, GIB, ("plane:3", "nic:17@0.01")),
        ("mpft", 300, 512, 2.0**20, ("plane:3",)),
        ("ft3", 256, 2048, GIB, ("switch:0", "nic:70")),
    ],
)
def test_folded_and_not_are_one(name: str, gpus: int, endpoints: int, size: float, failures: tuple[str, ...]) -> None:
    (case,) = answer_to(name, gpus=gpus, endpoints=endpoints, failures=failures, size=size).cases
    folded, fabric = (*case.failed, case.healthy)[0], build(load_fabric(name, endpoints))
    question = Question(fabrics=(name,), sizes=(size,), failures=failures)
    job = asking.Job(question=question, fabric=fabric, gpus=gpus, trials=[], lacks="", ways=(None,))
    task = task_of(question, "all-to-all", fabric, gpus, size)
    whole = asking._simulated(job, task, changes_of(question, fabric))
    assert folded.is_folded and folded.flows < (gpus**2 - gpus) / 3
    for one, other in ((folded, whole), (folded.cut_off, whole.cut_off)):
        for field in fields(one):
            if field.name not in ("flows", "links", "is_folded", "cut_off"):
                assert getattr(one, field.name) == pytest.approx(getattr(other, field.name), rel=1e-9), field.name
    assert folded.cut_off.flows == whole.cut_off.flows
    assert len(folded.links) == len(whole.links)
    uses = {each.name: each for each in whole.links}
    for each in folded.links:
        assert each.links == uses[each.name].links
        assert each.mean_use == pytest.approx(uses[each.name].mean_use, rel=1e-9)
        assert each.busiest_use == pytest.approx(uses[each.name].busiest_use, rel=1e-9)


def test_nothing_is_called_folded_that_is_not() -> None:
    """On one plane the loads of links tell all; with so many cables lost hardly two nodes are alike."""
    answer = answer_to("dragonfly", gpus=256, endpoints=256)
    assert not answer.cases[0].healthy.is_folded and answer.cases[0].healthy.flows == 0
    assert "symmetry" not in text_of(answer) and "no flows were simulated" in text_of(answer)
    answer = answer_to("mpft", gpus=64, random_failures=("1%",))
    assert answer.cases[0].failed[0].is_folded
    assert "flows that are alike by symmetry were simulated as one\n" in text_of(answer)
    answer = answer_to("mpft", gpus=64, random_failures=("50%",))
    assert answer.cases[0].healthy.is_folded and not answer.cases[0].failed[0].is_folded
    assert "by symmetry were simulated as one, where there are any" in text_of(answer)


@pytest.mark.parametrize(
    ("collective", "rounds"), [("all-gather", 1), ("reduce-scatter", 1), ("all-reduce", 2), ("tree-all-reduce", 2)]
)
def test_bus_bandwidth_is_nccl_tests(collective: str, rounds: int) -> None:
    (case,) = answer_to("mpft", gpus=32, collective=collective, routing="static").cases
    assert case.healthy.algorithm_bandwidth == pytest.approx(GIB / case.healthy.seconds)
    assert case.healthy.bus_bandwidth == pytest.approx(rounds * 31 / 32 * GIB / case.healthy.seconds)
    # Eight rings leave a node through eight NICs, so no NIC bounds them to less than NVLink does.
    assert case.healthy.bus_bandwidth < 8 * 40e9


def test_busy_links_are_those_that_carry_the_bytes() -> None:
    """NICs send 56 of 64 parts at 40 GB/s; NVLink takes 7, and 7/8 of 56 to be forwarded, at 160 GB/s."""
    (case,) = answer_to("mpft").cases
    uses = {each.name: each for each in case.healthy.links}
    part, seconds = GIB / 64, case.healthy.seconds
    assert case.healthy.links[0].name in ("GPU to leaf", "leaf to GPU")
    assert uses["GPU to leaf"].mean_use == pytest.approx(56 * part / 40e9 / seconds)
    assert uses["GPU to NVLink hub"].busiest_use == pytest.approx((7 + 7 / 8 * 56) * part / 160e9 / seconds)
    assert uses["GPU to leaf"].links == uses["GPU to NVLink hub"].links == 64
    assert "spine to leaf" not in uses  # eight nodes are on the same leaves
    assert uses["GPU to leaf"].busiest_name.startswith("GPU ") and " of plane " in uses["GPU to leaf"].busiest_name


def test_small_messages_are_latency() -> None:
    (case,) = answer_to("mpft", size=0.0).cases
    assert case.healthy.latency_share == 1 and case.healthy.bus_bandwidth == 0
    # [ISCA Table 5]: one leaf, after NVLink; 56 messages are posted, the first of them in that time.
    assert case.healthy.seconds == pytest.approx((2.8 + 3.33 + 55 * 0.25) * 1e-6)
    assert "$" in text_of(answer_to("mpft", size=0.0))


def test_one_of_eight_planes_takes_an_eighth() -> None:
    (case,) = answer_to("mpft", gpus=512, failures=("plane:3",)).cases
    (failed,) = case.failed
    assert failed.is_folded and case.bandwidth_lost and case.time_added
    # But for the latency, which is that of 26 ms.
    assert case.bandwidth_lost.mean == pytest.approx(1 / 8, abs=2e-4)
    assert case.time_added.mean == pytest.approx(1 / 7, abs=2e-4)
    assert failed.bus_bandwidth == pytest.approx(case.healthy.bus_bandwidth * (1 - case.bandwidth_lost.mean))


def test_a_failure_takes_the_longer_the_later_routes_avoid_it() -> None:
    """And nothing at all where it comes too late, which is said."""
    times = []
    for failure, wait in (("plane:3", 0.0), ("plane:3@0.01", 0.0), ("plane:3@0.01", 0.5), ("plane:3@9", 0.0)):
        answer = answer_to("mpft", failures=(failure,), reroute_seconds=wait)
        (case,) = answer.cases
        times.append(case.failed[0].seconds)
    at_once, soon, waited, late = times
    assert late < soon < at_once < waited
    assert waited > 0.5
    assert case.time_added and case.time_added.mean == 0
    assert "1 of 1 failures came only after everything had arrived" in text_of(answer)


def test_what_is_cut_off_is_named_and_has_no_bandwidth(tmp_path: Path) -> None:
    file = tmp_path / "alone.toml"
    file.write_text('like = "ft2"\nname = "alone"\nsource = "one GPU a node"\nendpoints = 64\ngpus_per_node = 1\n')
    answer = answer_to(str(file), failures=("nic:17",))
    (case,) = answer.cases
    (failed,) = case.failed
    assert failed.cut_off.flows == 2 * 63 and failed.cut_off.gpus == (17,)
    assert failed.cut_off.delivered_share == pytest.approx(62 / 64)
    assert case.bandwidth_lost is None and case.num_cut_off == 1 and failed.bus_bandwidth == 0
    text = text_of(answer)
    assert "126 flows are cut off, of GPU 17; 96.88% of the bytes arrived" in text
    assert "not delivered" in text and "inf" not in text and "nan" not in text.lower()


def test_side_by_side_with_price() -> None:
    answer = answer_to("mpft", "ft3", gpus=256, failures=("switch:0",))
    ((title, header, rows),) = report.tables(answer)
    assert "switch:0" in title and len(rows) == 2 and all(len(row) == len(header) for row in rows)
    for case in answer.cases:
        priced = bill(build(load_fabric(case.fabric)))
        rate = case.healthy.bus_bandwidth * priced.endpoints
        assert answer.dollars_per_rate(case) == pytest.approx(priced.dollars_per_rate(rate))
    assert any("prices" in line and "unverified" in line for line in report.notes(answer))
    assert sum("prices" in line for line in report.notes(answer)) == 1


def test_json_is_plain_and_seeds_repeat() -> None:
    asked = {"routing": "ecmp", "queue_pairs": 2, "random_failures": ("2%",), "seed": 3}
    one, other = (json.loads(json.dumps(report.as_json(answer_to("mrft", **asked)))) for _ in range(2))
    assert one == other
    (case,) = one["cases"]
    assert 0 < case["bandwidth_lost"]["mean"] < 1 and case["failed"][0]["cut_off"]["flows"] == 0
    assert one["question"]["random_failures"] == ["2%"]
    assert one["fabrics"][0]["dollars_per_endpoint"] == pytest.approx(case["dollars_per_endpoint"])


def test_trials_are_the_seeds_that_follow() -> None:
    alone = [answer_to("mpft", random_failures=("1%",), seed=seed).cases[0] for seed in (5, 6, 7)]
    answer = answer_to("mpft", random_failures=("1%",), seed=5, trials=3)
    (case,) = answer.cases
    assert case.failed == tuple(each.failed[0] for each in alone)
    losses = [each.bandwidth_lost.mean for each in alone if each.bandwidth_lost]
    assert case.bandwidth_lost and len(losses) == 3
    assert case.bandwidth_lost.mean == pytest.approx(sum(losses) / 3)
    assert (case.bandwidth_lost.low, case.bandwidth_lost.high) == (min(losses), max(losses))
    assert len(set(losses)) > 1 and f"{min(losses):.2%} to {max(losses):.2%}" in text_of(answer)


@pytest.mark.parametrize(
    ("fabric", "changes", "message"),
    [
        ("mpft", {"routing": "ecmp"}, r"16384 GPUs of mpft is 268,435,456 flows and would need about 4\d\.\d GiB"),
        ("ft3", {"random_failures": ("1%",)}, "65536 GPUs of ft3"),
        (
            "mpft",
            {"random_failures": ("5%",)},
            r"16384 GPUs of mpft is 1\d,\d+,\d+ flows .* --gpus 8192 can be simulated",
        ),
        ("ft3", {"failures": ("nic:0",)}, r"65536 GPUs of ft3 .* more than 4: --gpus 4096 can be simulated"),
        ("dragonfly", {"collective": "all-gather"}, "all-gather among 261632 GPUs of dragonfly"),
        ("ft2", {"routing": "ecmp", "queue_pairs": 64}, "2048 GPUs of ft2"),
    ],
)
def test_what_is_too_large_is_refused_at_once(fabric: str, changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        answer_to(fabric, gpus=None, **changes)
    assert "\n" not in str(error.value)
    assert ("all with --routing adaptive" in str(error.value)) == (changes.get("routing") == "ecmp")
    (number,) = re.findall(r"--gpus (\d+) can", str(error.value))
    question = Question(fabrics=(fabric,), sizes=(GIB,), **changes)  # type: ignore[arg-type]
    built = build(load_fabric(fabric))
    fits = [asking._job(question, built, int(number), [changes_of(question, built)])]
    with pytest.raises(ValueError, match="more than 4"):
        fits.append(asking._job(question, built, 2 * int(number), [changes_of(question, built)]))
    assert len(fits) == 1


@pytest.mark.parametrize(
    ("fabric", "gpus", "flows", "policy", "seconds", "measured"),
    [
        ("ft2", 2048, 2048**2, Ecmp(), None, 0.738),  # GiB above what one small run takes
        ("ft2", 1024, 1024**2, Ecmp(queue_pairs=16), None, 1.20),
        ("ft3", 2048, 2048**2, Adaptive(), None, 0.739),
        ("mpft", 1024, 1024**2, Adaptive(), 1.0, 0.356),
        ("ft3", 16384, 16384 * 8, Ecmp(), None, 1.56),
    ],
)
def test_memory_is_what_was_measured(
    fabric: str, gpus: int, flows: int, policy: Adaptive | Ecmp, seconds: float | None, measured: float
) -> None:
    late = [] if seconds is None else [Change(seconds=seconds, links=np.zeros(0, np.int32))]
    needed = needed_bytes(build(load_fabric(fabric)), gpus, flows, policy, late) / 2**30
    assert 0.75 * measured < needed < 2.5 * measured


@pytest.mark.parametrize(
    ("fabric", "gpus", "failures", "is_folded", "measured"),
    [
        ("mpft", 16384, "1%", True, 1.16),
        ("mpft", 16384, "plane:3", True, 0.181),
        ("mpft", 1024, "plane:3", False, 0.472),
        ("mpft", 1024, "1%", False, 0.259),
        ("mrft3", 4096, "1%", True, 0.201),
        ("mrft3", 16384, "1%", True, 2.34),
    ],
)
def test_memory_of_detours_is_what_was_measured(
    fabric: str, gpus: int, failures: str, is_folded: bool, measured: float
) -> None:
    built = build(load_fabric(fabric))
    share = failures.endswith("%")
    change = Change(seconds=0, links=random_links(built, 0.01, 0)) if share else parse_failure(failures, built)
    classes = classes_of(built, [change], gpus) if is_folded else None
    flows = classes.num_flows if classes else gpus**2
    needed = needed_bytes(built, gpus, flows, Adaptive(), [change], classes) / 2**30
    assert 0.9 * measured < needed < 1.7 * measured


@pytest.mark.parametrize("suffix", [".png", ".svg"])
def test_a_sweep_is_drawn(tmp_path: Path, suffix: str) -> None:
    picture = tmp_path / f"sweep{suffix}"
    answer = answer_to("mpft", "mrft", sizes=(1e3, 1e6, 1e9), failures=("nic:3",))
    pictures.draw(answer, picture)
    assert picture.stat().st_size > 10_000
    if suffix == ".svg":
        drawn = picture.read_text("utf-8")
        assert "mpft, 64 GPUs" in drawn and "mrft, 64 GPUs" in drawn and "dashed: nic:3" in drawn


def test_pictures_that_cannot_be(tmp_path: Path) -> None:
    swept = Question(fabrics=("mpft",), sizes=(1.0, 2.0))
    with pytest.raises(ValueError, match=r"\.png or \.svg"):
        pictures.check_picture(swept, tmp_path / "sweep.jpg")
    with pytest.raises(ValueError, match="there is no folder"):
        pictures.check_picture(swept, tmp_path / "none" / "sweep.png")
    with pytest.raises(ValueError, match="add --sweep"):
        pictures.check_picture(Question(fabrics=("mpft",), sizes=(1.0,)), tmp_path / "sweep.png")


def test_most_gpus_that_are_named_are_few() -> None:
    """However many are cut off."""
    answer = answer_to("ft2", gpus=16, endpoints=64, failures=tuple(f"nic:{gpu}" for gpu in range(8)))
    (case,) = answer.cases
    cut = case.failed[0].cut_off
    assert cut.flows == 2 * 8 * 8 and len(cut.gpus) <= asking._NAMED


def test_a_fabric_without_the_part_that_fails_says_so() -> None:
    """And only if another has it."""
    answer = answer_to("mpft", "ft3", failures=("plane:3",), endpoints=2048)
    ((_, header, rows),) = report.tables(answer)
    lost = header.index(">bandwidth lost")
    assert rows[0][lost].startswith("12.5") and rows[1][lost] == "has no plane 3"
    mpft, ft3 = report.as_json(answer)["cases"]
    assert mpft["lacks"] == "" and ft3["lacks"] == "plane 3" and ft3["failed"] == () and ft3["bandwidth_lost"] is None
    with pytest.raises(ValueError, match="plane:9: mpft has plane 0 to 7"):
        answer_to("mpft", "ft3", failures=("plane:9",), endpoints=2048)


@pytest.mark.parametrize("name", ["dispatch", "combine"])
def test_experts_are_asked_for_tokens(name: str) -> None:
    """The slower of NICs at 40 GB/s and NVLink at 160, and the busiest GPU a little after the mean one."""
    answer = answer_to("mpft", gpus=16, collective=name, sizes=(), tokens=(256,))
    (case,) = answer.cases
    assert case.experts and case.experts.tokens == 256 and case.size == 256 * case.experts.bytes_per_copy
    copies = case.experts
    mean = 256 * copies.bytes_per_copy * max(copies.across_nodes / 40e9, copies.within_nodes / 160e9)
    assert mean < case.healthy.seconds < 1.1 * mean
    counted = case.counted_bandwidth(case.healthy)
    assert counted == pytest.approx(case.experts.counted_bytes / case.healthy.seconds)
    assert "256 tokens per GPU on 16 of 16,384 GPUs" in report.tables(answer)[0][0]
    for each in ("bandwidth as DeepEP counts", f"{copies.across_nodes:.3f}", "busiest GPU"):
        assert each in text_of(answer)
    (plain,) = report.as_json(answer)["cases"]
    assert plain["deepep_bandwidth"] == counted and plain["experts"]["mode"] == "normal"


def test_the_slowest_gpu_decides_where_experts_are_not_alike() -> None:
    seconds = [
        answer_to("mpft", gpus=16, collective="dispatch", sizes=(), tokens=(256,), skew=skew).cases[0].healthy.seconds
        for skew in (0.0, 0.5, 1.0)
    ]
    assert seconds[0] < seconds[1] < seconds[2]


def test_combinations_are_swept_and_drawn(tmp_path: Path) -> None:
    answer = answer_to(
        "mpft", "mrft", collective="dispatch", sizes=(), tokens=(16, 32), gpu_counts=(8, 16), endpoints=64
    )
    found = [(case.fabric, case.gpus, case.experts.tokens) for case in answer.cases if case.experts]
    assert found == [(name, gpus, tokens) for name in ("mpft", "mrft") for gpus in (8, 16) for tokens in (16, 32)]
    ((_, header, rows),) = report.tables(answer)
    assert len(rows) == 8 and all(len(row) == len(header) for row in rows)
    pictures.draw(answer, tmp_path / "sweep.svg")
    drawn = (tmp_path / "sweep.svg").read_text("utf-8")
    assert all(f"{name}, {gpus} GPUs" in drawn for name in ("mpft", "mrft") for gpus in (8, 16))
    assert "tokens per GPU" in drawn


def test_what_runs_beside_has_its_times_in_a_table(tmp_path: Path) -> None:
    """Of `contend`; and a row for each demand of each case."""
    answer = answer_to("h800-2048", gpus=16, beside="host-copy:64MiB", endpoints=64)
    (case,) = answer.cases
    assert case.contention and case.contention.amount == 2**26
    assert case.contention.times.alone == pytest.approx(case.healthy.seconds, rel=1e-9)
    *_, (title, header, rows) = report.tables(answer)
    assert title.startswith("all-to-all beside host-copy:64MiB") and len(rows) == 2
    assert header == ("", ">alone", ">shared", ">all-to-all first", ">all-to-all last")
    assert rows[1][0] == "host-copy, 64 MiB" and rows[0][3].endswith("(1.00x)")
    several = answer_to("h800-2048", gpu_counts=(8, 16), beside="combine:16", endpoints=64)
    *_, (_, header, rows) = report.tables(several)
    assert len(rows) == 4 and all(len(row) == len(header) for row in rows) and rows[1][3] == "combine, 16 tokens"
    pictures.draw(several, tmp_path / "sweep.svg")
    assert "dashed: beside combine:16" in (tmp_path / "sweep.svg").read_text("utf-8")
    plain = report.as_json(answer)["cases"][0]["contention"]
    assert set(plain) == {"beside", "amount", "times", "beside_times"}
    assert set(plain["times"]) == {"alone", "shared", "first", "last"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"collective": "dispatch", "sizes": ()}, "--gpus 256 is nearest"),
        ({"collective": "pipeline", "stages": 5, "gpu_counts": (64,)}, "do not make 5 equal stages"),
        ({"beside": "host-copy:1GiB"}, "mpft has no PCIe"),
        ({"beside": "combine:16", "gpu_counts": (64, 48)}, "--gpus 32 is nearest"),
        ({"collective": "kv-transfer", "prefill_gpus": 64}, "use --prefill-gpus 1 to 63"),
    ],
)
def test_what_cannot_be_run_is_refused_at_once(changes: dict[str, object], message: str) -> None:
    """Before memory is looked at, whose remedy would not help."""
    gpus = 64 if changes.get("prefill_gpus") else None
    with pytest.raises(ValueError, match=message):
        answer_to("mpft", gpus=gpus, **changes)
