"""Stopping a run from outside."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from nat_models.engine import run
from nat_models.engine.module import Classifier
from nat_models.errors import ConfigError

ROOT = Path(__file__).parents[2]


def test_sigterm_stops_all_processes_exits_with_143_and_the_run_can_go_on(
    small, losses, compose, tmp_path
):
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    options = [*small, f"paths.root={tmp_path}", "name=stopped"]
    two = ["trainer.devices=2", "data.batch_size=64", "trainer.max_epochs=100"]
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "train.py"), *options, *two],
        env={**os.environ, "PYTHONPATH": path},
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob("stopped/*/best.ckpt")):  # the first epoch is over
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=30)
    assert process.returncode == 143, output
    assert output.splitlines()[-1] == "told to stop: saved, continue with ckpt=last"

    [folder] = tmp_path.glob("stopped/*")
    assert (folder / "train.log").read_text().count("device ") == 1
    one = ["trainer.max_epochs=2", "ckpt=last"]
    with pytest.raises(ConfigError, match=r"last\.ckpt: saved .* with 128 images a step, now 64"):
        run.train(compose("train", *options, *one, "data.batch_size=64"))
    run.train(compose("train", *options, *one, "data.batch_size=128"))
    assert list(losses(folder)) == list(range(2 * (1438 // 128)))


def test_stop_during_validation_finishes_it_first(small, compose, tmp_path, monkeypatch):
    original = Classifier.validation_step

    def stopping(self, batch, batch_idx):
        if batch_idx == 0 and self.trainer.current_epoch == 0:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, batch, batch_idx)

    monkeypatch.setattr(Classifier, "validation_step", stopping)
    options = [
        *small,
        "trainer.limit_train_batches=2",
        "trainer.max_epochs=2",
        f"paths.output_dir={tmp_path}",
    ]
    with pytest.raises(SystemExit):
        run.train(compose("train", *options))
    log = (tmp_path / "train.log").read_text()
    assert "epoch 1/2" in log
    assert "held-out loss" in log
    run.train(compose("train", *options, f"ckpt={tmp_path}/last.ckpt"))
    assert (tmp_path / "train.log").read_text().count("epoch ") == 2
