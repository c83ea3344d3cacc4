import gc
from functools import partial

import pytest
import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.plugins import MixedPrecision
from timm.optim import param_groups_weight_decay
from torch import distributed, nn
from torch.amp import GradScaler
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule
from torch.utils.data import DataLoader
from two_processes import free_port, run_two

from nat_models.engine import sharding
from nat_models.engine.local_shards import LocalShards
from nat_models.engine.module import Classifier


@pytest.fixture
def mesh():
    """Of this process alone."""
    distributed.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{free_port()}", rank=0, world_size=1
    )
    yield init_device_mesh("cpu", (1,))
    distributed.destroy_process_group()


class Model(nn.Module):
    """710 parameters: two blocks, and a layer that is in none."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 38))
        self.head = nn.Linear(4, 100)

    def forward(self, x):
        return torch.cat([self.head(x), self.blocks(x)], dim=1)


@pytest.mark.parametrize(("most", "separate"), [(710, False), (709, True)], ids=["small", "large"])
def test_a_large_model_is_gathered_block_by_block(monkeypatch, mesh, most, separate):
    monkeypatch.setattr(sharding, "MAX_AT_ONCE", most)
    model = Model()
    assert sharding.separate_blocks(model) == (list(model.blocks) if separate else [])
    sharding.shard(model, mesh)
    kinds = [isinstance(module, FSDPModule) for module in (model, *model.blocks, model.head)]
    assert kinds == [True, separate, separate, False]


@pytest.mark.parametrize(("most", "stay"), [(710, True), (709, False)], ids=["small", "large"])
def test_a_small_models_gathered_weights_keep_their_addresses(monkeypatch, mesh, most, stay):
    monkeypatch.setattr(sharding, "MAX_AT_ONCE", most)
    model = Model()
    sharding.shard(model, mesh)
    addresses, taken = [], []
    model.head.register_forward_pre_hook(
        lambda module, _: addresses.append(module.weight.data_ptr())
    )
    for _ in range(3):
        model(torch.ones(1, 4)).sum().backward()
        # What FSDP has freed is taken by someone else.
        taken += [torch.empty_like(parameter.to_local()) for parameter in model.parameters()]
    assert (len(set(addresses)) == 1) == stay


def test_gathered_weights_are_those_of_the_last_step(mesh):
    model = Model()
    sharding.shard(model, mesh)
    x = torch.ones(1, 4)
    before = model(x)
    before.sum().backward()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.to_local().zero_()
    assert before.any()
    assert not model(x).any()


OPTIMIZERS = {
    "adamw": torch.optim.AdamW,
    "sgd": partial(torch.optim.SGD, momentum=0.9),
    "sgd without state": torch.optim.SGD,
    "fused sgd": partial(torch.optim.SGD, momentum=0.9, fused=True),
    "fused sgd without state": partial(torch.optim.SGD, fused=True),
    "rmsprop": torch.optim.RMSprop,
}


class Regression(LightningModule):
    """Trains `Model` by itself."""

    configure_model = Classifier.configure_model
    configure_gradient_clipping = Classifier.configure_gradient_clipping

    def __init__(self, optimizer):
        super().__init__()
        torch.manual_seed(0)
        self.model = Model()
        self.create = optimizer

    def training_step(self, batch, batch_idx):
        return self.model(batch).square().mean()

    def configure_optimizers(self):
        return self.create(param_groups_weight_decay(self.model, 0.1), lr=0.1)


def fit(strategy, optimizer, epochs, resumed=None, **options):
    """Train, and return the trainer and its checkpoint."""
    trainer = Trainer(
        accelerator="cpu", devices=1, strategy=strategy, max_epochs=epochs, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        use_distributed_sampler=False, **options,
    )  # fmt: skip
    batches = torch.arange(24.0).view(3, 2, 4).sin()
    trainer.fit(Regression(optimizer), DataLoader(batches, batch_size=None), ckpt_path=resumed)
    return trainer


@pytest.fixture
def _alone(monkeypatch):
    """A group of one process."""
    monkeypatch.setenv("MASTER_PORT", str(free_port()))
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    yield
    if distributed.is_initialized():
        distributed.destroy_process_group()
    gc.collect()  # a process forked later would wait for the threads of a group that it collects


@pytest.mark.usefixtures("_alone")
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_checkpoints_are_those_of_one_process(tmp_path, name):
    optimizer = OPTIMIZERS[name]
    strategies = {"auto": lambda: "auto", "fsdp2": sharding.FSDP2}
    paths = {}
    for kind, strategy in strategies.items():
        trainer = fit(strategy(), optimizer, 1)
        held = LocalShards.of(trainer.optimizers[0])
        assert (held is not None) == (kind == "fsdp2" and name != "rmsprop")
        paths[kind] = tmp_path / f"{kind}.ckpt"
        trainer.save_checkpoint(paths[kind])
    saved = [torch.load(path, weights_only=True) for path in paths.values()]
    assert_same(saved[1], saved[0])
    for first, then in (("auto", "fsdp2"), ("fsdp2", "fsdp2"), ("fsdp2", "auto"), ("auto", "auto")):
        path = tmp_path / f"{first}-{then}.ckpt"
        fit(strategies[then](), optimizer, 2, resumed=paths[first]).save_checkpoint(path)
        saved.append(torch.load(path, weights_only=True))
    for resumed in saved[2:-1]:
        assert_same(resumed, saved[-1])


class SaveAtFirst(Callback):
    """Saves before any step."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == 0:
            trainer.save_checkpoint(f"{trainer.default_root_dir}/first.ckpt")


@pytest.mark.usefixtures("_alone")
def test_to_save_before_the_first_step_changes_nothing(tmp_path):
    states = []
    for callbacks in ([], [SaveAtFirst()]):
        options = {"callbacks": callbacks, "default_root_dir": tmp_path}
        trainer = fit(sharding.FSDP2(), torch.optim.AdamW, 1, **options)
        states.append(trainer.strategy.optimizer_state(trainer.optimizers[0]))
    torch.testing.assert_close(states[1], states[0])
    path = tmp_path / "first.ckpt"
    trainer = fit(sharding.FSDP2(), torch.optim.AdamW, 1, resumed=path)
    resumed = trainer.strategy.optimizer_state(trainer.optimizers[0])
    torch.testing.assert_close(resumed, states[0])


@pytest.mark.usefixtures("_alone")
@pytest.mark.parametrize("strategy", ["auto", "fsdp2"])
def test_a_fused_optimizer_goes_on_as_one_that_is_not(tmp_path, strategy):
    fit("auto", partial(torch.optim.AdamW, fused=False), 1).save_checkpoint(tmp_path / "it.ckpt")
    fused = partial(torch.optim.AdamW, fused=True)
    strategy = sharding.FSDP2() if strategy == "fsdp2" else strategy
    trainer = fit(strategy, fused, 2, resumed=tmp_path / "it.ckpt")
    assert trainer.global_step == 6


def assert_same(ours, theirs):
    torch.testing.assert_close(comparable(ours), comparable(theirs), rtol=1e-4, atol=1e-6)


def comparable(checkpoint):
    """Weights and optimizer; states in the groups' order, for FSDP2 numbers them as the model."""
    (saved,) = checkpoint["optimizer_states"]
    groups = [dict(group) for group in saved["param_groups"]]
    order = [number for group in groups for number in group.pop("params")]
    states = [saved["state"].get(number, {}) for number in order]
    return [dict(checkpoint["state_dict"]), states, groups]


class Convolution(LightningModule):
    """Weights [4, 3, 2, 2]."""

    def __init__(self):
        super().__init__()
        self.model = nn.Conv2d(3, 4, 2)


def load(_rank, path):
    """One of two processes: what it has loaded, gathered."""
    module = Convolution()
    sharding.shard(module.model, init_device_mesh("cpu", (2,)))
    strategy = sharding.FSDP2()
    strategy.connect(module)
    strategy.optimizers = [torch.optim.SGD(module.parameters(), momentum=0.9)]
    strategy.load_optimizer_state_dict(strategy.load_checkpoint(path))
    weight = module.model.weight
    momentum = strategy.optimizers[0].state[weight]["momentum_buffer"]
    assert momentum.to_local().stride() == weight.to_local().stride()  # fused kernels rely on it
    return [x.full_tensor().tolist() for x in (weight, momentum)]


@pytest.mark.slow
def test_what_was_saved_in_channels_last_is_loaded_in_its_order(tmp_path):
    module = Convolution().to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(module.parameters(), momentum=0.9)
    module.model(torch.randn(1, 3, 2, 2)).sum().backward()
    optimizer.step()
    saved = {"state_dict": module.state_dict(), "optimizer_states": [optimizer.state_dict()]}
    torch.save(saved, tmp_path / "it.ckpt")
    momentum = optimizer.state[module.model.weight]["momentum_buffer"]
    expected = [module.model.weight.tolist(), momentum.tolist()]
    assert run_two(load, tmp_path / "it.ckpt") == {0: expected, 1: expected}


@pytest.mark.usefixtures("_alone")
def test_gradients_are_clipped_by_value(tmp_path):
    weights = []
    for strategy in ("auto", sharding.FSDP2()):
        options = {"gradient_clip_val": 1e-4, "gradient_clip_algorithm": "value"}
        fit(strategy, torch.optim.SGD, 1, **options).save_checkpoint(tmp_path / "it.ckpt")
        weights.append(torch.load(tmp_path / "it.ckpt", weights_only=True)["state_dict"])
    torch.testing.assert_close(weights[1], weights[0])


def test_a_scaler_keeps_the_dtensors():
    optimizer = torch.optim.SGD(nn.Linear(2, 2).parameters())
    strategy = sharding.FSDP2()
    strategy.optimizers = [optimizer]
    strategy.precision_plugin = MixedPrecision("16-mixed", "cpu", GradScaler("cpu"))
    strategy.on_train_start()
    assert LocalShards.of(optimizer) is None
