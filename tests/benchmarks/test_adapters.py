import adapters
import pytest
import torch

from nat_models.benchmark.case import Case
from nat_models.models.base import neighborhood_attentions

CPU = torch.device("cpu")


def model_on(backend):
    torch.manual_seed(0)
    settings = {"input_size": 64, "attention_backend": backend}
    model = adapters.create_model(
        Case("dinat_mini", "inference", "eager", 2, "float32", **settings), CPU
    )
    for attention in neighborhood_attentions(model):  # large enough for the bias to matter
        torch.nn.init.normal_(attention.rpb)
    return model.eval()


def test_flex_attention_computes_the_same():
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected = model_on("reference")(images)
        actual = model_on("flex")(images)
        for attention in neighborhood_attentions(other := model_on("reference")):
            torch.nn.init.zeros_(attention.rpb)
        without_bias = other(images)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
    assert (without_bias - expected).abs().max() > 1e-2


@pytest.mark.parametrize("name", ["fused", "flex"])
def test_what_can_be_imported_is_available(name):
    assert name in adapters.available_backends()
