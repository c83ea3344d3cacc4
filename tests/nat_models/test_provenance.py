import shutil
import subprocess

import pytest

from nat_models import provenance


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A repository of one commit that the code seems to be imported from."""
    monkeypatch.setattr(provenance, "__file__", str(tmp_path / "nat_models" / "provenance.py"))
    (tmp_path / "file").write_text("one")
    person = ["-c", "user.name=someone", "-c", "user.email=someone@example.org"]
    for command in (["init", "-q"], ["add", "."], [*person, "commit", "-q", "-m", "first"]):
        subprocess.run(["git", "-C", tmp_path, *command], check=True)
    return tmp_path


def test_a_changed_file_shows(checkout):
    clean = provenance.commit()
    assert len(clean) == 40
    (checkout / "file").write_text("two")
    assert provenance.commit() == f"{clean}-dirty"


def test_an_installed_package_has_no_commit(checkout):
    shutil.rmtree(checkout / ".git")
    assert provenance.commit() is None
