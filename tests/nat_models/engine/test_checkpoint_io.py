import os
import signal
from multiprocessing import get_context

import pytest
import torch

from nat_models.engine.checkpoint_io import AtomicCheckpointIO
from nat_models.errors import RunStopped


def test_round_trip_makes_folders_and_leaves_nothing_else(tmp_path):
    path = tmp_path / "a" / "b.ckpt"
    AtomicCheckpointIO().save_checkpoint({"x": torch.arange(3), "n": 1}, path)
    loaded = AtomicCheckpointIO().load_checkpoint(path)
    assert loaded["n"] == 1
    assert torch.equal(loaded["x"], torch.arange(3))
    assert os.listdir(path.parent) == ["b.ckpt"]


def test_full_disk_keeps_the_file_before(tmp_path, monkeypatch):
    path = tmp_path / "last.ckpt"
    AtomicCheckpointIO().save_checkpoint({"n": 1}, path)

    def full(checkpoint, file):
        file.write(b"half")
        raise RuntimeError(
            "PytorchStreamWriter failed writing file"
        )  # torch's report of a full disk

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(RunStopped, match=rf"{path}: the checkpoint could not be written"):
        AtomicCheckpointIO().save_checkpoint({"n": 2}, path)
    assert AtomicCheckpointIO().load_checkpoint(path) == {"n": 1}
    assert os.listdir(tmp_path) == ["last.ckpt"]


def test_kill_in_the_middle_of_a_save_keeps_the_file_before(tmp_path, monkeypatch):
    path = tmp_path / "last.ckpt"
    AtomicCheckpointIO().save_checkpoint({"n": 1}, path)

    def killed(checkpoint, file):
        file.write(b"half")
        file.flush()
        os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(torch, "save", killed)
    process = get_context("fork").Process(
        target=AtomicCheckpointIO().save_checkpoint, args=({"n": 2}, path)
    )
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert AtomicCheckpointIO().load_checkpoint(path) == {"n": 1}
    monkeypatch.undo()
    AtomicCheckpointIO().save_checkpoint({"n": 3}, path)
    assert os.listdir(tmp_path) == ["last.ckpt"]  # what was half written is gone


def test_code_in_a_checkpoint_is_not_run(tmp_path):
    path = tmp_path / "bad.ckpt"
    torch.save({"f": os.getcwd}, path)
    with pytest.raises(Exception, match="weights_only"):
        AtomicCheckpointIO().load_checkpoint(path, weights_only=False)
