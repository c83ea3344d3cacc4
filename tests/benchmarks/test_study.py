import json
from types import SimpleNamespace

import pytest
import study
from compiling import PeerRun
from problem import Problem

from neighborhood_attention.tune.records import Deadline


def numbers(broken=()):
    """A study of the numbers 1 to 3."""

    def measure(work, results, compiled):
        if work.record["n"] in broken:
            raise RuntimeError("an illegal memory access was encountered")
        return {"square": work.record["n"] ** 2, "failures": {}}

    def missing(arguments, results):
        work = (SimpleNamespace(record={"n": n}, parts=[]) for n in (1, 2, 3))
        return [w for w in work if results.find(w.record) is None]

    return SimpleNamespace(
        __doc__="Numbers.\n\nSquares\nof them.\n", IDENTITY=["n"], MARGIN=5, missing=missing,
        measure=measure, add_options=lambda _: None, begin=lambda _: None, line=str,
        tables=lambda result: f"{len(result['results'])} numbers",
        plots=lambda result, folder: (folder / "picture").write_text(result["device"]),
    )  # fmt: skip


@pytest.fixture
def file(tmp_path, monkeypatch):
    description = {"device": "d", "versions": {"torch": "2"}}
    monkeypatch.setattr(study, "describe_device", lambda: description)
    return tmp_path / "r.json"


def run(module, file, seconds=100):
    arguments = study.parse(module, [str(file), "--commit", "a"])
    return study.run(module, arguments, Deadline(seconds))


def test_all_that_is_missing_is_measured(file):
    assert [r["square"] for r in run(numbers(), file).records] == [1, 4, 9]
    content = json.loads(file.read_text())
    assert content["method"] == "Squares of them."
    assert run(numbers(broken=[1, 2, 3]), file).records == content["results"]


def test_what_broke_the_gpu_is_not_tried_again(file):
    with pytest.raises(RuntimeError, match="illegal"):
        run(numbers(broken=[2]), file)
    records = run(numbers(broken=[2]), file).records
    assert [r["n"] for r in records] == [1, 2, 3]
    assert "illegal" in records[1]["failures"]["GPU"]


def test_nothing_starts_shortly_before_the_end(file, capsys):
    assert run(numbers(), file, seconds=4).records == []
    assert "3 measurements left" in capsys.readouterr().out


def test_nothing_is_timed_beside_a_peer_that_runs(file, capsys):
    module, peer = numbers(), PeerRun("none", Problem((4,), 1, 8, (3,), (1,), 1), "float16", False)
    work = [SimpleNamespace(record={"n": n}, parts=[peer] * (n == 2)) for n in (1, 2)]
    module.missing = lambda *_: work
    run(module, file)
    said = capsys.readouterr().out
    assert 0 <= said.find("ahead: PeerRun") < said.find("{'n': 1")  # it failed, so it has ended


def test_a_commit_is_required(file):
    with pytest.raises(SystemExit):
        study.parse(numbers(), [str(file)])


def test_drawing_needs_no_gpu(file, tmp_path, monkeypatch, capsys):
    run(numbers(), file)
    folder = tmp_path / "new" / "folder"
    monkeypatch.setattr("sys.argv", ["numbers", str(file), "--draw", str(folder)])
    assert study.main(numbers()) is None
    assert "3 numbers" in capsys.readouterr().out
    assert (folder / "picture").read_text() == "d"
