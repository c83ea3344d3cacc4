"""The models as backbones of detection and segmentation: sizes, and a detector of torchvision."""

from math import ceil

import pytest
import timm
import torch
from torch import nn
from torchvision.models.detection import RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

NARROW = {"embed_dim": 16, "depths": (2, 2, 1, 2), "num_heads": (1, 1, 2, 4)}


@pytest.mark.parametrize(
    ("size", "dilations"),
    [((800, 1344), "coco"), ((512, 2048), "ade20k"), ((301, 477), "coco"), ((50, 35), "ade20k")],
    ids=["coco", "cityscapes", "odd", "smaller-than-windows"],
)
@pytest.mark.parametrize("name", ["dinat_mini", "dinat_s_tiny"])
def test_maps_of_large_odd_and_small_images(name, size, dilations):
    backbone = timm.create_model(name, features_only=True, dilations=dilations, **NARROW).eval()
    with torch.inference_mode():
        maps = backbone(torch.randn(1, 3, *size))
    assert [tuple(m.shape) for m in maps] == [
        (1, *(ceil(side / reduction) for side in size), 16 * reduction // 4)
        for reduction in (4, 8, 16, 32)
    ]
    assert all(m.isfinite().all() for m in maps)


class Pyramid(nn.Module):
    """Feature pyramid over a model's last three stages, as torchvision's detectors take it."""

    out_channels = 16

    def __init__(self, **kwargs):
        super().__init__()
        self.body = timm.create_model(
            "dinat_mini", features_only=True, feature_cls="getter", out_indices=(1, 2, 3),
            dilations="coco", stage_norms=True, **NARROW, **kwargs,
        )  # fmt: skip
        self.fpn = FeaturePyramidNetwork(
            self.body.feature_info.channels(), 16, LastLevelP6P7(16, 16)
        )

    def forward(self, images):
        return self.fpn({str(i): feature for i, feature in enumerate(self.body(images))})


def test_retinanet_trains_and_detects():
    anchors = AnchorGenerator(tuple((size,) for size in (16, 32, 64, 96, 128)), ((1.0,),) * 5)
    detector = RetinaNet(
        Pyramid(), num_classes=3, anchor_generator=anchors, min_size=96, max_size=128,
        detections_per_img=5, score_thresh=0.0,
    )  # fmt: skip
    images = [torch.rand(3, 90, 110), torch.rand(3, 100, 70)]
    target = {"boxes": torch.tensor([[10.0, 12.0, 50.0, 60.0]]), "labels": torch.tensor([1])}
    optimizer = torch.optim.AdamW(detector.parameters())
    before = [p.clone() for p in detector.parameters()]
    sum(detector.train()(images, [target, target]).values()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in detector.parameters())
    optimizer.step()
    assert not any(torch.equal(a, b) for a, b in zip(before, detector.parameters(), strict=True))
    with torch.inference_mode():
        detections = detector.eval()(images)
    for image, found in zip(images, detections, strict=True):
        assert len(found["boxes"]) == len(found["scores"]) == 5
        assert (found["boxes"][:, [2, 3]] <= torch.tensor(image.shape[:0:-1])).all()
