import model_report
import pytest
from matplotlib.patches import Rectangle
from model_process import Case

PARTS = {"attention": 2.0, "matrix products": 3.0, "other": 1.0}


def record(
    model, speed, backend=None, kind="inference", execution="compiled", batch_size=128, side=None
):
    case = Case(model, kind, execution, batch_size, input_size=side, attention_backend=backend)
    return case.as_record() | {
        "status": "ok",
        "images_per_second": speed,
        "spread": 0.01,
        "latency_ms": {"p50": 1.25, "p95": 1.5},
        "peak_memory_mib": 2048.0,
        "component_ms": PARTS,
        "attention_share": 1 / 3,
        "mfu": 0.25,
    }


def result(*records):
    versions = {"torch": "2.11", "triton": "3.6", "timm": "1.0"}
    return {"device": "a GPU", "versions": versions, "date": "2026-01-01", "results": records}


def texts(figure):
    return [text.get_text() for axes in figure.axes for text in axes.texts]


def test_every_case_has_a_line():
    failed = record("nat_mini", 1) | {"status": "out of memory"}
    measured = record("nat_tiny", 12345.6, "fused")
    lines = model_report.everything(result(measured, failed)).split("\n")
    assert len(lines) == 4
    assert "| 12,346 | 1.0% | 1.25 | 1.50 | 2.0 | 25% | 33% |" in lines[2]
    assert "| out of memory |" in lines[3]


def test_tables_tell_what_a_reader_of_the_file_must_know():
    measured = result(record("nat_tiny", 100, "naive")) | {"note": "Naive is of old kernels."}
    assert "random images and weights. Naive is of old kernels.\n" in model_report.tables(measured)


def test_improvements_are_of_one_condition():
    found = model_report.tables(
        result(
            record("nat_tiny", 100, "naive"),
            record("nat_tiny", 150, "gemm"),
            record("nat_tiny", 300, "fused"),
            record("nat_tiny", 50, "naive", kind="training"),
            record("nat_tiny", 40, "naive", side=384),
        )
    )
    last = found.split("\n")[-1]
    assert "| 100 | 150 | 300 | +50 % | +200 % | +100 % |" in last
    assert "training" not in last


def test_speeds_of_different_runs_are_not_compared():
    records = [
        record("nat_tiny", 100, "naive") | {"run": "first"},
        record("nat_tiny", 150, "gemm") | {"run": "first"},
        record("nat_tiny", 120, "fused") | {"run": "second"},
    ]
    last = model_report.tables(result(*records)).split("\n")[-1]
    assert "| 100 | 150 | - | +50 % | - | - |" in last


def test_the_summary_has_a_column_a_model_ours_first():
    single = record("nat_tiny", 800, "fused", execution="cuda_graphs", batch_size=1)
    others = record("convnext_tiny", 2000), record("nat_tiny", 9999, "naive")
    larger = record("nat_tiny", 1000, "fused", side=384)
    captured = record("nat_tiny", 7000, "fused", execution="captured")
    records = *others, record("nat_tiny", 3000, "fused"), larger, single, captured
    records = *records, record("convnext_tiny", 900, execution="cuda_graphs", batch_size=1)
    records = *records, record("nat_tiny", 5, "fused", batch_size=64), record("nat_base", 1)
    table, runs, missing = model_report.summary(result(*records)).split("\n\n")
    head, _, top1, *rows = table.split("\n")
    assert head == "|  | `nat_tiny` | `convnext_tiny` |"
    assert top1 == "| top-1, % | 83.2 | 82.1 |"
    assert rows == [
        "| inference, compiled, bfloat16, batch 128: img/s | 3,000 | 2,000 |",
        "| inference, compiled, bfloat16, batch 128: peak GiB | 2.0 | 2.0 |",
        "| inference, compiled, CUDA graphs, bfloat16, batch 1: ms | 1.25 | 1.25 |",
    ]
    assert runs == "All in one run."
    assert missing == "Not measured: `dinat_tiny`, `swin_tiny_patch4_window7_224`."


def test_figures_whose_rounds_differ_are_marked():
    ours, peer = record("nat_tiny", 2, "fused"), record("convnext_tiny", 1)
    text = model_report.summary(result(ours | {"spread": 0.2}, peer))
    assert "| ~2 | 1 |" in text
    assert "~: its rounds differ by more than 10%." in text
    assert "~" not in model_report.summary(result(ours, peer))


def test_figures_of_several_runs_are_marked():
    ours, peer = record("nat_tiny", 2, "fused"), record("convnext_tiny", 1)
    eager = [record(m, 1, execution="eager") for m in ("nat_tiny", "convnext_tiny")]
    first, second = {"run": "10:00", "commit": "a"}, {"run": "11:00", "commit": "a"}
    later = [r | second for r in eager]
    text = model_report.summary(result(ours | first, peer | first, *later))
    assert "*" not in text
    assert "Each row in one run." in text
    text = model_report.summary(result(ours | first, peer | second, *later))
    assert "| inference, compiled, bfloat16, batch 128: img/s \\* | 2 | 1 |" in text
    assert "| inference, eager, bfloat16, batch 128: img/s | 1 | 1 |" in text
    assert "\\*: of several runs" in text


@pytest.mark.parametrize(
    ("records", "expected"),
    [
        ([], "Not measured: `nat_tiny`, `dinat_tiny`"),
        ([record("nat_tiny", 1, "fused")], "batch 128: img/s | 1 |"),
        ([record("swin_tiny_patch4_window7_224", 1) | {"status": "out of memory"}],
         "batch 128: peak GiB | out of memory |"),
        ([record("dinat_tiny", 1, "fused") | {"status": "failed: RuntimeError: why"}],
         "batch 128: img/s | failed |"),
    ],
    ids=["nothing", "no peers", "out of memory", "failed"],
)  # fmt: skip
def test_what_is_missing_is_said(records, expected):
    assert expected in model_report.summary(result(*records))
    model_report.figures(result(*records))


def test_the_fastest_execution_stands_for_a_model():
    slow = record("nat_tiny", 1000, "fused", execution="eager")
    records = slow, record("nat_tiny", 3000, "fused"), record("convnext_tiny", 2000)
    records = *records, record("nat_tiny", 9, "fused", kind="training")
    figure = model_report.accuracy_throughput(result(*records))
    [axes] = figure.axes  # none of what no peer was measured in
    points = {tuple(line.get_xydata()[0]) for line in axes.lines}
    assert points == {(3000, 83.2), (2000, 82.1)}
    assert sorted(texts(figure)) == ["convnext_tiny", "nat_tiny"]


def test_names_of_points_hide_neither_names_nor_points():
    figure = model_report.accuracy_throughput(
        result(
            record("nat_tiny", 1000, "fused"),
            record("nat_mini", 20, "fused"),
            record("swin_small_patch4_window7_224", 1010),
            record("convnext_small", 1020),
        )
    )
    [axes] = figure.axes
    assert sorted(texts(figure)) == ["convnext_small", "nat_mini", "nat_tiny", "swin_small"]
    boxes = [text.get_window_extent() for text in axes.texts]
    assert [box.count_overlaps(boxes) for box in boxes] == [1] * len(boxes)  # itself
    for line in axes.lines:
        point = axes.transData.transform(line.get_xydata()[0])
        assert not any(box.contains(*point) for box in boxes)


def test_bars_add_up_to_the_step():
    figure = model_report.components(result(record("nat_tiny", 12800, "fused")))
    bars = [patch for patch in figure.axes[0].patches if isinstance(patch, Rectangle)]
    assert sum(bar.get_width() for bar in bars) == pytest.approx(10)  # 128 images at 12.8 a ms
    tips = [bar.get_gid() for bar in bars]
    assert "tip:nat_tiny fused, compiled: idle 4.00 ms" in tips


def test_speed_ups_are_ratios_to_the_fused_kernels():
    records = (record("nat_tiny", speed, name) for name, speed in
               [("naive", 100), ("gemm", 150), ("fused", 300)])  # fmt: skip
    figure = model_report.speed_ups(result(*records))
    assert [bar.get_width() for bar in figure.axes[0].patches] == [3.0, 2.0]


def test_pictures_of_nothing_are_left_out():
    only = {key: value for key, value in record("nat_tiny", 1, "fused").items()
            if key != "component_ms"}  # fmt: skip
    assert model_report.figures(result(only)) == {}
