"""Files that must be read, files that must be refused, and files that are whole."""

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from nat_models.checkpoints import CheckpointError, read_checkpoint, write_checkpoint

WEIGHTS = {"a.weight": torch.arange(2000.0), "a.bias": torch.zeros(2)}


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_tensors_are_read(suffix, tmp_path):
    path = tmp_path / f"weights.{suffix}"
    (torch.save if suffix == "pth" else save_file)(WEIGHTS, path)
    torch.testing.assert_close(read_checkpoint(path), WEIGHTS, rtol=0, atol=0)


@pytest.mark.parametrize("key", ["state_dict", "model", "state_dict_ema", "model_ema"])
def test_weights_are_found_in_training_checkpoints(key, tmp_path):
    other = {"state_dict": {"b": torch.ones(1)}} if key.endswith("ema") else {}
    wrapped = {f"module.{name}": value for name, value in WEIGHTS.items()}
    torch.save({"epoch": 3, **other, key: wrapped}, tmp_path / "last.pth")
    assert read_checkpoint(tmp_path / "last.pth").keys() == WEIGHTS.keys()


class Payload:
    """Would create a file when unpickled."""

    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return Path.touch, (self.target,)


def test_code_in_a_pickle_is_refused_and_not_run(tmp_path):
    target, path = tmp_path / "created", tmp_path / "evil.pth"
    torch.save({"state_dict": {}, "payload": Payload(target)}, path)
    with pytest.raises(CheckpointError, match=r"evil\.pth: .* would run code"):
        read_checkpoint(path)
    assert not target.exists()
    torch.load(path, weights_only=False)
    assert target.exists()  # it is a payload


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
@pytest.mark.parametrize("keep", [0, 100, 5000])
def test_damaged_file_is_named(suffix, keep, tmp_path):
    path = tmp_path / f"cut.{suffix}"
    (torch.save if suffix == "pth" else save_file)(WEIGHTS, path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=rf"cut.{suffix}: .*\({keep} bytes\)"):
        read_checkpoint(path)


@pytest.mark.parametrize(
    "content", [{}, {"epoch": 3}, [1, 2], torch.zeros(3)], ids=["empty", "number", "list", "tensor"]
)
def test_file_without_weights_is_refused(content, tmp_path):
    torch.save(content, tmp_path / "empty.pth")
    with pytest.raises(CheckpointError, match=r"empty\.pth"):
        read_checkpoint(tmp_path / "empty.pth")


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_foreign_file_is_refused(suffix, tmp_path):
    path = tmp_path / f"page.{suffix}"
    path.write_text("<html>404</html>")
    with pytest.raises(CheckpointError, match=rf"page\.{suffix}: cannot be read"):
        read_checkpoint(path)


def test_missing_file_and_folder_are_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"nowhere\.pth: no such file"):
        read_checkpoint(tmp_path / "nowhere.pth")
    with pytest.raises(CheckpointError, match=f"{tmp_path}: a folder"):
        read_checkpoint(tmp_path)


def test_written_file_has_the_header_and_takes_views(tmp_path):
    path = tmp_path / "new" / "weights.safetensors"
    whole = torch.randn(4, 6)
    views = {"top": whole[:2], "left": whole[:, :3]}
    write_checkpoint(views, path, {"model": "nat_mini"})
    torch.testing.assert_close(read_checkpoint(path), views, rtol=0, atol=0)
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"format": "pt", "model": "nat_mini"}
    write_checkpoint(views, tmp_path / "weights.pth", {})
    torch.testing.assert_close(torch.load(tmp_path / "weights.pth"), views, rtol=0, atol=0)


def test_failed_write_keeps_the_file_before_and_leaves_no_other(tmp_path):
    path, folder = tmp_path / "weights.safetensors", tmp_path / "folder.pth"
    write_checkpoint(WEIGHTS, path, {})
    folder.mkdir()
    with pytest.raises(TypeError):
        write_checkpoint(WEIGHTS, path, {"model": 3})
    with pytest.raises(IsADirectoryError):
        write_checkpoint(WEIGHTS, folder, {})
    assert {*tmp_path.iterdir()} == {path, folder}
    assert read_checkpoint(path).keys() == WEIGHTS.keys()
