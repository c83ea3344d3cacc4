from types import SimpleNamespace

import pytest
import torch
import triton
from lightning.pytorch.profilers import SimpleProfiler
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import DictConfig, OmegaConf
from torch._inductor.runtime.cache_dir_utils import cache_dir

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
    setup.accumulate(trainer, steps_of(1024), images=1024)
    assert trainer.accumulate_grad_batches == batches


def steps_of(images: int, limit: float | None = None) -> DictConfig:
    data, trainer = {"batch_size": 128}, {"limit_train_batches": limit}
    return OmegaConf.create({"global_batch_size": images, "data": data, "trainer": trainer})


@pytest.mark.parametrize(
    ("cfg", "images", "message"),
    [
        (steps_of(300), 1024, r"global_batch_size=300: expected a multiple of 256"),
        (steps_of(1024), 1000, r"a step takes 1024 images over 2 processes and 4 batches, .* 1000"),
        (steps_of(512, 3), 1024, r"limit_train_batches=3: expected a multiple of 2"),
        (steps_of(512, 0.5), 1024, r"limit_train_batches=0\.5: expected a multiple of 2"),
    ],
    ids=["batches", "images", "limit", "share"],
)
def test_steps_that_cannot_be_made_are_named(cfg, images, message):
    trainer = SimpleNamespace(world_size=2, accumulate_grad_batches=1)
    with pytest.raises(ValueError, match=message):
        setup.accumulate(trainer, cfg, images)


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


def test_compiled_code_is_kept_where_the_configuration_says(tmp_path, monkeypatch):
    for variable in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"):
        monkeypatch.setenv(variable, "elsewhere")  # as PyTorch itself sets the first one
    cfg = {"tf32": False, "threads": None, "paths": {"cache": str(tmp_path)}}
    setup.set_up_torch(OmegaConf.create(cfg))
    assert cache_dir() == f"{tmp_path}/torchinductor"
    assert triton.knobs.cache.dir == f"{tmp_path}/triton"


@pytest.mark.parametrize(("rank", "profiles"), [(0, True), (1, False)])
def test_the_first_process_alone_is_profiled(compose, monkeypatch, rank, profiles):
    monkeypatch.setattr(rank_zero_only, "rank", rank)
    cfg = compose("train", "profiler=simple", "trainer.accelerator=cpu", "logger=none")
    assert isinstance(setup.make_trainer(cfg).profiler, SimpleProfiler) == profiles


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("trainer.precision=fp16", r"trainer\.precision=fp16: Precision 'fp16' is invalid"),
        ("trainer.accelerator=gpu", r"trainer\.accelerator=gpu: No supported gpu backend found"),
        ("trainer.accelerator=foo", r"trainer\.accelerator=foo: .* invalid accelerator name"),
        ("trainer.strategy=foo", r"trainer\.strategy=foo: .* invalid strategy name"),
        ("trainer.devices=foo", r"trainer\.devices=foo: .* an int > 0"),
    ],
)
def test_what_lightning_cannot_use_is_named(compose, monkeypatch, override, message):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match=rf"^{message}"):
        setup.make_trainer(compose("train", "logger=none", override))


@pytest.mark.parametrize("epochs", ["abc", "0", "1.5", "null"])
def test_a_number_of_epochs_that_cannot_be_is_named(compose, epochs):
    cfg = compose("train", f"trainer.max_epochs={epochs}")
    given = cfg.trainer.max_epochs
    with pytest.raises(ValueError, match=f"trainer.max_epochs={given}: expected an integer, at l"):
        setup.set_up_torch(cfg)
