import pytest
import torch
from torch import nn

from nat_models.benchmark.case import Case
from nat_models.benchmark.steps import (
    capture,
    count_flops,
    create_images,
    create_model,
    create_step,
)

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


class Probe(nn.Module):
    num_classes = 3

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(3, self.num_classes)

    def forward(self, x):
        return self.head(x.mean((2, 3)))


IMAGES = torch.linspace(-1, 1, 2 * 3 * 4 * 4).view(2, 3, 4, 4)


def case_of(kind="inference", execution="eager", precision="float32", model="test_vit", **settings):
    return Case(model, kind, execution, 2, precision, **settings)


def test_inference_changes_nothing_and_keeps_no_graph():
    model = Probe()
    before = model.head.weight.clone()
    logits = create_step(model, IMAGES, case_of())()
    assert not model.training
    assert logits.is_inference()
    assert torch.equal(model.head.weight, before)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_training_step_moves_the_weights_and_clears_the_gradients(precision):
    model = Probe()
    before = model.head.weight.clone()
    create_step(model, IMAGES, case_of("training", precision=precision))()
    assert model.training
    assert model.head.weight.dtype == torch.float32
    assert not torch.equal(model.head.weight, before)
    assert model.head.weight.grad is None


def test_precision_is_the_dtype_of_the_forward_pass():
    logits = create_step(Probe(), IMAGES, case_of(precision="bfloat16"))()
    assert logits.dtype == torch.bfloat16


def test_true_precision_is_the_dtype_of_weights_and_images():
    case = case_of(precision="float16-true")
    assert {p.dtype for p in create_model(case, CPU).parameters()} == {torch.float16}
    assert create_images(case, CPU).dtype == torch.float16


@pytest.mark.parametrize(("precision", "products"), [("tf32", "high"), ("float32", "highest")])
def test_tf32_is_used_where_it_is_asked_for_alone(precision, products):
    create_step(Probe(), IMAGES, case_of(precision="float32" if products == "high" else "tf32"))
    create_step(Probe(), IMAGES, case_of(precision=precision))
    assert torch.get_float32_matmul_precision() == products
    assert torch.backends.cudnn.allow_tf32 == (precision == "tf32")


@pytest.mark.slow
def test_compiled_computes_the_same():
    model = Probe()
    eager = create_step(model, IMAGES, case_of())()
    compiled = create_step(model, IMAGES, case_of(execution="compiled"))()
    assert model._compiled_call_impl is not None
    torch.testing.assert_close(compiled, eager)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["inference", "training"])
@pytest.mark.parametrize("execution", ["captured", "compiled", "cuda_graphs", "captured_compiled"])
def test_steps_repeat_on_a_gpu(kind, execution):
    case = case_of(kind, execution, "float16")
    model = create_model(case, CUDA)
    # Detached: a clone in the graph would bind the gradients to this stream, not the captured one.
    before = [parameter.detach().clone() for parameter in model.parameters()]
    step = create_step(model, create_images(case, CUDA), case)
    for _ in range(4):
        step()
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    same = [torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True)]
    assert all(same) == (kind == "inference")


@pytest.mark.gpu
def test_a_captured_step_is_replayed():
    total, ran = torch.zeros(1, device="cuda"), []

    def step():
        ran.append(None)
        total.add_(1)

    replay = capture(step)
    for _ in range(5):
        replay()
    assert total.item() == 5
    assert len(ran) == 2


def test_the_input_size_reaches_models_of_a_fixed_size():
    case = case_of(model="vit_tiny_patch16_224", input_size=96)
    images = create_images(case, CPU)
    assert images.shape == (2, 3, 96, 96)
    assert create_model(case, CPU).eval()(images).shape == (2, 1000)


def test_without_input_size_the_images_have_the_models_own():
    assert create_images(case_of(), CPU).shape == (2, 3, 160, 160)


def test_images_are_not_constant():
    assert create_images(case_of(input_size=64), CPU).std() > 0.5


def test_channels_last_holds_for_weights_and_images():
    case = case_of(model="resnet18", channels_last=True)
    images = create_images(case, CPU)
    assert images.is_contiguous(memory_format=torch.channels_last)
    weight = create_model(case, CPU).layer1[0].conv1.weight
    assert weight.is_contiguous(memory_format=torch.channels_last)


def test_the_attention_backend_reaches_every_block():
    model = create_model(case_of(model="nat_mini", attention_backend="gemm"), CPU)
    backends = [module.backend for module in model.modules() if hasattr(module, "backend")]
    assert backends
    assert set(backends) == {"gemm"}


@pytest.mark.parametrize(
    ("model", "published"), [("nat_tiny", 4.3), ("swin_tiny_patch4_window7_224", 4.5)]
)
def test_operations_are_twice_the_published_multiplications(model, published):
    assert count_flops(case_of(model=model)) / 2e9 == pytest.approx(published, abs=0.05)


def test_operations_grow_with_the_image():
    small, large = (count_flops(case_of(model="nat_mini", input_size=n)) for n in (224, 448))
    assert large == pytest.approx(4 * small, rel=0.01)
