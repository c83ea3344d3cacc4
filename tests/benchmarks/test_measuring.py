import json

import pytest
import torch
from measuring import Results, graph_time, markdown_table

DESCRIPTION = {"device": "d", "versions": {"torch": "2"}, "commit": "a", "date": "2026-01-01"}


@pytest.fixture
def results(tmp_path):
    return Results(tmp_path / "r.json", DESCRIPTION, ["name"])


def test_a_later_measurement_replaces_the_same_one(results, tmp_path):
    results.add({"name": "x", "us": 1.0})
    results.add({"name": "y", "us": 2.0})
    results.add({"name": "x", "us": 3.0})
    again = Results(tmp_path / "r.json", DESCRIPTION | {"commit": "b"}, ["name"])
    assert [(r["name"], r["us"], r["commit"]) for r in again.records] == [
        ("x", 3, "a"), ("y", 2, "a"),
    ]  # fmt: skip
    assert again.find({"name": "y"})["us"] == 2
    assert again.find({"name": "z"}) is None


def test_a_record_is_a_line_with_four_digits(results, tmp_path):
    results.add({"name": "x", "values": [1 / 3], "nested": {"us": 123456.0}})
    text = (tmp_path / "r.json").read_text()
    assert json.loads(text)["results"][0]["values"] == [0.3333]
    assert [line for line in text.splitlines() if '"x"' in line and "123500.0" in line]


def test_digits_are_as_many_as_asked_for(tmp_path):
    Results(tmp_path / "r.json", DESCRIPTION, ["name"], digits=8).add({"name": "x", "loss": 2 / 3})
    assert json.loads((tmp_path / "r.json").read_text())["results"][0]["loss"] == 0.66666667


def test_other_versions_are_refused(results, tmp_path):
    results.add({"name": "x"})
    with pytest.raises(ValueError, match="versions"):
        Results(tmp_path / "r.json", DESCRIPTION | {"versions": {"torch": "3"}}, ["name"])


def test_a_table_has_a_line_a_row():
    assert markdown_table(["a", "b"], [[1, 2]]) == "| a | b |\n| --- | --- |\n| 1 | 2 |"


@pytest.mark.gpu
def test_a_larger_copy_takes_longer():
    small, large = (torch.ones(n, device="cuda") for n in (2**22, 2**28))
    with torch.cuda.stream(torch.cuda.Stream()):
        times = [graph_time(lambda x=x: x.clone()).median for x in (small, large)]
    assert times[1] > 10 * times[0] > 0


@pytest.mark.gpu
def test_graphs_that_are_gone_leave_their_memory_to_the_next():
    fifth = torch.cuda.mem_get_info()[0] // 5
    with torch.cuda.stream(torch.cuda.Stream()):
        for _ in range(6):
            assert graph_time(
                lambda: torch.empty(fifth, dtype=torch.uint8, device="cuda")[0].zero_()
            )
