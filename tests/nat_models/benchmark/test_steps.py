import pytest
import torch
from torch import nn

from nat_models.benchmark.steps import create_images, create_model, create_step


class Probe(nn.Module):
    num_classes = 3

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(3, self.num_classes)

    def forward(self, x):
        return self.head(x.mean((2, 3)))


IMAGES = torch.linspace(-1, 1, 2 * 3 * 4 * 4).view(2, 3, 4, 4)


def test_inference_changes_nothing_and_keeps_no_graph():
    model = Probe()
    before = model.head.weight.clone()
    logits = create_step(model, IMAGES, "inference", "eager", "float32")()
    assert not model.training
    assert logits.is_inference()
    assert torch.equal(model.head.weight, before)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_training_step_moves_the_weights_and_clears_the_gradients(precision):
    model = Probe()
    before = model.head.weight.clone()
    create_step(model, IMAGES, "training", "eager", precision)()
    assert model.training
    assert model.head.weight.dtype == torch.float32
    assert not torch.equal(model.head.weight, before)
    assert model.head.weight.grad is None


def test_precision_is_the_dtype_of_the_forward_pass():
    logits = create_step(Probe(), IMAGES, "inference", "eager", "bfloat16")()
    assert logits.dtype == torch.bfloat16


@pytest.mark.slow
def test_compiled_computes_the_same():
    model = Probe()
    eager = create_step(model, IMAGES, "inference", "eager", "float32")()
    compiled = create_step(model, IMAGES, "inference", "compiled", "float32")()
    assert model._compiled_call_impl is not None
    torch.testing.assert_close(compiled, eager)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["inference", "training"])
@pytest.mark.parametrize("execution", ["compiled", "cuda_graphs"])
def test_compiled_steps_repeat_on_a_gpu(settings_with, kind, execution):
    settings = settings_with("device=cuda")
    model = create_model("test_vit", settings)
    step = create_step(model, create_images(model, 2, settings), kind, execution, "float16")
    for _ in range(4):
        step()
    assert all(parameter.isfinite().all() for parameter in model.parameters())


def test_the_input_size_reaches_models_of_a_fixed_size(settings_with):
    settings = settings_with("input_size=96")
    model = create_model("vit_tiny_patch16_224", settings)
    images = create_images(model, 2, settings)
    assert images.shape == (2, 3, 96, 96)
    assert model.eval()(images).shape == (2, 1000)


def test_without_input_size_the_images_have_the_models_own(settings_with):
    settings = settings_with("input_size=null")
    model = create_model("test_vit", settings)
    assert create_images(model, 1, settings).shape == (1, 3, 160, 160)


def test_images_are_not_constant(settings_with):
    settings = settings_with()
    assert create_images(create_model("test_vit", settings), 2, settings).std() > 0.5


def test_channels_last_holds_for_weights_and_images(settings_with):
    settings = settings_with("channels_last=true")
    model = create_model("resnet18", settings)
    images = create_images(model, 2, settings)
    assert images.is_contiguous(memory_format=torch.channels_last)
    assert model.layer1[0].conv1.weight.is_contiguous(memory_format=torch.channels_last)


def test_the_attention_backend_reaches_every_block(settings_with):
    model = create_model("nat_mini", settings_with("attention_backend=reference"))
    backends = [module.backend for module in model.modules() if hasattr(module, "backend")]
    assert backends
    assert set(backends) == {"reference"}
