"""Models leave PyTorch with batch and image size left open: torch.export, and ONNX by dynamo."""

import onnxruntime
import pytest
import torch
from torch.export import Dim

TWO_BLOCKS = {"depths": (1, 1), "num_heads": (1, 2), "dilations": [[8], [1]]}
SETTINGS = {
    "nat_mini": TWO_BLOCKS,
    "dinat_s_tiny": TWO_BLOCKS,
    "dinat_isotropic_small": {"depth": 1, "dilations": [2]},
    "vitrpb_small": {"depth": 1},
}
# An image to export with, and others that the result must take.
SIZES = {
    "nat_mini": [(224, 256), (224, 232), (231, 261)],
    "dinat_s_tiny": [(224, 256), (256, 232)],  # whole patches and even maps, as exported
    "dinat_isotropic_small": [(224, 256), (272, 224)],
    "vitrpb_small": [(224, 224)],
}


def dynamic_shapes(sizes):
    any_size = {2: Dim.DYNAMIC, 3: Dim.DYNAMIC} if len(sizes) > 1 else {}
    return ({0: Dim("batch"), **any_size},)


@pytest.mark.parametrize(("name", "sizes"), SIZES.items(), ids=SIZES)
def test_torch_export(tiny_model, name, sizes):
    model = tiny_model(name, **SETTINGS[name])
    example = torch.randn(2, 3, *sizes[0])
    program = torch.export.export(model, (example,), dynamic_shapes=dynamic_shapes(sizes))
    for batch, size in enumerate(sizes, start=3):
        images = torch.randn(batch, 3, *size)
        torch.testing.assert_close(program.module()(images), model(images))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["nat_mini", "dinat_s_tiny", "vitrpb_small"])
def test_onnx(tiny_model, name, tmp_path):
    sizes = SIZES[name]
    model, path = tiny_model(name, **SETTINGS[name]), tmp_path / "model.onnx"
    torch.onnx.export(
        model, (torch.randn(2, 3, *sizes[0]),), path, dynamo=True, verbose=False,
        dynamic_shapes=dynamic_shapes(sizes),
    )  # fmt: skip
    session = onnxruntime.InferenceSession(path)
    for batch, size in enumerate(sizes, start=1):
        images = torch.randn(batch, 3, *size)
        (logits,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
        torch.testing.assert_close(torch.from_numpy(logits), model(images), rtol=1e-4, atol=1e-5)
