"""A run that was stopped or killed, and resumed, is the run that was not."""

import os
import signal
from multiprocessing import get_context

import pytest
import torch
from lightning.pytorch.utilities.exceptions import SIGTERMException

from nat_models.engine import run
from nat_models.engine.callbacks import History

pytestmark = pytest.mark.usefixtures("undrawn")

BATCHES = 6  # an epoch: three optimizer steps of two batches each
STEPS = BATCHES // 2
OPTIONS = [
    "callbacks=ema",
    "callbacks.progress=null",
    "callbacks.ema.decay=0.5",
    "callbacks.last.every_n_steps=2",
    "trainer.max_epochs=3",
    "trainer.accumulate_grad_batches=2",
    f"trainer.limit_train_batches={BATCHES}",
    "trainer.limit_val_batches=2",
    "model.name=nat_demo",
]


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    return {"path": tmp_path_factory.mktemp("whole"), "done": False}


@pytest.fixture
def check(compose, small, chance, losses, whole_run, tmp_path):
    """check(): the run in the test's folder has the losses, weights and records of a whole one."""

    def check() -> None:
        whole = whole_run["path"]
        if not whole_run["done"]:
            run.train(compose("train", *small, *chance, *OPTIONS, f"paths.output_dir={whole}"))
            whole_run["done"] = True
        ours, theirs = losses(tmp_path), losses(whole)
        assert set(theirs.values()) == set(ours.values())
        assert ours == theirs
        last, expected = (
            torch.load(path / "last.ckpt", weights_only=True) for path in (tmp_path, whole)
        )
        for weights in ("state_dict", "current_model_state"):  # averaged, and trained
            for name, value in expected[weights].items():
                assert torch.equal(last[weights][name], value), name
        assert last["global_step"] == 3 * STEPS
        epochs, expected_epochs = (c["callbacks"]["History"]["epochs"] for c in (last, expected))
        assert len(epochs) == 3
        for epoch, expected_epoch in zip(epochs, expected_epochs, strict=True):
            assert {**epoch, "seconds": 0} == {**expected_epoch, "seconds": 0}
        metrics = [(path / "metrics.json").read_text() for path in (tmp_path, whole)]
        assert metrics[0] == metrics[1]

    return check


@pytest.mark.parametrize(
    ("stop", "workers"),
    [(1, 0), (STEPS, 0), (STEPS + 1, 2), (2 * STEPS, 2)],
    ids=["within", "end", "within_workers", "end_workers"],
)
def test_stopped_and_resumed_equals_uninterrupted(
    compose, small, chance, losses, check, tmp_path, monkeypatch, stop, workers
):
    options = [*small, *chance, *OPTIONS]
    options += [f"data.num_workers={workers}", f"paths.output_dir={tmp_path}"]
    original = History.on_train_batch_end

    def stopping(self, trainer, *arguments):
        original(self, trainer, *arguments)
        if trainer.global_step == stop:
            os.kill(os.getpid(), signal.SIGUSR1 if workers else signal.SIGTERM)

    monkeypatch.setattr(History, "on_train_batch_end", stopping)
    with pytest.raises(SIGTERMException):
        run.train(compose("train", *options))
    monkeypatch.setattr(History, "on_train_batch_end", original)
    assert max(losses(tmp_path)) == stop - 1
    run.train(compose("train", *options, f"ckpt={tmp_path}/last.ckpt"))
    check()


@pytest.mark.parametrize("batch", [5, 9], ids=str)
def test_killed_and_resumed_equals_uninterrupted(
    compose, small, chance, check, tmp_path, monkeypatch, batch
):
    cfg = compose("train", *small, *chance, *OPTIONS, f"paths.output_dir={tmp_path}")
    original = History.on_train_batch_end
    batches = 0

    def killed(self, *arguments):
        nonlocal batches
        original(self, *arguments)
        batches += 1
        if batches == batch:
            os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(History, "on_train_batch_end", killed)
    process = get_context("fork").Process(target=run.train, args=(cfg,))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    monkeypatch.setattr(History, "on_train_batch_end", original)
    cfg.ckpt = f"{tmp_path}/last.ckpt"
    run.train(cfg)
    check()


@pytest.mark.gpu
def test_the_scaler_of_fp16_goes_on_where_it_was(compose, small, tmp_path):
    options = [*small, "trainer.accelerator=gpu", "trainer.devices=1", "trainer.precision=16-mixed"]
    options += ["trainer.limit_train_batches=8", "trainer.limit_val_batches=1"]

    def scaler(folder: str, *more: str) -> dict[str, float]:
        run.train(compose("train", *options, f"paths.output_dir={tmp_path}/{folder}", *more))
        return torch.load(tmp_path / folder / "last.ckpt", weights_only=True)["MixedPrecision"]

    whole = scaler("whole", "trainer.max_epochs=2")
    first = scaler("parts", "trainer.max_epochs=1", "scheduler.warmup_epochs=0")
    rest = scaler("parts", "trainer.max_epochs=2", f"ckpt={tmp_path}/parts/last.ckpt")
    assert first["_growth_tracker"] < rest["_growth_tracker"]
    assert (rest["scale"], rest["_growth_tracker"]) == (whole["scale"], whole["_growth_tracker"])
