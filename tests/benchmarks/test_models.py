import json

import models
import pytest
from model_process import Case

SHORT = ["--rounds", "1", "--round-seconds", "0.01", "--warmup", "1"]


def options(*arguments, output="results.json"):
    return models.parse([str(output), "--device", "cpu", *SHORT, *arguments])


def test_a_run_continues_where_the_last_one_stopped(tmp_path, monkeypatch, capsys):
    output = tmp_path / "results.json"

    def run(*batch_sizes):
        arguments = ["--models", "test_vit", "--executions", "eager", "--passes", "inference"]
        arguments += ["--precisions", "float32", "--batch-sizes", *batch_sizes]
        monkeypatch.setattr("sys.argv", ["models.py", str(output), "--device", "cpu", *SHORT,
                                         "--commit", "abc", *arguments])  # fmt: skip
        models.main()
        return json.loads(output.read_text())

    first = run("2")
    second = run("2", "1")
    assert "1 of 2 cases to measure" in capsys.readouterr().out
    [two] = first["results"]
    assert second["results"][0] == two
    assert [record["batch_size"] for record in second["results"]] == [2, 1]
    assert second["commit"] == "abc"
    assert two["status"] == "ok"
    assert two["images_per_second"] > 0


def test_only_a_failure_is_measured_again(tmp_path):
    results = models.Results(tmp_path / "r.json", {"commit": "a", "date": "b"}, ["model"])
    case = Case("test_vit", "inference", "eager", 1)
    assert not models.is_measured(results, case)
    for status, expected in {"ok": True, "out of memory": True, "failed: why": False}.items():
        results.add({"model": "test_vit", "status": status})
        assert models.is_measured(results, case) == expected


def test_the_headline_compares_the_tiny_models_under_each_condition():
    cases = options("--preset", "headline").cases
    compared = {}
    for case in cases:
        compared.setdefault((case.kind, case.execution, case.batch_size), []).append(case.model)
    assert len(compared) == 10
    assert all(names == list(models.TINY) for names in compared.values())


def test_the_papers_models_run_on_three_generations():
    cases = options("--preset", "paper").cases
    assert len({case.model for case in cases}) == 15
    for kind, precision in [("inference", "float16-true"), ("training", "bfloat16")]:
        backends = [c.attention_backend for c in cases
                    if (c.model, c.kind, c.precision) == ("nat_tiny", kind, precision)]  # fmt: skip
        assert backends == ["naive", "gemm", "fused"]


@pytest.mark.parametrize("preset", models.PRESETS)
def test_presets_name_known_models_and_each_case_once(preset):
    cases = options("--preset", preset).cases
    assert len(cases) == len(set(cases)) > 0
    assert {len(case.image_shape) for case in cases} == {3}


def test_options_replace_axes_of_a_preset():
    cases = options("--preset", "headline", "--models", "nat_mini", "--batch-sizes", "4").cases
    assert {case.model for case in cases} == {"nat_mini"}
    assert {case.batch_size for case in cases} == {4}
    assert {case.kind for case in cases} == {"inference", "training"}


def test_passes_are_selected_from_a_preset():
    cases = options("--preset", "headline", "--passes", "training").cases
    assert {(case.kind, case.batch_size, case.precision) for case in cases} == {
        ("training", 128, "bfloat16")
    }


def test_other_models_have_no_attention_backends():
    chosen = options("--models", "nat_mini", "test_vit", "--backends", "naive", "gemm").cases
    found = {(case.model, case.attention_backend) for case in chosen}
    assert found == {("nat_mini", "naive"), ("nat_mini", "gemm"), ("test_vit", None)}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "expected --preset or --models"),
        (["--models", "nat_minni"], "models=nat_minni"),
        (["--models", "nat_mini", "--backends", "flash"], "invalid choice: 'flash'"),
    ],
    ids=["nothing", "model", "backend"],
)
def test_what_cannot_be_measured_is_named(arguments, message, capsys):
    with pytest.raises(SystemExit):
        options(*arguments)
    assert message in capsys.readouterr().err


def test_a_group_is_one_condition_of_limited_size():
    cases = options("--models", "nat_mini", "test_vit", "--together", "3").cases
    groups = [*models.groups(cases, dict.fromkeys(cases, models.Grid(together=3)))]
    assert [case for group in groups for case in group] == cases
    assert [len(group) for group in groups] == [3, 3, 3, 3]
    assert all(len({case.kind for case in group}) == 1 for group in groups)


def test_cases_with_and_without_a_profile_do_not_share_a_group():
    one, two = (Case("test_vit", "inference", "captured", n) for n in (1, 1))
    two = models.replace(two, model="test_resnet")
    grids = {one: models.Grid(profile=False), two: models.Grid()}
    assert [*models.groups([one, two], grids)] == [[one], [two]]
    assert not any(
        grid.profile for grid in options("--models", "nat_mini", "--no-profile").grids.values()
    )


def test_the_papers_models_take_few_groups():
    chosen = options("--preset", "paper")
    groups = [*models.groups(chosen.cases, chosen.grids)]
    assert len(chosen.cases) == 135
    assert len(groups) <= 18
    for group in groups:  # the three generations of a model are timed in turns
        assert len({case.model for case in group}) * 3 == len(group)


def test_mfu_is_the_fraction_of_the_data_sheets_rate():
    record = {"pass": "inference", "precision": "bfloat16-true", "flops_per_image": 8.6e9}
    record["images_per_second"] = 10_000.0
    device = "NVIDIA H100 80GB HBM3"
    assert models.mfu(record, device) == pytest.approx(86 / 989.5)
    assert models.mfu(record | {"pass": "training"}, device) == pytest.approx(3 * 86 / 989.5)
    assert models.mfu(record, "a processor") is None


def test_the_table_says_what_did_not_run():
    case = Case("nat_mini", "training", "eager", 2**20).as_record()
    assert "out of memory" in models.table([case | {"status": "out of memory"}])
