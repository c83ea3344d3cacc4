import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.models import PretrainedCfg

from nat_models.data import ImageDataModule
from nat_models.engine.building import build_model, checkpoint_activations, neighborhood_attentions
from nat_models.engine.module import Classifier

SMALL = {"embed_dim": 32, "depths": (1, 1, 1, 1), "num_heads": (1, 1, 1, 1)}


def test_backend_is_set_on_every_neighborhood_attention():
    model = build_model("nat_demo", attention_backend="reference")
    assert [a.backend for a in neighborhood_attentions(model).values()] == ["reference"] * 4
    assert {a.backend for a in neighborhood_attentions(build_model("nat_demo")).values()} == {None}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": None}, r"model\.name is not set"),
        (
            {"name": "nat_tinny"},
            r"model\.name=nat_tinny: timm has no such model; did you mean nat_tiny",
        ),
        (
            {"name": "nat_demo", "attention_backend": "best"},
            r"model\.attention_backend=best: expected one of",
        ),
        ({"name": "test_vit", "weights_of": "nat_x"}, r"model\.weights_of=nat_x: timm has no such"),
        (
            {"name": "test_vit", "weights_of": "nat_demo"},
            r"weights_of=nat_demo: timm knows no w",
        ),
        ({"name": None, "key": "task.teacher"}, r"^task\.teacher\.name is not set"),
        ({"name": "test_vit", "rescale_to": 64}, r"rescale_to=64: test_vit has no dilations"),
        (
            {"name": "test_vit", "attention_backend": "fused"},
            r"test_vit has no neighborhood attention",
        ),
    ],
)
def test_bad_model_is_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        build_model(**arguments)


def test_weights_of_another_model_but_for_its_classifier(tmp_path, monkeypatch):
    source = timm.create_model("dinat_mini", num_classes=7, **SMALL)
    save_file(source.state_dict(), tmp_path / "x.safetensors")
    cfg = PretrainedCfg(file=str(tmp_path / "x.safetensors"), num_classes=7)
    monkeypatch.setattr(timm, "get_pretrained_cfg", lambda name: cfg)
    model = build_model("nat_mini", weights_of="dinat_mini", num_classes=3, kernel_size=5, **SMALL)
    loaded = model.state_dict()
    for name, value in source.state_dict().items():
        if name.endswith(".rpb"):
            assert loaded[name].shape[-1] == 9
        elif not name.startswith("head"):
            assert torch.equal(loaded[name], value), name
    assert loaded["head.fc.weight"].shape == (3, 256)


def test_dilations_and_input_size_are_rescaled():
    model = build_model("dinat_mini", rescale_to=384, **{**SMALL, "depths": (2, 2, 2, 2)})
    found = [a.dilation[0] for a in neighborhood_attentions(model).values()]
    assert found == [1, 13, 1, 6, 1, 3, 1, 1]
    data = ImageDataModule("fake", options={"size": 1})
    data.follow(model)
    assert data.config["input_size"] == (3, 384, 384)


def test_checkpointed_activations_change_no_gradient_and_save_memory():
    gradients, kept = [], []
    for switch in (False, True):
        torch.manual_seed(0)
        module = Classifier(model={"name": "nat_demo"}, grad_checkpointing=switch)
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, sizes=sizes: (sizes.append(t.numel()), t)[1], lambda t: t
        ):
            loss = module(torch.ones(2, 1, 28, 28)).square().sum()
        loss.backward()
        gradients.append([p.grad for p in module.parameters()])
        kept.append(sum(sizes))
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs)
    assert kept[1] < 0.5 * kept[0]


def test_a_model_without_checkpointing_is_named():
    with pytest.raises(ValueError, match=r"task\.grad_checkpointing=true: .* does not support it"):
        checkpoint_activations(torch.nn.Linear(1, 1))
