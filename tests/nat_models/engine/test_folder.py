import os
from multiprocessing import get_context
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from nat_models.engine.folder import claim, resume_path


def config(ckpt: str | None, root: Path) -> OmegaConf:
    paths = {"root": str(root), "output_dir": str(root / "x" / "now")}
    return OmegaConf.create({"ckpt": ckpt, "name": "x", "paths": paths})


def test_which_checkpoint_to_go_on_from(tmp_path):
    assert resume_path(config(None, tmp_path)) is None
    assert resume_path(config("a/b.ckpt", tmp_path)) == Path("a/b.ckpt")
    assert resume_path(config("auto", tmp_path)) is None
    with pytest.raises(ValueError, match=r"ckpt=last: there is no last\.ckpt under .*x"):
        resume_path(config("last", tmp_path))
    for age, folder in enumerate(("now", "before")):
        path = tmp_path / "x" / folder / "last.ckpt"
        path.parent.mkdir(parents=True)
        path.touch()
        os.utime(path, (1000 + age, 1000 + age))
    assert resume_path(config("auto", tmp_path)) == tmp_path / "x" / "now" / "last.ckpt"
    assert resume_path(config("last", tmp_path)) == tmp_path / "x" / "before" / "last.ckpt"


def hold(folder: Path, claimed, done) -> None:
    claim(folder, resuming=False)
    claimed.set()
    done.wait(30)


def test_two_runs_do_not_write_to_one_folder_at_a_time(tmp_path):
    context = get_context("fork")
    claimed, done = context.Event(), context.Event()
    process = context.Process(target=hold, args=(tmp_path / "run", claimed, done))
    process.start()
    assert claimed.wait(30)
    with pytest.raises(ValueError, match=r"paths\.output_dir=.*run: another run writes there"):
        claim(tmp_path / "run", resuming=True)
    process.kill()
    process.join()
    claim(tmp_path / "run", resuming=True)


def test_the_folder_of_a_finished_run_is_refused_unless_resumed(tmp_path):
    claim(tmp_path, resuming=False)
    (tmp_path / "last.ckpt").touch()
    with pytest.raises(ValueError, match=r"holds another run; continue it with ckpt=.*last\.ckpt"):
        claim(tmp_path, resuming=False)
    claim(tmp_path, resuming=True)


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"file/run: expected a folder that can be written to"):
        claim(tmp_path / "file" / "run", resuming=False)
