import pytest
import scaling_report


@pytest.fixture
def result():
    speed = {("auto", 1): 100.0, ("ddp", 2): 196.0, ("ddp", 4): 380.0, ("fsdp2", 2): 150.0}
    options = {"size": 224, "set": []}
    length = {"part": "throughput", "model": "nat_tiny", "batch": 128, **options}
    throughput = [
        {"case": {**length, "strategy": strategy, "gpus": gpus, "turn": turn}}
        | {"images_per_second": value + turn}
        for (strategy, gpus), value in speed.items()
        for turn in (-1, 0, 1)
    ]
    runs = [("auto", 1, {"0": 2.0, "1": 1.5}), ("ddp", 2, {"0": 2.0, "1": 1.4998})]
    same = {"micro_batches": 1, "precision": "32-true", "global_batch": 128, "steps": 2, **options}
    loss = [
        {"case": {"part": "loss", "gpus": gpus, "strategy": strategy, **same}, "losses": losses}
        for strategy, gpus, losses in runs
    ]
    other = {**loss[0]["case"], "global_batch": 64}  # is compared with nothing
    resumed = {"part": "resume", "gpus": 4, "onto": 2, "strategy": "fsdp2", **same}
    resume = [{"case": resumed, "losses": {"1": 1.503}}]
    results = [{"case": other, "losses": {"0": 9.0, "1": 9.0}}, *throughput, *loss, *resume]
    return {"device": "X", "nccl": "1", "versions": {"torch": "2"}, "results": results}


def test_the_tables_tell_ratios_and_differences(result):
    tables = scaling_report.tables(result)
    assert tables.startswith("X, torch 2, NCCL 1")
    assert "| nat_tiny, batch 128, 224 pixels | ddp | 4 | 380 | 3.80x |" in tables
    assert "| ddp | 2 | 32-true | 2 | 1.4998 | 2.0e-04 |" in tables
    assert "| fsdp2, continued on 2 | 4 | 32-true | 1 | 1.5030 | 3.0e-03 |" in tables


def test_what_comes_through_the_loader_is_compared_with_what_lies_on_the_device(result):
    one = {**result["results"][1]["case"], "part": "loader", "gpus": 1, "strategy": "auto"}
    result["results"].append({"case": one, "images_per_second": 97.0})
    row = "| nat_tiny, batch 128, 224 pixels, through the loader | - | 1 | 97 | 0.97x |"
    assert row in scaling_report.tables(result)


def test_other_options_are_compared_with_the_defaults(result):
    compiled = {"set": ["compile=default"]}
    [ddp] = [r for r in result["results"] if r["case"]["part"] == "loss" and r["case"]["gpus"] > 1]
    other = {"case": ddp["case"] | compiled, "losses": {"0": 2.001, "1": 1.5}}
    result["results"].append(other)
    row = "| ddp, compile=default | 2 | 32-true | 2 | 1.5000 | {} |"
    assert row.format("1.0e-03") in scaling_report.tables(result)
    alone = {**other["case"], "gpus": 1, "strategy": "auto"}
    result["results"].append({"case": alone, "losses": {"0": 2.0005, "1": 1.5}})
    assert row.format("5.0e-04") in scaling_report.tables(result)


def test_without_one_gpu_there_is_no_difference(result):
    several = [r for r in result["results"] if r["case"]["gpus"] > 1]
    tables = scaling_report.tables({**result, "results": several})
    assert "| ddp | 2 | 32-true | 2 | 1.4998 | - |" in tables


def test_the_plot_shows_efficiencies(result):
    [axes] = scaling_report.figures(result)["efficiency"].axes
    lines = {line.get_label(): list(line.get_ydata()) for line in axes.lines}
    assert lines["nat_tiny, batch 128, 224 pixels, ddp"] == pytest.approx([100, 98, 95])
    assert lines["nat_tiny, batch 128, 224 pixels, fsdp2"] == pytest.approx([100, 75])


def test_without_several_gpus_there_is_no_picture(result):
    alone = [r for r in result["results"] if r["case"]["gpus"] == 1]
    assert scaling_report.figures({**result, "results": alone}) == {}
