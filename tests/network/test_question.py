"""Sizes, sweeps and what is refused before anything runs."""

import pytest

from dovetail.catalog.fabrics import load_fabric
from dovetail.network.question import Question, build_fabrics, changes_of, changes_text, parse_size, with_sweep
from dovetail.network.topology import build


def question(**changes: object) -> Question:
    return Question(**({"fabrics": ("mpft",), "sizes": (1e9,)} | changes))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "size"),
    [("0B", 0), ("64 B", 64), ("1KB", 1000), ("1KiB", 1024), ("1.5MiB", 1572864), ("1GiB", 2**30), ("2e3MB", 2e9)],
)
def test_sizes(text: str, size: float) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1024", "has no unit: write 1024B, 1024KiB"),
        ("1G", "did you mean GB or GiB"),
        ("1mib", "did you mean MiB"),
        ("1TB", "known: B, KB"),
        ("-1GiB", "not negative"),
        ("1e400B", "finite"),
        ("nanB", "expected a number"),
        ("1.2.3B", "no number"),
        ("", "expected a number"),
    ],
)
def test_sizes_that_are_none(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_size(text)


@pytest.mark.parametrize(
    ("sweep", "sizes", "counts"),
    [
        ("1KiB,3KiB", (1024, 3072), (None,)),
        ("1KiB..4KiB", (1024, 2048, 4096), (None,)),
        ("1KiB..7KiB", (1024, 2048, 4096), (None,)),
        ("size=1B..1B", (1,), (None,)),
        ("gpus=16,24", (1e9,), (16, 24)),
        ("gpus=16..128", (1e9,), (16, 32, 64, 128)),
        (None, (1e9,), (None,)),
    ],
)
def test_sweeps(sweep: str | None, sizes: tuple[float, ...], counts: tuple[int | None, ...]) -> None:
    swept = with_sweep(question(), sweep)
    assert (swept.sizes, swept.gpu_counts) == (sizes, counts)
    assert swept.swept == ("sizes" if len(sizes) > 1 else "gpus" if len(counts) > 1 else "")


@pytest.mark.parametrize(
    ("sweep", "message"),
    [
        ("1KiB..1B", "upwards"),
        ("0B..1KiB", "above 0"),
        ("1B..1e30GiB", "give 1 to 64"),
        (",", "0 cases"),
        ("1KiB,1", "no unit"),
        ("gpus=16,x", "'x' is no whole number"),
    ],
)
def test_sweeps_that_are_none(sweep: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        with_sweep(question(), sweep)


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
        ({"trials": 3, "failures": ("plane:3",)}, "2 and more with --fail-random"),
        ({"seed": -1}, "use 0 or more"),
        ({"reroute_seconds": float("nan")}, "must be finite"),
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
