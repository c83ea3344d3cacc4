import paper_tables

PROBLEM = {"map": [12], "heads": 2, "head_dim": 8, "kernel_size": [3], "dilation": [2], "batch": 2}


def record(**times):
    providers = {
        name: {"forward_us": f, "backward_us": b, "forward_way": name, "backward_way": name}
        for name, (f, b) in times.items()
    }
    return PROBLEM | {"precision": "float16", "providers": providers, "failures": {}}


def test_shares_say_of_how_many_problems_they_are():
    part = [record(fused=(1, 1), dense=(2, 2)), record(fused=(1, 1), gemm=(2, 2))]
    text = paper_tables.shares({"results": part})
    assert "| forward | float16 | 1-D | 2 | fused | - | 100.0% of 1 |  | 100.0% of 1 |" in text


def test_fused_over_dense_has_average_and_extremes():
    part = [record(fused=(1, 1), dense=(f, 1)) for f in (1, 2, 6)]
    text = paper_tables.over_dense({"results": [*part, record(fused=(1, 1))]})
    assert "| forward | float16 | 1-D | 3 of 4 | 200 % (0, 500) | 100 % |" in text


def test_the_fastest_of_the_dense_kernels_are_counted():
    part = [record(dense=(1, 1)) for _ in range(3)]
    part[0]["providers"]["dense"]["forward_way"] = "cudnn"
    text = paper_tables.dense_kernels([*part, record(fused=(1, 1))])
    assert "| pass | precision | cudnn | dense |" in text
    assert "| backward | float16 | 0 | 3 |" in text
    assert "| forward | float16 | 1 | 2 |" in text
