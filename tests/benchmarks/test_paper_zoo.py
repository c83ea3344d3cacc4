import paper_zoo
import pytest
from problem import Problem

SIZES = {"heads": 2, "head_dim": 8, "kernel_size": [3], "dilation": [1], "batch": 2}
LAYERS = [SIZES | {"map": [n], "zoo": True, "tf32": n == 8} for n in (8, 9)]
OTHER = SIZES | {"map": [12], "zoo": False, "tf32": True}


@pytest.fixture(autouse=True)
def small_list(monkeypatch):
    monkeypatch.setattr(paper_zoo, "load_problems", lambda _: [*LAYERS, OTHER])


def record(entry, precision="float16", **times):
    providers = {name: {"forward_us": f, "backward_us": b} for name, (f, b) in times.items()}
    sizes = Problem.of(entry).record
    return sizes | {"precision": precision, "providers": providers, "failures": {}}


def test_every_layer_of_the_zoo_has_its_rows():
    times = {"naive": (30, 30), "gemm": (9, 31), "fused": (10, 10)}
    result = {"results": [record(e, **times) for e in (OTHER, *reversed(LAYERS))]}
    text = paper_zoo.every_layer(result)
    assert "2 of 2" in text
    assert "slower in 2 of 4 rows" in text
    rows = [line for line in text.splitlines() if line.startswith(("| 8-", "| 9-", "| 12-"))]
    assert [row.split("-")[0] for row in rows] == ["| 8", "| 8", "| 9", "| 9"]
    assert rows[0] == "| 8-k3-d1-h2-D8-B2 | float16 | forward | 30 | 9 | 10 | 3.00 | **0.90** |"
    assert rows[1].endswith("| forward and backward | 60 | 40 | 20 | 3.00 | 2.00 |")


def test_the_precisions_of_a_layer_follow_one_another():
    mixed = [("tf32", 0), ("float16", 1), ("float32", 0)]
    result = {"results": [record(LAYERS[n], precision, fused=(1, 1)) for precision, n in mixed]}
    rows = [line.split(" | ")[:2] for line in paper_zoo.every_layer(result).splitlines()[4::2]]
    names = [f"| {n}-k3-d1-h2-D8-B2" for n in (8, 8, 9)]
    assert rows == [[names[0], "float32"], [names[1], "tf32"], [names[2], "float16"]]


def test_layers_without_a_time_are_named():
    times = {"naive": (30, 30), "gemm": (9, 31), "fused": (10, 10)}
    part = record(LAYERS[1], naive=(1, 1))
    half = [record(LAYERS[0], **times), part, record(OTHER, "tf32", **times)]
    text = paper_zoo.not_measured({"results": half})
    assert "- float16: 1 of 2: 9-k3-d1-h2-D8-B2" in text
    assert "- tf32: 1 of 1: 8-k3-d1-h2-D8-B2" in text
    assert "float32" not in text
    whole = [record(e, **times) for e in LAYERS]
    assert "All layers" in paper_zoo.not_measured({"results": whole})


def test_another_problem_on_which_fused_is_slower_is_named():
    worse = {"naive": (10, 20), "fused": (20, 1)}
    result = {"results": [record(OTHER, **worse), record(LAYERS[0], **worse)]}
    text = paper_zoo.slower(result)
    assert "in 1 cases" in text
    assert "| 12-k3-d1-h2-D8-B2 | float16 | forward | naive | 20 | 10 | 2.00 |" in text
