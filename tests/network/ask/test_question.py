"""Options, sweeps and what is refused before anything runs."""

import pytest

from dovetail.catalog.fabrics import load_fabric
from dovetail.network.ask.question import Question, build_fabrics, changes_of, changes_text, with_sweeps
from dovetail.network.fabric.topology import build


def question(**changes: object) -> Question:
    return Question(**({"fabrics": ("mpft",)} | changes))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("sweeps", "sizes", "counts"),
    [
        (("1KiB,3KiB",), (1024, 3072), (None,)),
        (("1KiB..4KiB",), (1024, 2048, 4096), (None,)),
        (("1KiB..7KiB",), (1024, 2048, 4096), (None,)),
        (("size=1B..1B",), (1,), (None,)),
        (("gpus=16,24",), (), (16, 24)),
        (("gpus=16..128",), (), (16, 32, 64, 128)),
        (("gpus=16,32", "1KiB,3KiB"), (1024, 3072), (16, 32)),
        ((), (), (None,)),
    ],
)
def test_sweeps(sweeps: tuple[str, ...], sizes: tuple[float, ...], counts: tuple[int | None, ...]) -> None:
    swept = with_sweeps(question(), sweeps)
    assert (swept.sizes, swept.gpu_counts) == (sizes, counts)
    assert swept.swept == ("sizes" if len(sizes) > 1 else "gpus" if len(counts) > 1 else "")


def test_experts_are_swept_over_tokens() -> None:
    for sweep in ("tokens=128..512", "128..512"):
        swept = with_sweeps(question(collective="dispatch"), (sweep, "gpus=8,16"))
        assert (swept.tokens, swept.gpu_counts, swept.swept) == ((128, 256, 512), (8, 16), "tokens")


@pytest.mark.parametrize(
    ("sweeps", "message"),
    [
        (("1KiB..1B",), "expected a rising range"),
        (("0B..1KiB",), "above 0"),
        (("1B..1e30GiB",), "to 1073741824GiB"),
        (("gpus=1..99999999999999999999999",), "65 cases or more; give 1 to 64"),
        ((",",), "is empty: give values"),
        (("1KiB,1",), "no unit"),
        (("gpus=16,x",), "'x' is not a whole number"),
        (("gpu=16",), "no 'gpu'; did you mean gpus"),
        (("1KiB,2KiB", "size=3KiB"), "--size is given already, or swept twice"),
        (("1B..256B", "gpus=8..1024"), "72 cases; give 64 at most"),
        (("tokens=1,2",), "--tokens is for dispatch, combine, not for all-to-all: give --size"),
    ],
)
def test_sweeps_that_are_none(sweeps: tuple[str, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        with_sweeps(question(), sweeps)


def test_a_sweep_of_what_is_given_is_refused() -> None:
    with pytest.raises(ValueError, match="--gpus is given already"):
        with_sweeps(question(gpu_counts=(64,)), ("gpus=8,16",))


def test_options_as_they_are_typed() -> None:
    typed = {"fabrics": ["mpft"], "size": "2KiB", "gpus": 64, "fail": ["plane:3"], "beside": None, "picture": "a.png"}
    asked = Question.of(typed)
    assert asked == Question(fabrics=("mpft",), sizes=(2048.0,), gpu_counts=(64,), failures=("plane:3",))
    swept = Question.of({"fabrics": ["mpft"], "collective": "combine", "tokens": 5, "skew": 0.5}, ("gpus=8,16",))
    assert (swept.tokens, swept.skew, swept.gpu_counts) == ((5,), 0.5, (8, 16))


@pytest.mark.parametrize(
    ("beside", "other"),
    [
        (None, None),
        ("host-copy:1GiB", ("host-copy", 2.0**30)),
        ("combine:4096", ("combine", 4096.0)),
        ("all-reduce:1KB", ("all-reduce", 1000.0)),
    ],
)
def test_beside(beside: str | None, other: tuple[str, float] | None) -> None:
    assert question(beside=beside).other == other


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"fabrics": ()}, "no fabric"),
        ({"collective": "alltoall"}, "did you mean all-to-all"),
        ({"routing": "adptive"}, "did you mean adaptive"),
        ({"queue_pairs": 4}, "queue_pairs = 4 is for routing ecmp"),
        ({"queue_pairs": 0, "routing": "ecmp"}, "at least 1"),
        ({"channels": 0}, "use 1 or more"),
        ({"trials": 0}, "trials = 0: use 1"),
        ({"reroute_seconds": 0.5}, "--reroute-seconds is for failures"),
        ({"trials": 3, "failures": ("plane:3",)}, "or more with --fail-random"),
        ({"seed": -1}, "use 0 to"),
        ({"seed": 2**64}, "seed = 18446744073709551616: use 0 to 9223372036854775807"),
        ({"reroute_seconds": float("nan")}, "must be finite"),
        ({"collective": "dispatch", "sizes": (1.0,)}, "--size is for .* not for dispatch: give --tokens"),
        ({"skew": 0.5}, "--skew is for dispatch, combine, not for all-to-all: leave it out"),
        ({"collective": "combine", "stages": 4}, "--stages is for pipeline, not for combine"),
        ({"both_ways": True}, "--both-ways is for pipeline"),
        ({"prefill_gpus": 4}, "--prefill-gpus is for kv-transfer"),
        ({"channels": 2}, "--channels is for all-gather, reduce-scatter, all-reduce, not for all-to-all"),
        ({"collective": "dispatch", "mode": "fast"}, "no mode 'fast'"),
        ({"collective": "dispatch", "skew": -1.0}, r"skew = -1: use 0 \(all experts alike\) to 10"),
        ({"collective": "dispatch", "skew": float("nan")}, "skew = nan: use 0"),
        ({"collective": "dispatch", "tokens": (-1,)}, "tokens = -1: use 0 or more"),
        ({"collective": "dispatch", "recorded": "a.npy", "tokens": (5,)}, "--tokens with --recorded"),
        ({"collective": "dispatch", "recorded": "a.npy", "skew": 1.0}, "--skew with --recorded"),
        ({"collective": "pipeline"}, "give --stages"),
        ({"beside": "pipeline:1GiB"}, "give --stages"),
        ({"beside": "hostcopy:1GiB"}, "did you mean host-copy"),
        ({"beside": "host-copy"}, "say how much, such as host-copy:1GiB"),
        ({"beside": "dispatch"}, "say how much, such as dispatch:4096"),
        ({"beside": "host-copy:1"}, "has no unit"),
        ({"beside": "dispatch:1KiB"}, "'1KiB' is not a whole number"),
        ({"beside": "dispatch:-1"}, "use 0 tokens or more"),
        ({"beside": "host-copy:1GiB", "failures": ("plane:3",)}, "one of them at a time"),
    ],
)
def test_questions_that_no_fabric_makes_right(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        question(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"fabrics": ("mpff",)}, "did you mean mpft"),
        ({"fabrics": ("ft2", "ft2")}, "two fabrics are named ft2"),
        ({"fabrics": ("ft2",), "gpu_counts": (4096,)}, "ft2 has 2048; use at most 2048"),
        ({"gpu_counts": (1,)}, "takes 2 or more"),
        ({"endpoints": 1001}, "use 1000 or 1008"),
    ],
)
def test_questions_that_a_fabric_cannot_answer(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_fabrics(question(**changes))


def test_failures_are_read_for_the_fabric() -> None:
    fabric = build(load_fabric("mpft", 512))
    asked = question(failures=("plane:3", "nic:1@0.5"), random_failures=("1%", "1%@2"))
    plane, nic, some, others = changes_of(asked, fabric)
    assert (plane.seconds, nic.seconds, some.seconds, others.seconds) == (0, 0.5, 0, 2)
    assert set(plane.links) == set(range(fabric.links)) & {
        link
        for link in range(fabric.links)
        for end in (fabric.link_from[link], fabric.link_to[link])
        if fabric.is_switch(end) and fabric.switch_plane[end - fabric.first_switch] == 3
    }
    assert len(some.links) == len(others.links) and set(some.links) != set(others.links)
    assert changes_text(asked) == "plane:3, nic:1@0.5, 1% of the cables, 1%@2 of the cables"


@pytest.mark.parametrize("text", ["1", "0.01", "101%", "-1%", "x%", "1%@x", "1%@-1", "nan%"])
def test_shares_that_are_none(text: str) -> None:
    with pytest.raises(ValueError, match="--fail-random"):
        changes_of(question(random_failures=(text,)), build(load_fabric("mpft", 64)))


def test_options_of_what_runs_beside_are_taken() -> None:
    """Of the collective or of the other."""
    asked = question(beside="combine:128", mode="low-latency", skew=1.0)
    assert asked.other == ("combine", 128.0)
    assert question(beside="all-gather:1MiB", channels=2).channels == 2
