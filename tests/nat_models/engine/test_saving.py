import os
import signal
from types import SimpleNamespace

import pytest
import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch import distributed, nn
from torch.utils.data import DataLoader

from nat_models.engine.saving import LastCheckpoint, StopOnSignal


class Scalar(LightningModule):
    def __init__(self, signals: dict[int, int]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))
        self.signals = signals

    def training_step(self, batch, batch_idx):
        if number := self.signals.get(batch_idx):
            os.kill(os.getpid(), number)
        return self.weight.sum()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(tmp_path, signals: dict[int, int], **options) -> Trainer:
    trainer = Trainer(
        accelerator="cpu", max_epochs=1, logger=False, enable_model_summary=False,
        enable_progress_bar=False, callbacks=[LastCheckpoint(
            every_n_steps=2, dirpath=str(tmp_path), filename="{step}", save_top_k=-1),
            StopOnSignal()], **options,
    )  # fmt: skip
    trainer.fit(Scalar(signals), DataLoader(torch.zeros(10), batch_size=1))
    return trainer


def saved(tmp_path) -> list[int]:
    return sorted(int(path.stem.partition("=")[2]) for path in tmp_path.glob("*.ckpt"))


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
def test_to_agree_no_process_waits_for_its_gpu():
    device = torch.device("cuda", 0)
    trainer = SimpleNamespace(
        world_size=2,  # as far as it is asked: the group is of one
        strategy=SimpleNamespace(root_device=device),
        _signal_connector=SimpleNamespace(received_sigterm=False),
    )
    distributed.init_process_group("nccl", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        told = StopOnSignal()
        told._stop_if_told(trainer)  # starts NCCL
        told._on_signal(signal.SIGTERM, None)
        torch.cuda.set_sync_debug_mode("error")
        told._stop_if_told(trainer)
        told._stop_if_told(trainer)
    finally:
        torch.cuda.set_sync_debug_mode("default")
        distributed.destroy_process_group()
    assert trainer._signal_connector.received_sigterm


def test_saves_every_so_many_steps_and_at_the_end(tmp_path):
    fit(tmp_path, {}, limit_train_batches=5)
    assert saved(tmp_path) == [2, 4, 5]


def test_no_save_amid_an_accumulated_step(tmp_path):
    fit(tmp_path, {}, accumulate_grad_batches=2)
    steps = [torch.load(p, weights_only=True) for p in tmp_path.glob("*.ckpt")]
    assert len(steps) == 3  # after two and four of five steps, and at the end
    for content in steps:
        progress = content["loops"]["fit_loop"]["epoch_loop.batch_progress"]["total"]
        assert progress["processed"] == 2 * content["global_step"]


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2], ids=["term", "usr1", "usr2"]
)
def test_a_signal_stops_after_the_whole_step_and_saves(tmp_path, number):
    with pytest.raises(SIGTERMException):
        fit(tmp_path, {2: number}, accumulate_grad_batches=3)
    assert saved(tmp_path) == [1]
    assert signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler)


@pytest.mark.parametrize("warning", [signal.SIGUSR1, signal.SIGUSR2], ids=["usr1", "usr2"])
def test_in_slurm_a_job_is_queued_again_on_its_warning_when_it_is_saved(
    tmp_path, monkeypatch, warning
):
    asked = tmp_path / "asked"
    command = tmp_path / "scontrol"
    command.write_text(f'#!/bin/sh\necho "$@" {tmp_path}/b/*.ckpt >> {asked}\n')
    command.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    with pytest.raises(SIGTERMException):
        fit(tmp_path / "a", {2: signal.SIGTERM})
    assert not asked.exists()
    with pytest.raises(SIGTERMException):
        fit(tmp_path / "b", {2: warning})
    assert asked.read_text() == f"requeue 17 {tmp_path}/b/step=2.ckpt {tmp_path}/b/step=3.ckpt\n"
