import json
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")

from neighborhood_attention.backends.triton import tile_table
from neighborhood_attention.backends.triton.tiles import WHOLE_GROUP
from neighborhood_attention.tune import command
from neighborhood_attention.tune.command import main, parse, plan, read_shapes, summary
from neighborhood_attention.tune.passes import Pass, Shape, Work
from neighborhood_attention.tune.records import Deadline, Records

KERNELS = Path(__file__).parents[4] / "kernels"


def problem(side, heads=2, kernel_size=7, dilation=1, **others):
    return {
        "map": [side, side], "heads": heads, "head_dim": 32, "kernel_size": [kernel_size] * 2,
        "dilation": [dilation] * 2, "batch": 4, **others,
    }  # fmt: skip


@pytest.fixture
def problems(tmp_path):
    path = tmp_path / "problems.json"
    entries = [problem(56), problem(56, heads=3), problem(56, dilation=8), problem(28, dilation=4)]
    path.write_text(json.dumps({"problems": [*entries, problem(7, layers=20)]}))
    return path


def plan_words(problems, *words):
    return plan(parse([str(problems), "records.json", "--commit", "a", *words]))


def test_a_problem_of_each_entry_is_tuned_forward_and_backward(problems):
    works = plan_words(problems)
    assert [(work.shape.map[0], work.shape.heads, work.name) for work in works] == [
        (56, 2, "forward"), (56, 2, "backward"), (56, 2, "forward"), (56, 2, "backward"),
        (7, 2, "forward"), (7, 2, "backward"),
    ]  # fmt: skip
    assert [work.shape.dilation[0] for work in works] == [1, 1, 8, 8, 1, 1]
    assert set(works[0].kernels) == {"forward", "ring_forward"}
    assert {*works[0].kernels, *works[1].kernels} == set(tile_table.KERNELS)


def test_options_choose_problems_kernels_and_precisions(problems):
    options = ["--only", "7x7-k7", "d8x8", "--precisions", "tf32", "half", "--kernels", "forward"]
    works = plan_words(problems, *options)
    assert [(work.shape.map[0], work.precision) for work in works] == [
        (56, "tf32"), (7, "tf32"), (56, "half"), (7, "half"),
    ]  # fmt: skip
    assert {work.kernels for work in works} == {("forward",)}
    (work,) = plan_words(problems, "--only", "7x7-k7", "--kernels", "key_gradient", "whole_group")
    assert work.kernels == ("key_gradient", "whole_group")


def test_a_name_that_no_problem_has_is_refused(problems):
    with pytest.raises(ValueError, match=r"--only \['99x'\]: no such problem in .*problems\.json"):
        plan_words(problems, "--only", "99x")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        pytest.param("{", "expected JSON with a list", id="no JSON"),
        pytest.param("[]", "expected JSON with a list", id="no object"),
        pytest.param(json.dumps({"problems": [problem(7), {}]}), "problem 1: 'heads'", id="field"),
        pytest.param(json.dumps({"problems": [problem(6)]}), "problem 0: 6x6-k7", id="window"),
    ],
)
def test_a_broken_file_is_named(text, message, tmp_path):
    path = tmp_path / "problems.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=rf"problems\.json: {message}"):
        read_shapes(path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"none\.json: expected"):
        read_shapes(tmp_path / "none.json")


def test_the_summary_has_a_line_for_each_change():
    work = Work(Shape((56, 56), 2, 32, (7, 7), (1, 1), 4), "half", ("forward",))
    tile = {"tile": [1, 4, 8], "strip": [1, 2, 16], "num_warps": 1}
    old, new = {"forward": tile}, {"forward": tile | {"num_warps": 2}}
    choices = [
        work.record | {"old": old, "new": new, "old_us": 100.0, "new_us": 90.0},
        work.record | {"old": old, "new": old, "old_us": 50.0, "new_us": 50.0},
        work.record | {"old": {}, "new": new, "old_us": None, "new_us": 50.0},
    ]
    _, *lines = [" ".join(line.split()) for line in summary(choices).splitlines()]
    title = "56x56-k7x7-d1x1-h2-D32-B4 half forward"
    assert lines == [
        f"{title} forward 1x4x8/1x2x16 w1 s2 1x4x8/1x2x16 w2 s2 100.0 90.0 10.0%",
        f"{title} - kept kept 50.0 50.0 0.0%",
        f"{title} forward - 1x4x8/1x2x16 w2 s2 wrong 50.0",
    ]


class BrokenPass(Pass):
    """None of its tiles works."""

    def __init__(self, work, device):
        super().__init__(work, "cpu")

    def time(self, tiles, milliseconds=20):
        self.use(tiles)
        raise RuntimeError("out of resources")


def test_a_pass_without_tiles_leaves_the_table_and_does_not_end_the_run(
    problems, tmp_path, monkeypatch
):
    first, second = plan_words(problems, "--only", "7x7-k7", "d8x8", "--kernels", "forward")
    processor, table = SimpleNamespace(multi_processor_count=132), dict(tile_table.table())
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: processor)
    monkeypatch.setattr(command, "choose_tiles", lambda problem, window: WHOLE_GROUP)
    monkeypatch.setattr(
        command, "Ahead", lambda _: nullcontext(SimpleNamespace(wait=lambda *_: None))
    )
    monkeypatch.setattr(command, "Pass", BrokenPass)
    monkeypatch.setattr(tile_table, "table", lambda: table)
    before, records = dict(table), Records(tmp_path / "records.json", {})
    failures = command.tune([first, second], records, tmp_path / "table.json", Deadline(100))
    assert [text.split(": ")[0] for text in failures] == [str(first), str(second)]
    assert table == before
    found = len(records)
    assert found > 2
    unfilled = second._replace(kernels=("whole_group",))  # its forward cannot be launched here
    works = [first, unfilled]
    failures = command.tune(works, records, tmp_path / "table.json", Deadline(100))
    assert [text.split(": ")[0] for text in failures] == [str(first), str(unfilled)]
    assert (table, len(records)) == (before, found)


def test_few_tokens_have_no_tiles_to_choose(problems, tmp_path, monkeypatch):
    [work] = plan_words(problems, "--only", "7x7-k7", "--kernels", "forward")
    processor = SimpleNamespace(multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: processor)
    monkeypatch.setattr(command, "direct_plan", lambda problem, window: "a plan")
    failures = command.tune([work], Records(tmp_path / "r.json", {}), tmp_path / "t", Deadline(9))
    assert failures == [f"{work}: so few tokens take a kernel whose tiles are not chosen"]


def test_it_needs_a_gpu(problems, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="needs a GPU"):
        main([str(problems), "records.json", "--commit", "a"])


def test_the_package_leaves_the_tuner_alone():
    code = (
        "import sys, neighborhood_attention as n; n.list_backends();"
        "print([m for m in sys.modules if 'tune' in m and 'neighborhood' in m])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=KERNELS, capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stderr


def test_it_runs_as_a_module():
    command = [sys.executable, "-m", "neighborhood_attention.tune", "--help"]
    done = subprocess.run(command, cwd=KERNELS, capture_output=True, text=True)
    assert "--limit-seconds" in done.stdout, done.stderr


@pytest.mark.gpu
@pytest.mark.slow
def test_it_tunes_and_goes_on(problems, tmp_path, capsys):
    table, records = tmp_path / "table.json", tmp_path / "records.json"
    words = [problems, records, "--table", table, "--commit", "a", "--only", "7x7-k7"]
    words += ["--kernels", "whole_group", "--limit-seconds", "200"]
    main([str(word) for word in words])
    result = json.loads(records.read_text())
    (choice,) = result["choices"]
    assert all("us" in entry or "failure" in entry for entry in result["candidates"])
    key = next(key for key in tile_table.load(table) if key.group == (7, 7) and not key.is_dilated)
    entry = tile_table.load(table)[key]
    written = json.loads(json.dumps(tile_table.as_record(entry["whole_group"])))
    assert written == choice["new"]["whole_group"]
    main([str(word) for word in words])
    assert json.loads(records.read_text())["candidates"] == result["candidates"]
    assert "backward" in capsys.readouterr().out
