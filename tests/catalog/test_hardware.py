"""The catalog against datasheets and measurements as published, and cluster files that are wrong."""

from pathlib import Path

import pytest

from dovetail.catalog.hardware import cluster_names, gpu_names, load_cluster, load_gpu
from dovetail.config import dump
from dovetail.spec.hardware import Cluster

TEMPLATE = Path(__file__).parents[2] / "src/dovetail/catalog/clusters/template.toml"

# DeepGEMM's README: M, N, K, TFLOPS and GB/s of its first release.
DEEPGEMM = [
    (64, 2112, 7168, 206, 1688),
    (64, 24576, 1536, 289, 2455),
    (64, 32768, 512, 219, 2143),
    (64, 7168, 16384, 336, 2668),
    (64, 4096, 7168, 287, 2320),
    (64, 7168, 2048, 295, 2470),
    (128, 2112, 7168, 352, 1509),
    (128, 24576, 1536, 535, 2448),
    (128, 32768, 512, 358, 2103),
    (128, 7168, 16384, 645, 2604),
    (128, 4096, 7168, 533, 2221),
    (128, 7168, 2048, 510, 2277),
    (4096, 2112, 7168, 1058, 527),
    (4096, 24576, 1536, 990, 786),
    (4096, 32768, 512, 590, 1232),
    (4096, 7168, 16384, 1358, 343),
    (4096, 4096, 7168, 1304, 500),
    (4096, 7168, 2048, 1025, 697),
]


@pytest.mark.parametrize("name", cluster_names())
def test_every_cluster_loads_and_says_where_its_numbers_are_from(name):
    cluster = load_cluster(name)
    assert cluster.name == name
    assert cluster.source and cluster.gpu.source and cluster.gpu.efficiency.gemm_source
    assert cluster.price is not None and 0.1 < cluster.price.low < cluster.price.high < 20
    assert cluster.gpu.efficiency.memory.high <= 1


def test_the_gpus_asked_for_are_there():
    asked = {"h800", "h100", "h200", "h20", "a100", "b200", "gb200", "gb300", "mi300x", "rtx4090"}
    assert set(gpu_names()) == asked
    assert {load_cluster(name).gpu.name for name in cluster_names()} == asked


def test_the_papers_cluster():
    cluster = load_cluster("h800-2048")
    assert (cluster.gpus, cluster.nodes, cluster.fabric) == (2048, 256, "mpft")
    assert cluster.scale_out is not None
    # ISCA: 200 GB/s one way of which 160, and 50 of which 40: four to one.
    assert cluster.scale_up.bandwidth.value / cluster.scale_out.bandwidth.value == 4
    assert cluster.price is not None and cluster.price.value == 2.0
    assert [load_cluster(f"h800-{unit}").gpus for unit in ("prefill", "decode", "node")] == [32, 144, 8]


@pytest.mark.parametrize(("m", "n", "k", "tflops", "gbs"), DEEPGEMM)
def test_h800_products_are_deepgemms_table(m, n, k, tflops, gbs):
    (point,) = [p for p in load_gpu("h800").efficiency.gemms if (p.layout, p.m, p.n, p.k) == ("dense", m, n, k)]
    assert point.speed.low / 1e12 <= tflops <= point.speed.high / 1e12
    assert tflops * 1e12 * point.bytes / point.flop / 1e9 == pytest.approx(gbs, rel=0.005)


def test_low_latency_exchanges_are_bytes_over_time():
    points = [p for p in load_gpu("h800").efficiency.exchanges if p.microseconds]
    assert {p.ranks for p in points} == {8, 32, 128}
    for point in points:
        assert point.copies is not None and point.microseconds is not None
        sent = point.tokens * point.copies * point.bytes_per_token
        assert sent / (point.microseconds * 1e-6) / 1e9 == pytest.approx(point.gbs, rel=0.021)


def test_a_borrowed_product_at_its_best_has_the_lenders_share_and_a_waiting_one_its_time():
    h800, h20 = load_gpu("h800"), load_gpu("h20")
    assert h20.efficiency.borrowed_from == "h800"
    best = h800.best_shares()
    assert best[True] == pytest.approx(0.749, rel=1e-3)  # 4096 x 7168 x 16384
    for lent, point in zip(h800.efficiency.products, h20.efficiency.gemms, strict=True):
        before, now = lent.flop / lent.speed.value, point.flop / point.speed.value
        ratio = h20.ideal_seconds(point) / h800.ideal_seconds(lent)
        assert min(1, ratio) * 0.999 <= now / before <= max(1, ratio) * 1.001
        if h800.ideal_seconds(lent) / before in best.values():
            assert now / before == pytest.approx(ratio)
        # Wider than what it was borrowed from, but not past the roofline.
        assert point.speed.low / point.speed.value < lent.speed.low / lent.speed.value
        assert point.flop / point.speed.high >= h20.ideal_seconds(point) * 0.9999


# H20, InferSim's bench_data: m, k, n, microseconds. Not in the catalog: what borrowing says is held against them.
H20_PRODUCTS = [
    (16, 7168, 1536, 13.696),
    (16, 7168, 576, 10.133),
    (128, 7168, 576, 10.243),
    (64, 1536, 24576, 24.739),
    (1024, 7168, 1536, 94.236),
    (4096, 7168, 1536, 346.89),
    (4096, 1536, 24576, 1146),
    (32768, 1536, 24576, 8983),
]


@pytest.mark.parametrize(("m", "k", "n", "published"), H20_PRODUCTS)
def test_borrowed_products_are_near_what_the_borrower_does(m, k, n, published):
    (point,) = [
        p for p in load_gpu("h20").efficiency.gemms if (p.layout, p.groups, p.m, p.n, p.k) == ("dense", 1, m, n, k)
    ]
    assert point.flop / point.speed.value * 1e6 == pytest.approx(published, rel=0.35)


def test_attention_by_shape_is_borrowed_as_a_share_unless_the_borrower_has_its_own():
    h800, h100, a100, h20 = (load_gpu(name).efficiency for name in ("h800", "h100", "a100", "h20"))
    for lent, borrowed in zip(h800.attention, h100.attention, strict=True):
        assert borrowed.tflops == pytest.approx([each * 989.5 / 990 for each in lent.tflops])
    assert {sweep.kind for sweep in a100.attention} == {"decode"}
    own = [sweep for sweep in h20.attention if sweep.kind == "decode"]
    assert len(own) == 7 and own[0].tflops[0] == pytest.approx(11.36)


def test_without_fp8_products_run_in_bf16():
    a100 = load_gpu("a100")
    assert a100.runs_as("fp8") == "bf16"
    assert a100.peak("fp8") == a100.peak("bf16") == 312e12
    assert {point.format for point in a100.efficiency.gemms} == {"bf16"}


def test_a_file_reads_back_what_was_dumped(tmp_path):
    cluster = load_cluster("gb200-nvl72")
    path = tmp_path / "copy.toml"
    path.write_text(dump(cluster))
    assert load_cluster(path) == cluster


def changed(tmp_path: Path, old: str, new: str) -> Path:
    text = TEMPLATE.read_text()
    assert text.count(old) == 1, old
    path = tmp_path / "mine.toml"
    path.write_text(text.replace(old, new))
    return path


def test_a_changed_template_is_a_cluster(tmp_path):
    assert load_cluster(changed(tmp_path, "nodes = 4", "nodes = 2")).gpus == 16


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("gpus_per_node = 8 ", "gpu_per_node = 8 ", "unknown key 'gpu_per_node'; did you mean gpus_per_node"),
        ("nodes = 4\n", "", "missing key 'nodes'"),
        ("gbs = 50 ", "gbs = -50 ", r"scale_out.gbs = -50: input should be greater than 0"),
        ("value = 40, low", "value = 50.1, low", "low <= value <= high"),
        ('gpu = "h100" ', 'gpu = "h1000" ', "gpu = 'h1000' is not in the catalog; did you mean h100"),
        ("nodes = 4\n", 'nodes = "4"\n', "nodes = '4'"),
    ],
)
def test_a_wrong_file_is_one_line_that_names_the_value(tmp_path, old, new, message):
    with pytest.raises(ValueError, match=message) as caught:
        load_cluster(changed(tmp_path, old, new))
    assert "\n" not in str(caught.value) and "mine.toml" in str(caught.value)


def test_nodes_without_a_link_between_them(tmp_path):
    text = TEMPLATE.read_text()
    path = tmp_path / "mine.toml"
    path.write_text(text[: text.index("[scale_out]")])
    with pytest.raises(ValueError, match=r"nodes = 4 but no \[scale_out\] link"):
        load_cluster(path)


def test_unknown_names_list_near_ones(tmp_path):
    with pytest.raises(ValueError, match="did you mean h800-2048"):
        load_cluster("h800-204")
    with pytest.raises(ValueError, match="did you mean h800"):
        load_gpu("h80")
    with pytest.raises(ValueError, match="no such file"):
        load_cluster(tmp_path / "none.toml")
    path = tmp_path / "like.toml"
    path.write_text('name = "x"\nsource = "y"\nlike = "h800-2049"\n')
    with pytest.raises(ValueError, match="like = 'h800-2049' is no cluster of the catalog; did you mean h800-2048"):
        load_cluster(path)


GPU = """name = "x"
source = "y"
nodes = 1
gpus_per_node = 1
[scale_up]
gbs = 1
achieved_gbs = { value = 1, low = 1, high = 1, source = "z" }
latency_us = { value = 1, low = 1, high = 1, source = "z" }
[gpu]
name = "x"
source = "y"
memory_bytes = 1e9
bandwidth_gbs = 100
multiprocessors = 2
peak_tflops = { bf16 = 1, fp32 = 1 }
"""


def test_a_gpu_in_a_users_file_may_borrow(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text(GPU + '[gpu.borrow]\ngpu = "h800"\nwidened = 1.5\nsource = "a guess"\n')
    cluster = load_cluster(path)
    assert isinstance(cluster, Cluster) and cluster.gpu.efficiency.borrowed_from == "h800"


@pytest.mark.parametrize(
    ("rest", "message"),
    [
        (
            '[gpu.borrow]\ngpu = "h800"\nwidened = 1.5\nsource = "z"\nattention = [{ kind = "decode", batch = 1, '
            "heads = 8, length = [1, 2], tflops = [1] }]\n",
            "2 values of length, but 1 of tflops",
        ),
        ("", r"either an \[efficiency\] table or a \[borrow\] table"),
        ('[gpu.borrow]\ngpu = "h8000"\nwidened = 1.5\nsource = "z"\n', "borrow.gpu = 'h8000'; did you mean h800"),
        (
            '[gpu.borrow]\ngpu = "h800"\nwiden = 1.5\nsource = "z"\n',
            "borrow: unknown key 'widen'; did you mean w",
        ),
        ('[gpu.borrow]\ngpu = "h800"\nwidened = 0.5\nsource = "z"\n', "borrow: widened = 0.5"),
    ],
)
def test_a_gpu_without_efficiency_is_an_error(tmp_path, rest, message):
    path = tmp_path / "mine.toml"
    path.write_text(GPU + rest)
    with pytest.raises(ValueError, match=message):
        load_cluster(path)
