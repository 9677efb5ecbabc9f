"""Figures of a training plan against the papers' arithmetic and each other; tables, Markdown, JSON, HTML."""

import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest

from dovetail.catalog.hardware import load_cluster
from dovetail.planner.amounts import amount, whole
from dovetail.planner.figure import explanation, find_figure
from dovetail.planner.report import html, measured, plain, tables
from dovetail.planner.request import Answer, Request, answer
from dovetail.planner.training.figures import training_figures
from dovetail.spec.band import Band

V3 = {"model": "deepseek-v3", "clusters": ["h800-2048"]}
TRAIN = V3 | {"goal": "train", "batch": "15360", "tokens": "14.8T"}
SERVE = V3 | {"goal": "serve", "context": "4989", "output_length": "1211", "output_speed": "20"}


@pytest.fixture(scope="module")
def training() -> Answer:
    return answer(Request(**TRAIN, pp=16, ep=64, tp=1, schedule="dualpipe"))


@pytest.fixture(scope="module")
def serving() -> Answer:
    return answer(Request(**SERVE, prefill_ep=32, ep=144))


@pytest.fixture(scope="module")
def small() -> Answer:
    return answer(
        Request(model="20m", clusters=["h200-node"], goal="train", batch="64", sequence_length="1K", gpus=2, pp=1)
    )


def value(answered: Answer, key: str) -> float:
    return find_figure(answered.choices[0].figures(), key).band.value


@pytest.mark.parametrize(
    ("text", "number"),
    [("14.8T", 14.8e12), ("2.5B", 2.5e9), ("1e12", 1e12), ("15,360", 15360), ("4_096", 4096), ("3m", 3e6), ("2K", 2e3)],
)
def test_numbers_have_units(text, number):
    assert amount(text, "--tokens") == pytest.approx(number, rel=1e-15)


@pytest.mark.parametrize("text", ["-5", "0", "14.8X", "T", "", "nan", "inf", "-2B"])
def test_numbers_that_are_none(text):
    with pytest.raises(ValueError, match=r"^--tokens .*expected"):
        amount(text, "--tokens")


def test_whole_numbers_name_the_nearest():
    with pytest.raises(ValueError, match="--batch 2.6: expected a whole number; nearest: 3"):
        whole("2.6", "--batch")


def test_figures_of_the_papers_step_are_the_papers(training):
    """19.926 s make 272.80B tokens a day, 432 and 385 TFLOPS, 43.73 and 38.94 % [ISCA Table 4], and 2.664M GPU hours
    for 14.8T tokens [V3 Table 1], from another measurement."""
    (choice,) = training.choices
    published = replace(choice.plan, step_seconds=Band.exact(19.926))
    ours = {figure.key: figure.band.value for figure in training_figures(published)}
    assert ours["tokens_per_day"] == pytest.approx(272.80e9, rel=1e-4)
    assert ours["tflops"] == pytest.approx(432, rel=5e-3)
    assert ours["tflops_causal"] == pytest.approx(385, rel=5e-3)
    assert ours["mfu"] == pytest.approx(43.73, rel=5e-3)
    assert ours["mfu_causal"] == pytest.approx(38.94, rel=5e-3)
    assert ours["gpu_hours"] == pytest.approx(2.664e6, rel=2e-3)
    assert ours["days"] == pytest.approx(ours["gpu_hours"] / 2048 / 24)
    assert ours["dollars"] == pytest.approx(2 * ours["gpu_hours"])  # $2 per GPU and hour [V3 §1]


def test_parts_are_the_step(training):
    parts = ("forward", "input_backward", "weight_backward", "pair", "bubble", "optimizer")
    assert sum(value(training, key) for key in parts) == pytest.approx(value(training, "step_time"), rel=1e-9)


def test_operations_of_a_layer_are_the_stage(training):
    """A stage in the middle has four layers with experts and nothing else."""
    seconds = training.choices[0].plan.timeline.durations.forward[7]
    pieces = ("attention", "gate", "experts", "shared", "mlp", "dispatch", "combine")
    assert 4e-3 * sum(value(training, key) for key in pieces) == pytest.approx(seconds, rel=1e-9)


def test_memory_is_that_of_its_parts(training):
    figure = find_figure(training.choices[0].figures(), "memory")
    parts = [float(each.value.split()[0]) for each in figure.inputs[:7]]
    assert sum(parts) == pytest.approx(figure.band.value, abs=0.05)


@pytest.mark.parametrize("name", ["training", "serving"])
def test_every_figure_has_a_key_of_its_own_and_an_explanation(name, request):
    found = request.getfixturevalue(name).choices[0].figures()
    assert len({figure.key for figure in found}) == len(found)
    for figure in found:
        lines = list(explanation(figure))
        assert figure.key in lines[0] and lines[1].startswith("  = ") and len(lines[1]) > 5


def worked_out(formula: str) -> float:
    """What a formula's numbers come to, without its words."""
    bare = re.sub(r"\([a-z][^)]*\)", "", formula.replace(" x ", " * ").replace("10^6", "1e6").replace(",", ""))
    return eval(re.sub(r"\$?/h|[A-Za-z-]*[A-Za-df-z][A-Za-z-]*(/[a-z]+)?|\$", "", bare))


@pytest.mark.parametrize(
    ("scale", "keys"),
    [
        (1.0, ("prefill.step_seconds", "prefill.computed_node", "prefill.input_node")),
        (1.0, ("prefill.ttft", "prefill.weights")),
        (1e-6, ("prefill.experts", "prefill.dense_layers", "prefill.embedding_and_head")),
        (1e-3, ("decode.experts", "decode.kernels_of_exchanges", "decode.dense_layers", "decode.embedding_and_head")),
        (1e3, ("decode.tokens_node", "decode.speed")),  # per ms
        (1.0, ("decode.step_seconds", "decode.weights", "decode.tpot", "pools", "dollars_input", "dollars_output")),
        (1e-9, ("decode.cache",)),
        (1e-3, ("limit.tpot", "limit.tpot_latency")),
    ],
)
def test_formulas_of_serving_come_to_their_figures(serving, scale, keys):
    found = serving.choices[0].figures()
    for key in keys:
        figure = find_figure(found, key)
        assert worked_out(figure.formula) * scale == pytest.approx(figure.band.value, rel=3e-3), figure.formula
        assert all(each.source for each in figure.inputs)


def test_operations_name_who_measured_them(training):
    for key in ("dispatch", "combine", "experts", "attention_backward", "optimizer"):
        figure = find_figure(training.choices[0].figures(), key)
        assert figure.inputs and all(each.source for each in figure.inputs)


def test_an_unknown_key_names_its_neighbours(training):
    with pytest.raises(ValueError, match="no figure 'bubbel' to explain; did you mean bubble"):
        tables.explained(training, "bubbel")


def test_without_tokens_there_is_no_run(small):
    keys = {figure.key for figure in small.choices[0].figures()}
    assert "step_time" in keys and not keys & {"days", "gpu_hours", "dollars"}


@pytest.mark.parametrize(
    ("band", "unit", "text"),
    [
        (Band(333.7e9, 261.4e9, 391e9), "tokens", ("333.7 B tokens", "261.4 to 391")),
        (Band(4.36e6, 2.8e6, 8.3e6), "$", ("$4.36 M", "2.8 to 8.3")),
        (Band(0.05, 0.04, 0.06), "s", ("50 ms", "40 to 60")),
        (Band(0.5, 0.25, 1.0), "days", ("12 hours", "6 to 24")),
        (Band.exact(104), "", ("104", "")),
        (Band(-1e-16, -1e-15, 4e-16), "ms", ("0 ms", "")),
    ],
)
def test_numbers_read_as_people_write_them(band, unit, text):
    assert tables.shown(band, unit) == text


def test_tables_have_as_many_cells_as_columns(training, serving, small):
    both = Answer(request=training.request, spec=training.spec, choices=training.choices * 2)
    for answered in (training, serving, small, both):
        for table in tables.tables(answered):
            assert table.rows and all(len(row) == len(table.header) for row in table.rows), table.title


def test_equal_ranks_are_one_row(training):
    table = tables.memory_table(training.choices[0].plan)
    assert [row[0] for row in table.rows] == ["0", "1 to 14", "15"]
    assert table.rows[1][-1] == "15 + 2 .. 2 + 15"


def test_a_gpu_without_a_runtime_has_all_of_its_memory(small):
    (choice,) = small.choices
    plan = choice.plan
    gpu = plan.work.cluster.gpu.model_copy(update={"runtime_bytes": 0.0})
    cluster = plan.work.cluster.model_copy(update={"gpu": gpu})
    bare = replace(choice, cluster=cluster, plan=replace(plan, work=replace(plan.work, cluster=cluster)))
    memory = find_figure(bare.figures(), "memory")
    assert memory.band.value == pytest.approx(value(small, "memory") - 2) == plan.largest_memory.total / 1e9
    assert "runtime" not in tables.memory_table(bare.plan).title


def test_both_pools_say_whose_efficiency_they_borrow():
    request = Request(**SERVE | {"clusters": ["h800-2048"], "decode_cluster": "gb200-nvl72"})
    rows = tables.tables(answer(request))[0].rows
    assert ("efficiency", "gb200 was not measured: its shares are those of h800, in a wider band") in rows


def test_clusters_stand_side_by_side():
    answered = answer(Request(**{**SERVE, "clusters": ["h800-2048", "h200-node"]}))
    (table,) = tables.tables(answered)
    assert table.header == ("", ">h800-2048", ">h200-node")
    assert table.rows[0][0] == "layout" and "ep 8" in table.rows[0][2]
    assert tables.answer_launches(answered) == []


def test_a_cluster_that_is_too_small_for_both_pools_says_so():
    answered = answer(Request(**{**SERVE, "clusters": ["h200-node"]}))
    assert "the cluster has 8 GPUs, one pool of each kind takes 16" in str(tables.tables(answered)[0].rows)


def test_json_is_plain_and_whole(training, serving):
    for answered, key in ((training, "step_time"), (serving, "pools")):
        record = json.loads(json.dumps(plain.as_json(answered)))
        (plan,) = record["plans"]
        figure = plan["figures"][key]
        assert figure["low"] <= figure["value"] <= figure["high"]
        assert plan["figures"].keys() == {each.key for each in answered.choices[0].figures()}
    assert plain.as_json(training)["plans"][0]["layout"]["pp"] == 16


def test_an_explanation_is_data_too(training):
    (found,) = json.loads(json.dumps(plain.explained_json(training, "mfu")))
    assert found["key"] == "mfu" and found["unit"] == "%" and "TFLOPS" in found["formula"]
    assert [each["name"] for each in found["inputs"]] == ["FLOP per token", "peak"]


def test_markdown_tables_are_tables(training):
    text = tables.markdown(training)
    widths = [line.count(" | ") for line in text.splitlines() if line.startswith("| ")]
    assert len(widths) > 20 and "--:" in text and "## to carry it out" in text


class Tags(HTMLParser):
    """Which are open, and what is asked of elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.links: list[str] = []

    def handle_starttag(self, tag, attributes):
        self.links += [text for name, text in attributes if name in ("src", "href", "xlink:href")]
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        pass

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


@pytest.mark.parametrize("name", ["training", "serving", "small"])
def test_the_page_is_whole_and_needs_nothing_else(name, request):
    text = html.page(request.getfixturevalue(name))
    tags = Tags()
    tags.feed(text)
    assert tags.open == [] and tags.links == []
    assert "<script" not in text and "@import" not in text and "url(" not in text
    assert set(re.findall(r"https?://[^\"' <]+", text)) <= {"http://www.w3.org/2000/svg"}
    pictures = re.findall(r"<svg.*?</svg>", text, re.DOTALL)
    assert len(pictures) >= 2
    for picture in pictures:
        ElementTree.fromstring(picture)
    colours = set(re.findall(r"var\((--\w+)\)", text))
    assert all(f"{colour}:" in text for colour in colours)


def test_bars_of_memory_end_where_the_sum_says(training):
    plan = training.choices[0].plan
    root = ElementTree.fromstring(html.memory_bars(plan.memory, plan.work.cluster.gpu.memory_bytes, 0.0))
    boxes = [each for each in root if each.tag == "rect" and "rank 1," in (each.findtext("title") or "")]
    widths = sum(float(each.get("width")) for each in boxes)
    limit = next(each for each in root if each.get("class") == "limit").get("d")
    full = float(re.match(r"M([\d.]+)", limit).group(1)) - float(boxes[0].get("x"))
    share = plan.memory[1].total / plan.work.cluster.gpu.memory_bytes
    assert widths / full == pytest.approx(share, abs=2e-3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"goal": "trian"}, "--goal trian: did you mean train"),
        ({"model": "deepsek-v3"}, "did you mean deepseek-v3"),
        ({"clusters": ["h800-2049"]}, "did you mean h800-2048"),
        ({"clusters": []}, "give a --cluster"),
        ({"batch": None}, "--goal train takes --batch"),
        ({"gpus": 4096}, "--gpus 4096: h800-2048 has 2048"),
        ({"pp": 7}, "--pp 7 x --tp 1 does not divide 2048 GPUs; nearest: --pp 8"),
        ({"tp": 3}, "--tp 3 does not divide 2048 GPUs; nearest: --tp 2"),
        ({"ep": 100, "pp": 16}, "ep = 100 does not divide .*nearest: ep = 128"),
        ({"pp": 64, "schedule": "dualpipe"}, "64 stages .* for 61 layers"),
        ({"pp": 0}, "--pp 0: expected at least 1"),
        ({"schedule": "dualpip"}, "did you mean dualpipe"),
        ({"context": "5000"}, "--context is for --goal serve"),
        ({"precision": "deepseek"}, "did you mean deepseek-v3"),
        ({"vary": ["topk_grp=2"]}, "did you mean topk_group"),
    ],
)
def test_bad_input_is_one_line_with_a_remedy(change, message):
    with pytest.raises(ValueError, match=message) as caught:
        answer(Request(**{**TRAIN, **change}))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"change": ["cache_hitt=0.5"]}, "unknown key 'cache_hitt'; did you mean cache_hit"),
        ({"context": None}, "expected context"),
        ({"batch": "4"}, "--batch is for --goal train"),
        ({"ep": 12, "tp": 8}, "--tp 8 does not divide --ep 12"),
        ({"gpus": 12}, "nearest: 8 and 16"),
        ({"output_speed": "2000"}, "the best is"),
    ],
)
def test_bad_input_of_serving(change, message):
    with pytest.raises(ValueError, match=message):
        answer(Request(**{**SERVE, "output_length": None, **change}))


def test_what_does_not_fit_says_by_how_much_and_what_would():
    with pytest.raises(ValueError) as caught:
        answer(Request(**{**TRAIN, "batch": "1024"}, gpus=64, tp=1))
    numbers = re.search(r"needs least, ([\d.]+) GB .* has ([\d.]+), ([\d.]+) GB too few", str(caught.value))
    needs, has, short = map(float, numbers.groups())
    assert needs - has == pytest.approx(short, abs=0.11)
    assert re.search(r"on its fullest rank, most of it \w+( \w+)? \(\d+\.\d\)", str(caught.value))
    remedy = re.search(r"what would do: (\d+) GPUs \(pp = (\d+), ep = (\d+), tp = (\d+)\)", str(caught.value))
    gpus, pp, ep, tp = map(int, remedy.groups())
    assert gpus > 64
    layout = {"gpus": gpus, "pp": pp, "ep": ep, "tp": tp, "schedule": "1f1b", "microbatch_size": 1}
    assert answer(Request(**{**TRAIN, "batch": "1024"}, **layout)).choices[0].plan.fits


def test_a_shorter_sequence_is_named_only_if_it_fits():
    fixed = {
        "model": "deepseek-v2-lite",
        "gpus": 8,
        "pp": 8,
        "ep": 1,
        "tp": 1,
        "microbatch_size": 4,
        "schedule": "1f1b",
    }
    with pytest.raises(ValueError, match=r"most of it activations .* or --sequence-length \d+$") as caught:
        answer(Request(**{**TRAIN, "batch": "64", "clusters": ["h800-node"], **fixed}, sequence_length="32768"))
    fixed["sequence_length"] = str(caught.value).rpartition(" ")[2]
    assert answer(Request(**{**TRAIN, "batch": "64", "clusters": ["h800-node"], **fixed})).choices[0].plan.fits


def test_what_was_measured_is_a_table():
    cluster = load_cluster("h800-node")
    machine, products = measured.tables(cluster)
    assert any("3,350 GB/s" in cell for row in machine.rows for cell in row)
    assert len(products.rows) == len(cluster.gpu.efficiency.products)
    for table in (machine, products):
        assert all(len(row) == len(table.header) for row in table.rows)
