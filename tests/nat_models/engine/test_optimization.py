from types import SimpleNamespace

import pytest
import torch
from lightning import Trainer

from nat_models.engine.module import Classifier
from nat_models.engine.optimization import create_optimizer, lay_out_as_weights


@pytest.mark.parametrize("layer_decay", [None, 0.75], ids=str)
@pytest.mark.parametrize("decay_rpb", [True, False], ids=["decayed", "exempt"])
def test_decay_of_the_positional_biases_is_a_switch(decay_rpb, layer_decay):
    options = {"opt": "adamw", "lr": 1e-3, "weight_decay": 0.1, "layer_decay": layer_decay}
    module = Classifier(model={"name": "nat_demo"}, optimizer={**options, "decay_rpb": decay_rpb})
    optimizer, _ = module.schedule(epochs=10, updates_per_epoch=1)
    decay = {p: g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    for name, parameter in module.model.named_parameters():
        decayed = parameter.ndim > 1 and (decay_rpb or not name.endswith(".rpb"))
        assert decay[parameter] == (0.1 if decayed else 0.0), name
    rates = {g.get("lr_scale", 1.0) for g in optimizer.param_groups}
    assert (len(rates) > 1) == (layer_decay is not None)


def test_layers_decay_without_a_schedule_too():
    optimizer, scheduler = Classifier(
        model={"name": "nat_demo"},
        optimizer={"opt": "sgd", "lr": 0.1, "layer_decay": 0.5},
        scheduler={"sched": "none"},
    ).schedule(epochs=1, updates_per_epoch=1)
    assert scheduler is None
    assert len({group["lr"] for group in optimizer.param_groups}) > 1
    for group in optimizer.param_groups:
        assert group["lr"] == pytest.approx(0.1 * group["lr_scale"])


def test_only_a_gpu_gets_a_fused_optimizer():
    model = Classifier(model={"name": "nat_demo"}).model
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    options = {"opt": "adamw", "lr": 1e-3, "weight_decay": 0.1}
    assert not create_optimizer(model, trainer, **options).defaults["fused"]
    assert not create_optimizer(model, None, **options).defaults["fused"]


@pytest.mark.parametrize("name", ["adamw", "sgd"])
@pytest.mark.parametrize("fused", [True, False], ids=["to a GPU", "from a GPU"])
def test_a_checkpoint_of_another_device_does_not_tell_whether_steps_are_fused(name, fused):
    options = {"opt": name, "lr": 0.1, "weight_decay": 0.1}

    def optimizer(device):
        """On a layer that stays on the CPU, whose steps can be fused, too."""
        strategy = SimpleNamespace(root_device=torch.device(device))
        trainer = SimpleNamespace(strategy=strategy, precision="32-true")
        layer = torch.nn.Linear(3, 2)
        layer(torch.ones(1, 3)).sum().backward()
        return create_optimizer(layer, trainer, **options)

    before, now = optimizer("cpu" if fused else "cuda"), optimizer("cuda" if fused else "cpu")
    before.step()
    before.param_groups[0]["lr"] = 0.5
    saved = before.state_dict()
    now.load_state_dict(saved)
    assert [group["fused"] for group in now.param_groups] == 2 * [fused]
    assert [group["fused"] for group in saved["param_groups"]] == 2 * [not fused]
    assert now.param_groups[0]["lr"] == 0.5
    torch.testing.assert_close(now.state_dict()["state"], saved["state"])
    now.step()


def test_state_takes_the_memory_layout_of_the_weights():
    weight = torch.nn.Parameter(torch.randn(4, 3, 2, 2).to(memory_format=torch.channels_last))
    optimizer = torch.optim.AdamW([weight])
    weight.square().sum().backward()
    optimizer.step()
    state = optimizer.state[weight]
    average = state["exp_avg"]
    state["exp_avg"] = average.contiguous()
    lay_out_as_weights(optimizer)
    assert state["exp_avg"].stride() == weight.stride() != average.contiguous().stride()
    assert torch.equal(state["exp_avg"], average)


@pytest.mark.gpu
@pytest.mark.parametrize(("precision", "fused"), [("bf16-mixed", True), ("16-mixed", False)])
def test_fused_on_a_gpu_but_for_fp16(precision, fused):
    model = Classifier(model={"name": "nat_demo"}).model.cuda()
    trainer = Trainer(
        accelerator="gpu", devices=1, precision=precision, logger=False, enable_checkpointing=False
    )
    optimizer = create_optimizer(model, trainer, opt="adamw", lr=1e-3)
    assert optimizer.defaults["fused"] == fused
