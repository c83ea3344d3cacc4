import json
import re
import time

import pytest

from neighborhood_attention.tune import records as module
from neighborhood_attention.tune.records import Deadline, Records, format_table, progress

OF = {"device": "D", "versions": {"torch": "2"}, "commit": "a", "date": "2000-01-01"}


def test_a_later_run_goes_on(tmp_path):
    path = tmp_path / "records.json"
    first = Records(path, OF)
    first.add({"map": (7, 7), "tiles": {"forward": {"num_warps": 1}}, "us": 2.0, "error": 0.1})
    first.add({"map": (7, 7), "tiles": {"forward": {"num_warps": 2}}, "failure": "no"})
    first.choices.append({"map": (7, 7)})
    first.save()
    second = Records(path, OF | {"date": "2000-01-02"})
    assert len(second) == 2
    found = second.find({"tiles": {"forward": {"num_warps": 1}}, "map": (7, 7)})
    assert (found["us"], found["error"]) == (2.0, 0.1)
    assert second.find({"map": (7, 7), "tiles": {"forward": {"num_warps": 4}}}) is None
    second.add(dict(found, us=3.0))
    assert len(second) == 2
    assert second.choices == [{"map": [7, 7]}]
    second.save()
    assert json.loads(path.read_text())["candidates"][0]["us"] == 3.0
    assert json.loads(path.read_text())["date"] == "2000-01-02"


@pytest.mark.parametrize("name", ["device", "versions", "commit"])
def test_other_conditions_need_another_file(name, tmp_path):
    Records(tmp_path / "records.json", OF).save()
    with pytest.raises(ValueError, match=rf"records\.json: {name} .*, but this is other"):
        Records(tmp_path / "records.json", OF | {name: "other"})


def test_the_file_is_written_now_and_then(tmp_path, monkeypatch):
    path = tmp_path / "records.json"
    records = Records(path, OF)
    records.add({"map": 1})
    assert not path.exists()
    monkeypatch.setattr(module, "SAVE_EVERY", -1.0)
    records.add({"map": 2})
    assert len(json.loads(path.read_text())["candidates"]) == 2


def test_a_deadline_comes():
    assert 9 < Deadline(10).left <= 10
    assert Deadline(-1).left == 0


def test_progress_is_told_now_and_then(capsys, monkeypatch):
    with progress(3) as tell:
        tell("first")
        monkeypatch.setattr(module, "TELL_EVERY", -1.0)
        tell("second")
    assert capsys.readouterr().out == "2/3 second\n"


def test_a_terminal_shows_a_bar(capsys, monkeypatch):
    pytest.importorskip("rich")
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    monkeypatch.setenv("FORCE_COLOR", "1")
    with progress(1) as tell:
        tell("first")
        time.sleep(0.2)
    assert re.search(r"first.*100%", capsys.readouterr().out)


def test_columns_are_aligned():
    text = format_table(["a", "long"], [["xyz", "1"], ["b", "22"]])
    assert text == "a    long\nxyz  1\nb    22"
