import subprocess

import commits
import pytest

ONE, TWO = "340fb3f" + "0" * 33, "37f40b6" + "1" * 33


@pytest.fixture
def history(tmp_path, monkeypatch):
    """Three commits, the second with other notes, the third with another kernel."""

    def git(*words):
        settings = ["-c", "user.name=a", "-c", "user.email=a@b"]
        command = ["git", "-C", tmp_path, *settings, *words]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        return done.stdout.strip()

    monkeypatch.setattr(commits, "ROOT", tmp_path)
    (tmp_path / "kernels").mkdir()
    git("init", "-q")
    found = []
    for number, file in enumerate(("kernels/a.py", "notes", "kernels/a.py")):
        (tmp_path / file).write_text(str(number))
        git("add", "-A")
        git("commit", "-q", "-m", "m")
        found.append(git("rev-parse", "HEAD"))
    return found


def test_a_measurement_is_old_where_the_kernels_have_changed(history):
    first, second, third = history
    assert not commits.is_old(first, second, None)
    assert commits.is_old(second[:7], third, None)
    assert not commits.is_old(third, third, None)


def test_where_git_cannot_tell_nothing_is_old(history, tmp_path, monkeypatch):
    assert not commits.is_old("unknown", history[0], None)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert not commits.is_old("still unknown", history[0], None)


@pytest.mark.parametrize(
    ("before", "again", "expected"),
    [
        (ONE, [], True),
        (TWO[:7], [], False),
        (ONE, ["340fb3f"], True),
        (ONE[:7], [ONE], True),
        (ONE, ["abc1234"], False),
        (TWO, [TWO], False),
    ],
)
def test_without_git_the_commits_to_measure_again_are_named(before, again, expected):
    assert commits.is_old(before, TWO, again) == expected


def test_a_mixture_is_counted():
    assert commits.summary([{"commit": ONE}] * 2) == "commit 340fb3f"
    mixed = [{"commit": TWO}, {"commit": ONE}, {"commit": ONE[:7]}]
    assert commits.summary(mixed) == "commits 340fb3f (2), 37f40b6 (1)"
