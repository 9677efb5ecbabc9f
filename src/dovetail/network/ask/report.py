"""Prints an answer as tables with notes, or as plain data."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from dovetail.network.ask.answer import Answer, Case, CutOff, Run, Spread
from dovetail.network.ask.question import EXPERTS, changes_text
from dovetail.network.ask.sizes import UNITS
from dovetail.network.delivery.contention import Times

Table = tuple[str, tuple[str, ...], list[tuple[str, ...]]]  # title, header, rows


def tables(answer: Answer) -> list[Table]:
    """Return the tables: of a single case all figures, of several cases a row each."""
    beside = [_contention(answer)] if answer.question.beside else []
    if len(answer.cases) > 1:
        return [_side_by_side(answer), *beside]
    (case,) = answer.cases
    return [_in_full(answer, case), _links(case), *beside]


def notes(answer: Answer) -> list[str]:
    """Return the lines below the tables: how it was simulated, what was cut off, what the prices are."""
    lines = []
    runs = [run for case in answer.cases for run in (case.healthy, *case.failed)]
    if not all(run.flows for run in runs):
        lines.append("no flows were simulated: equal flows that start together end when the busiest link is done")
    if any(run.is_folded for run in runs):
        some = "" if all(run.is_folded for run in runs) else ", where there are any"
        lines.append(f"flows that are alike by symmetry were simulated as one{some}")
    for case in answer.cases:
        if case.late_failures:
            late = f"{case.late_failures} of {len(answer.question.failures + answer.question.random_failures)} failures"
            lines.append(f"{_where(case)}: {late} came only after everything had arrived")
        broken = [(trial, run.cut_off) for trial, run in enumerate(case.failed) if not run.is_complete]
        for trial, cut in broken[:1]:
            number = f", seed {answer.question.seed + trial}" if len(case.failed) > 1 else ""
            lines.append(f"{_where(case)}{number}: {_cut_off_text(cut)}")
    counting = "counts a token's vector once" if answer.question.is_of_experts else "is counted as nccl-tests does"
    shares = "share: latency over time" if len(answer.cases) > 1 else "use: bytes carried over what a link could carry"
    lines.append(f"bus bandwidth {counting}, in GB/s of 10^9 bytes per GPU; {shares}")
    if answer.question.is_of_experts:
        lines.append(
            "DeepEP counts it once for each node of its experts, its own node included; on a single node once for each "
            "GPU, and in low-latency mode once for each expert"
        )
        if len(answer.cases) > 1:
            lines.append("to nodes, NVLink: copies of a token; busiest: rows of the busiest GPU over the mean")
    if answer.question.beside:
        lines.append("first: its traffic class is before the other's; last: after it, and gets the bandwidth left")
    lines.extend(dict.fromkeys(f"prices: {each.price_basis}" for each in answer.fabrics))
    return lines


def as_json(answer: Answer) -> dict[str, Any]:
    """Return plain data, in seconds, bytes, bytes/s and dollars."""
    question = {key: value for key, value in asdict(answer.question).items() if value not in (None, ())}
    cases = [
        asdict(case)
        | {
            "latency_share": case.healthy.latency_share,
            "deepep_bandwidth": case.counted_bandwidth(case.healthy),
            "bandwidth_lost": asdict(case.bandwidth_lost) if case.bandwidth_lost else None,
            "time_added": asdict(case.time_added) if case.time_added else None,
            "trials_cut_off": case.num_cut_off,
            "dollars_per_endpoint": answer.summary(case).dollars_per_endpoint,
            "dollars_per_gb_per_second": answer.dollars_per_rate(case),
        }
        for case in answer.cases
    ]
    return {"question": question, "fabrics": [asdict(each) for each in answer.fabrics], "cases": cases}


def _in_full(answer: Answer, case: Case) -> Table:
    runs = [case.healthy, *case.failed[:1]]
    rows: list[tuple[str, ...]] = [
        ("time", *(_time(run) for run in runs)),
        ("algorithm bandwidth", *(_rate(run, run.algorithm_bandwidth) for run in runs)),
        ("bus bandwidth", *(_rate(run, run.bus_bandwidth) for run in runs)),
        *(_expert_rows(case, runs) if case.experts else ()),
        ("latency", *(seconds_text(run.latency_seconds) for run in runs)),
        ("latency over time", *(f"{run.latency_share:.2%}" for run in runs)),
        ("flows simulated", *(f"{run.flows:,}" if run.flows else "none" for run in runs)),
    ]
    if case.failed:
        rows += [
            ("cables lost", "0", f"{case.cables_lost:,}"),
            ("bandwidth lost", "", _loss(case, case.bandwidth_lost)),
            ("time added", "", _loss(case, case.time_added)),
        ]
    money = dollars_text(answer.summary(case).dollars_per_endpoint), dollars_text(answer.dollars_per_rate(case))
    blank = ("",) * (len(runs) - 1)
    rows += [("price per GPU of the fabric", money[0], *blank), ("price per GB/s", money[1], *blank)]
    failing = f">{changes_text(answer.question)}" + (", first trial" if len(case.failed) > 1 else "")
    header = ("", ">whole", failing) if case.failed else ("", ">whole")
    total = answer.summary(case).endpoints
    each = " per GPU" if case.experts else ""
    title = f"{_asked(answer)}: {_amount(case)}{each} on {case.gpus:,} of {total:,} GPUs of {case.fabric}"
    return title, header, rows


def _expert_rows(case: Case, runs: list[Run]) -> list[tuple[str, ...]]:
    assert case.experts
    copies, blank = case.experts, ("",) * (len(runs) - 1)
    return [
        ("bandwidth as DeepEP counts", *(_rate(run, case.counted_bandwidth(run) or 0.0) for run in runs)),
        ("bytes of a copy", f"{copies.bytes_per_copy:,.0f}", *blank),
        ("copies of a token to other nodes", f"{copies.across_nodes:.3f}", *blank),
        ("copies over NVLink", f"{copies.within_nodes:.3f}", *blank),
        ("rows of the busiest GPU over the mean", f"{copies.busiest_gpu:.3f}", *blank),
    ]


def _contention(answer: Answer) -> Table:
    """Return a table with two rows for each case: the collective, and what runs beside it."""
    several, name = len(answer.cases) > 1, answer.question.collective
    rows: list[tuple[str, ...]] = []
    for case in answer.cases:
        assert case.contention
        other = case.contention
        much = f"{other.amount:,.0f} tokens" if other.beside in EXPERTS else size_text(other.amount)
        for what, times in ((name, other.times), (f"{other.beside}, {much}", other.beside_times)):
            rows.append((*((case.fabric, f"{case.gpus:,}", _amount(case)) if several else ()), what, *_times(times)))
    of = ("fabric", ">GPUs", ">tokens" if answer.question.is_of_experts else ">size") if several else ()
    header = (*of, "", ">alone", ">shared", f">{name} first", f">{name} last")
    return f"{name} beside {answer.question.beside}: time until each has ended", header, rows


def _times(times: Times) -> tuple[str, ...]:
    together = (
        f"{seconds_text(each)} ({_fold(each, times.alone)})" for each in (times.shared, times.first, times.last)
    )
    return seconds_text(times.alone), *together


def _fold(seconds: float, alone: float) -> str:
    return f"{seconds / alone:.2f}x" if alone else "-"


def _links(case: Case) -> Table:
    run, state = (case.failed[0], ", with failures") if case.failed else (case.healthy, "")
    rows: list[tuple[str, ...]] = [
        (
            each.name,
            f"{each.links:,}",
            f"{each.mean_use:.1%}",
            f"{each.busiest_use:.1%}",
            f"link:{each.busiest_link}",
            each.busiest_name,
        )
        for each in run.links
    ]
    return f"busiest links{state}", ("", ">in use", ">mean use", ">busiest", "", ""), rows


def _side_by_side(answer: Answer) -> Table:
    fails, of_experts = answer.question.has_failures, answer.question.is_of_experts
    header: tuple[str, ...] = ("fabric", ">GPUs", ">tokens" if of_experts else ">size", ">time")
    header += (">DeepEP GB/s",) if of_experts else (">algorithm GB/s",)
    header += (">bus GB/s", ">latency", ">share")
    header += (">to nodes", ">NVLink", ">busiest") if of_experts else ()
    header += (">$/GPU", ">$ per GB/s") + ((">bandwidth lost", ">time added") if fails else ())
    rows: list[tuple[str, ...]] = []
    for case in answer.cases:
        run, copies = case.healthy, case.experts
        row = [case.fabric, f"{case.gpus:,}", _amount(case).removesuffix(" tokens"), _time(run)]
        row += [f"{((case.counted_bandwidth(run) or 0.0) if copies else run.algorithm_bandwidth) / 1e9:.2f}"]
        row += [f"{run.bus_bandwidth / 1e9:.2f}", seconds_text(run.latency_seconds), f"{run.latency_share:.1%}"]
        if copies:
            row += [f"{each:.3f}" for each in (copies.across_nodes, copies.within_nodes, copies.busiest_gpu)]
        row += [dollars_text(answer.summary(case).dollars_per_endpoint), dollars_text(answer.dollars_per_rate(case))]
        if fails:
            lacks = (f"has no {case.lacks}", "-")
            row += lacks if case.lacks else (_loss(case, case.bandwidth_lost), _loss(case, case.time_added))
        rows.append(tuple(row))
    failing = f"; lost with {changes_text(answer.question)}" if fails else ""
    return f"{_asked(answer)}{failing}", header, rows


def _asked(answer: Answer) -> str:
    question = answer.question
    pairs = f" of {question.queue_pairs} queue pairs" if question.queue_pairs > 1 else ""
    how = [question.collective]
    if question.is_of_experts:
        copies = answer.cases[0].experts
        assert copies
        skewed = f" with skew {question.skew:g}" if question.skew else ""
        how += [f"{copies.mode}, experts of {copies.model}{skewed}{' as recorded' if question.recorded else ''}"]
    if question.stages is not None:
        how += [f"{question.stages} stages{' both ways' if question.both_ways else ''}"]
    return f"{', '.join(how)}, {question.routing}{pairs}"


def _amount(case: Case) -> str:
    return f"{case.experts.tokens:,} tokens" if case.experts else size_text(case.size)


def _where(case: Case) -> str:
    return f"{case.fabric}, {case.gpus:,} GPUs, {_amount(case)}"


def _time(run: Run) -> str:
    return seconds_text(run.seconds) if run.is_complete else "not delivered"


def _rate(run: Run, rate: float) -> str:
    return f"{rate / 1e9:.2f} GB/s" if run.is_complete else "-"


def _loss(case: Case, share: Spread | None) -> str:
    trials = len(case.failed)
    if share is None:
        return "cut off" if case.num_cut_off else "-"
    text = _share(share.mean)
    if trials > 1:
        text += f" ({_share(share.low)} to {_share(share.high)})"
    return text + (f", cut off in {case.num_cut_off} of {trials}" if case.num_cut_off else "")


def _share(share: float) -> str:
    return f"{share:.2%}" if share < 10 else f"{1 + share:,.1f}-fold"


def _cut_off_text(cut: CutOff) -> str:
    named = ", ".join(map(str, cut.gpus)) + (" and more" if cut.has_more_gpus else "")
    word = "GPU" if len(cut.gpus) == 1 else "GPUs"
    return f"{cut.flows:,} flows are cut off, of {word} {named}; {cut.delivered_share:.2%} of the bytes arrived"


def size_text(size: float) -> str:
    """Return bytes in the largest unit of 2^10 that they reach."""
    for unit in ("GiB", "MiB", "KiB"):
        if size >= UNITS[unit]:
            return f"{size / UNITS[unit]:.4g} {unit}"
    return f"{size:.4g} B"


def seconds_text(seconds: float) -> str:
    """Return seconds with four digits in s, ms or us."""
    for unit, scale in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= scale:
            return f"{seconds / scale:.4g} {unit}"
    return f"{seconds * 1e6:.4g} us"


def dollars_text(dollars: float | None) -> str:
    """Return whole dollars, or "-" for None."""
    return "-" if dollars is None else f"${dollars:,.0f}"
