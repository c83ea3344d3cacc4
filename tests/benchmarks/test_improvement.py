import improvement


def record(**times):
    return {"providers": {n: {"forward_us": f, "backward_us": b} for n, (f, b) in times.items()}}


def test_improvements_are_those_of_the_definition():
    records = [record(naive=(30, 30), fused=(10, 20)), record(naive=(10, 10), fused=(20, 20))]
    assert improvement.improvements(records, "fused", "naive", "forward") == [200, -50]
    both = improvement.improvements(records, "fused", "naive", "forward and backward")
    assert both == [100, -50]
    assert improvement.matched([*records, records[0]], "fused", "naive", "forward") == "66.7%"
    equal = [record(naive=(100, 1), gemm=(101, 1)), record(naive=(100, 1), gemm=(102, 1))]
    assert improvement.matched(equal, "gemm", "naive", "forward") == "50.0%"  # 1 % is noise
    assert improvement.summary(records, "fused", "naive", "forward") == "75 % (-50, 200)"
    assert improvement.summary(records, "fused", "flex", "forward") == "-"


def test_a_share_of_a_part_says_of_how_many():
    records = [record(fused=(1, 1), dense=(2, 2)), record(fused=(1, 1))]
    assert improvement.matched(records, "fused", "dense", "forward") == "100.0% of 1"
    assert improvement.matched(records, "fused", "flex", "forward") == "-"
