"""What `import nat_models` adds to timm."""

import re
import subprocess
import sys

import pytest
import timm

import nat_models

PUBLISHED = ["nat_base", "nat_mini", "nat_small", "nat_tiny"]


def test_importing_the_package_registers_the_models():
    code = (
        "import timm; assert not timm.is_model('nat_tiny')\n"
        "import nat_models; assert timm.is_model('nat_tiny') and timm.is_model('nat_demo')"
    )
    subprocess.run([sys.executable, "-W", "error::UserWarning", "-c", code], check=True)


def test_list_models_names_ours_alone():
    assert set(PUBLISHED) | {"nat_demo"} <= set(nat_models.list_models())
    assert nat_models.list_models("nat_t*") == ["nat_tiny"]
    assert "resnet18" not in nat_models.list_models("*")
    assert nat_models.list_models("nat_[!i]*", pretrained=True) == [
        f"{name}.shi_in1k" for name in PUBLISHED
    ]


def test_create_model_takes_any_timm_name():
    assert type(nat_models.create_model("nat_mini", device="meta")).__name__ == "NAT"
    assert type(nat_models.create_model("resnet18", device="meta")).__name__ == "ResNet"


@pytest.mark.parametrize("name", PUBLISHED)
def test_configs_point_to_the_published_weights(name):
    cfg = timm.get_pretrained_cfg(name)
    size = name.removeprefix("nat_")
    assert cfg.tag == "shi_in1k"
    assert cfg.hf_hub_id == f"shi-labs/nat-{size}-in1k-224"
    assert cfg.url == f"https://shi-labs.com/projects/nat/checkpoints/CLS/nat_{size}.pth"
    assert (cfg.input_size, cfg.num_classes, cfg.license) == ((3, 224, 224), 1000, "mit")
    assert (cfg.crop_pct, cfg.interpolation) == (0.875, "bicubic")
    assert (cfg.mean, cfg.std) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def test_version():
    assert re.fullmatch(r"\d+\.\d+\.\d+", nat_models.__version__)
