import paper_plots

PROBLEM = {"map": [12], "precision": "float16"}


def test_a_box_holds_the_ratios_of_the_problems_that_both_were_measured_on(tmp_path):
    times = {"fused": 10, "naive": 30, "dense": 5}
    records = [
        PROBLEM | {"providers": {n: {"forward_us": times[n], "backward_us": 1} for n in names}}
        for names in (("fused", "naive"), ("fused", "naive", "dense"))
    ]
    result = {"device": "Some GPU", "results": records}
    ratios = paper_plots.ratios(result, "float16", "forward")
    assert ratios == {("fused", "naive"): {1: [3, 3]}, ("fused", "dense"): {1: [0.5]}}
    (file,) = paper_plots.plots(result, tmp_path).values()
    assert file.stat().st_size > 10_000
