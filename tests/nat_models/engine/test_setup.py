from types import SimpleNamespace

import pytest
import torch
from omegaconf import OmegaConf

from nat_models.engine import setup


def test_precision_follows_the_device(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    assert setup._precision("auto") == setup._precision("gpu") == "bf16-mixed"
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    assert setup._precision("auto") == "32-true"
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    assert setup._precision("cpu") == "32-true"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert setup._precision("auto") == "32-true"


@pytest.mark.parametrize(("processes", "batches"), [(1, 8), (4, 2), (8, 1)])
def test_accumulation_makes_up_for_few_processes(processes, batches):
    trainer = SimpleNamespace(world_size=processes, accumulate_grad_batches=1)
    cfg = OmegaConf.create({"global_batch_size": 1024, "data": {"batch_size": 128}})
    setup.accumulate(trainer, cfg)
    assert trainer.accumulate_grad_batches == batches


@pytest.mark.parametrize("tf32", [True, False])
def test_tf32_is_a_switch(tf32):
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    try:
        setup.set_up_torch(OmegaConf.create({"tf32": tf32, "threads": None}))
        assert torch.get_float32_matmul_precision() == ("high" if tf32 else "highest")
        assert torch.backends.cudnn.allow_tf32 == tf32
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]
