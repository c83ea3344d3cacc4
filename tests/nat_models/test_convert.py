"""Conversion of files, there and back."""

import hashlib
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from nat_models import convert as convert_module
from nat_models.checkpoints import CheckpointError, read_checkpoint, to_ours
from nat_models.convert import convert, guess_model


@pytest.fixture
def official_file(official_shapes, tmp_path):
    """Writes random weights of a published model, under the file's published name or another."""

    def write(name, file="weights.pth", change=dict):
        shapes = official_shapes(name).items()
        weights = {key: torch.rand(shape, dtype=torch.float16) for key, shape in shapes}
        torch.save(change(weights), tmp_path / file)
        return tmp_path / file

    return write


def assert_same_tensors(path, other):
    ours, theirs = read_checkpoint(path), read_checkpoint(other)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(value, theirs[key]) for key, value in ours.items())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["nat_mini", "dinat_s_tiny", "nat_isotropic_small"])
def test_official_files_return_bit_by_bit(official_file, name, tmp_path):
    source, ours, back = official_file(name), tmp_path / "ours.safetensors", tmp_path / "back.pth"
    assert convert(source, ours, model_name=name) == (name, "official")
    assert convert(ours, back, "official", name) == (name, "ours")
    assert_same_tensors(back, source)
    with safe_open(ours, "pt") as file:
        assert file.metadata() == {
            "format": "pt",
            "model": name,
            "layout": "ours",
            "source_sha256": hashlib.sha256(source.read_bytes()).hexdigest(),
        }


@pytest.mark.slow
def test_transformers_files_return_bit_by_bit_and_files_remember_their_model(
    official_file, to_transformers, tmp_path
):
    source = official_file(
        "dinat_mini", change=lambda weights: to_transformers(weights, prefix="dinat.")
    )
    ours, back = tmp_path / "ours.safetensors", tmp_path / "back.safetensors"
    assert convert(source, ours) == ("dinat_mini", "hf")  # nat_mini has the same shapes
    assert convert(ours, back, "hf") == ("dinat_mini", "ours")
    assert_same_tensors(back, source)


@pytest.mark.slow
def test_model_is_told_by_the_published_name_and_else_asked_for(official_file, tmp_path):
    target = tmp_path / "ours.safetensors"
    source = official_file("dinat_mini", "dinat_mini_in1k_224.pth")
    assert convert(source, target)[0] == "dinat_mini"
    target.unlink()
    with pytest.raises(
        CheckpointError, match=r"some\.pth: may be of dinat_mini, nat_mini: choose with --model"
    ):
        convert(source.rename(tmp_path / "some.pth"), target)
    assert not target.exists()


@pytest.mark.slow
def test_classes_tell_models_of_the_same_shapes_apart(official_shapes):
    for name in ("dinat_large_21k", "dinat_s_large_21k"):
        shapes = {**official_shapes(name), "head.weight": [21841, 1536], "head.bias": [21841]}
        given = {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}
        assert guess_model(Path("weights.pth"), given, to_ours(given)) == name


@pytest.mark.slow
def test_classes_channels_and_detectors_do_not_hide_the_model(official_file, tmp_path):
    def changed(weights):
        weights["head.weight"], weights["head.bias"] = torch.rand(7, 768), torch.rand(7)
        weights["patch_embed.proj.weight"] = torch.rand(96, 1, 4, 4)
        return weights

    def in_detector(weights):
        kept = {k: v for k, v in weights.items() if not k.startswith(("norm.", "head."))}
        return {f"backbone.{key}": v for key, v in {**kept, "norm0.bias": torch.rand(96)}.items()}

    def headless(weights):
        return {k: v for k, v in weights.items() if not k.startswith("head.")}

    target = tmp_path / "ours.safetensors"
    assert convert(official_file("dinat_s_tiny", change=changed), target)[0] == "dinat_s_tiny"
    assert read_checkpoint(target)["head.fc.bias"].shape == (7,)
    convert(official_file("dinat_s_tiny", change=headless), target, model_name="dinat_s_tiny")
    assert read_checkpoint(target)["norm.bias"].shape == (768,)
    convert(official_file("dinat_s_tiny", change=in_detector), target, model_name="dinat_s_tiny")
    assert read_checkpoint(target)["stage_norms.0.bias"].shape == (96,)


def test_files_that_fit_no_model_are_refused(official_file, tmp_path):
    target = tmp_path / "ours.safetensors"

    def damaged(weights):
        return {k: v for k, v in weights.items() if k != "levels.3.blocks.4.norm2.bias"}

    source = official_file("nat_mini", change=damaged)
    missing = r"levels\.3\.blocks\.4\.norm2\.bias \[512\] is missing"
    with pytest.raises(CheckpointError, match=rf"weights\.pth: does not fit nat_mini:\s+{missing}"):
        convert(source, target, model_name="nat_mini")
    with pytest.raises(CheckpointError, match=rf"fits no model, the nearest is \w+:\s+{missing}"):
        convert(source, target)
    with pytest.raises(CheckpointError, match="nat_huge is none of dinat_base, "):
        convert(source, target, model_name="nat_huge")
    assert not target.exists()


def test_transformers_cannot_hold_every_model(official_file, tmp_path):
    with pytest.raises(CheckpointError, match="no class for vitrpb_small"):
        convert(official_file("vitrpb_small"), tmp_path / "x.pth", "hf", "vitrpb_small")
    assert not (tmp_path / "x.pth").exists()


def test_command_reports_and_fails_in_one_line(official_file, monkeypatch, capsys, tmp_path):
    source, target = official_file("nat_mini", "nat_mini.pth"), tmp_path / "nat_mini.safetensors"
    monkeypatch.setattr(sys, "argv", ["convert", str(source), str(target), "--model", "nat_mini"])
    convert_module.main()
    assert capsys.readouterr().out == f"{target}: nat_mini, official to ours\n"
    source.write_bytes(source.read_bytes()[:1000])
    with pytest.raises(SystemExit) as stop:
        convert_module.main()
    assert stop.value.code == 2
    assert capsys.readouterr().err.startswith(f"error: {source}: cannot be read (1000 bytes)")
