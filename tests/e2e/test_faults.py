"""What befalls a run from outside: one message, and what was saved before stays."""

import errno
import os
import signal

import pytest
import torch

from nat_models.data import images
from nat_models.engine import run
from nat_models.errors import RunStopped

pytestmark = pytest.mark.usefixtures("undrawn")

OPTIONS = ["trainer.limit_train_batches=2", "trainer.limit_val_batches=1", "trainer.max_epochs=2"]


def test_a_loading_process_that_dies_is_named(compose, small, tmp_path, monkeypatch):
    main = os.getpid()

    def dying(*_):
        assert os.getpid() != main
        os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(images, "decode", dying)
    cfg = compose("train", *small, *OPTIONS, "data.num_workers=1", f"paths.output_dir={tmp_path}")
    with pytest.raises(RunStopped, match=r"data\.num_workers: a loading process died: .*Killed"):
        run.train(cfg)


def test_a_full_disk_ends_the_run_and_its_last_checkpoint_can_be_continued(
    compose, small, tmp_path, monkeypatch
):
    cfg = compose("train", *small, *OPTIONS, f"paths.output_dir={tmp_path}")
    original, saves = torch.save, 0

    def full(*arguments):
        nonlocal saves
        saves += 1
        if saves > 3:  # those of the first epoch are written
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        original(*arguments)

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(RunStopped, match=r"\.ckpt: the checkpoint could not be .*No space left"):
        run.train(cfg)
    monkeypatch.setattr(torch, "save", original)
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] == 2
    cfg.ckpt = f"{tmp_path}/last.ckpt"
    run.train(cfg)
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] == 4
