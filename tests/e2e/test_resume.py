"""A run that was stopped and resumed is the run that was not."""

import os
import signal

import pytest
import torch
from lightning.pytorch.utilities.exceptions import SIGTERMException

from nat_models.engine import run
from nat_models.engine.callbacks import History

STEPS = 5  # an epoch


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    return {"path": tmp_path_factory.mktemp("whole"), "done": False}


@pytest.mark.parametrize(
    ("stop", "workers"), [(3, 0), (STEPS, 0), (STEPS + 1, 0), (STEPS + 2, 2), (2 * STEPS, 2)]
)
def test_stopped_and_resumed_equals_uninterrupted(
    compose, small, chance, losses, whole_run, tmp_path, monkeypatch, stop, workers
):
    options = [*small, *chance, "trainer.max_epochs=3", f"trainer.limit_train_batches={STEPS}"]
    options += ["trainer.limit_val_batches=2"]
    if not whole_run["done"]:
        run.train(compose("train", *options, f"paths.output_dir={whole_run['path']}"))
        whole_run["done"] = True

    options += [f"data.num_workers={workers}", f"paths.output_dir={tmp_path}"]
    original = History.on_train_batch_end

    def stopping(self, trainer, *arguments):
        original(self, trainer, *arguments)
        if trainer.global_step == stop:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(History, "on_train_batch_end", stopping)
    with pytest.raises(SIGTERMException):
        run.train(compose("train", *options))
    monkeypatch.setattr(History, "on_train_batch_end", original)
    assert max(losses(tmp_path)) == stop - 1
    run.train(compose("train", *options, f"ckpt={tmp_path}/last.ckpt"))

    ours, theirs = losses(tmp_path), losses(whole_run["path"])
    assert list(theirs) == list(range(3 * STEPS))
    assert ours == theirs
    last, expected = (
        torch.load(path / "last.ckpt", weights_only=True) for path in (tmp_path, whole_run["path"])
    )
    for name, value in expected["state_dict"].items():
        assert torch.equal(last["state_dict"][name], value), name
    epochs, expected_epochs = (c["callbacks"]["History"]["epochs"] for c in (last, expected))
    assert len(epochs) == 3
    for epoch, expected_epoch in zip(epochs, expected_epochs, strict=True):
        assert {**epoch, "seconds": 0} == {**expected_epoch, "seconds": 0}
    assert (tmp_path / "metrics.json").read_text() == (
        whole_run["path"] / "metrics.json"
    ).read_text()
