"""The check of the published files, against a server of this machine."""

import hashlib
import json
import sys
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import pytest
import timm
import torch
from PIL import Image

import nat_models
from nat_models import verify_weights
from nat_models.checkpoints import load_checkpoint, read_checkpoint
from nat_models.verify_weights import PUBLISHED_TOP1, accuracy_error, published_files

AUTHORS = "projects/nat/checkpoints/CLS/nat_mini.pth"
HUB = "shi-labs/nat-mini-in1k-224/resolve/main/pytorch_model.bin"
URLS = [f"https://shi-labs.com/{AUTHORS}", f"https://huggingface.co/{HUB}"]


@pytest.fixture(scope="module")
def weights():
    """Random weights in the authors' layout."""
    model = timm.create_model("nat_mini")
    official = {}
    for key, value in model.state_dict().items():
        parts = key.split(".")
        if "downsample" in parts:
            parts[1] = str(int(parts[1]) - 1)
        official[".".join(parts).replace("head.fc", "head")] = value.half()
    return official


@pytest.fixture
def served(tmp_path, weights, to_transformers):
    """The folder that is served, with good files."""
    folder = tmp_path / "served"
    for path, content in ((AUTHORS, weights), (HUB, to_transformers(weights))):
        (folder / path).parent.mkdir(parents=True)
        torch.save(content, folder / path)
    return folder


@pytest.fixture
def verify(served, tmp_path, monkeypatch, capsys):
    """Runs the command on the served files; returns its exit code and what it says."""

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(served)))
    Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    monkeypatch.setenv("COLUMNS", "120")

    def run(*arguments):
        options = {
            "--base-url": f"http://127.0.0.1:{server.server_port}",
            "--cache": tmp_path / "cache",
            "--record": tmp_path / "record.json",
        }
        words = [str(word) for pair in options.items() for word in pair]
        monkeypatch.setattr(sys, "argv", ["verify_weights", *words, *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            verify_weights.main()
        return stop.value.code, "".join(capsys.readouterr())

    yield run
    server.shutdown()
    server.server_close()


def digest(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.slow
def test_good_files_pass_are_recorded_and_converted(verify, served, tmp_path):
    code, output = verify("nat_mini")
    assert code == 0, output
    assert output.count("ok") == 2
    assert output.count("new") == 2
    recorded = json.loads((tmp_path / "record.json").read_text())
    assert recorded == dict(zip(URLS, map(digest, (served / AUTHORS, served / HUB)), strict=True))
    authors, hub = (
        read_checkpoint(
            (tmp_path / "cache" / url.removeprefix("https://")).with_suffix(".safetensors")
        )
        for url in URLS
    )
    assert all(torch.equal(value, hub[key]) for key, value in authors.items())

    code, output = verify("nat_mini")  # from the cache
    assert code == 0
    assert output.count("as recorded") == 2


@pytest.mark.slow
def test_changed_file_fails_and_the_others_go_on(verify, served, weights, tmp_path):
    old = digest(served / AUTHORS)
    (tmp_path / "record.json").write_text(json.dumps({URLS[0]: old}))
    torch.save({**weights, "head.bias": weights["head.bias"] + 1}, served / AUTHORS)
    code, output = verify("nat_mini")
    assert code == 1
    assert f"SHA-256 is {digest(served / AUTHORS)}, recorded is {old}" in output
    assert output.count("FAILED") == output.count("ok") == 1
    assert json.loads((tmp_path / "record.json").read_text())[URLS[0]] == old


@pytest.mark.slow
def test_damaged_and_missing_files_fail_and_leave_no_trace(verify, served, tmp_path):
    whole = (served / AUTHORS).read_bytes()
    (served / AUTHORS).write_bytes(whole[:100_000])
    (served / HUB).unlink()
    code, output = verify("nat_mini")
    assert code == 1
    assert output.count("FAILED") == 2
    assert "nat_mini.pth: cannot be read (100000 bytes)" in output
    assert "HTTP Error 404" in output
    assert not (tmp_path / "record.json").exists()
    assert [path for path in (tmp_path / "cache").rglob("*") if path.is_file()] == []

    (served / AUTHORS).write_bytes(whole)
    assert "ok" in verify("nat_mini")[1]  # downloaded again


@pytest.mark.slow
def test_other_shapes_fail(verify, served, weights):
    (served / HUB).unlink()
    torch.save({**weights, "head.weight": torch.zeros(21841, 512)}, served / AUTHORS)
    code, output = verify("nat_mini")
    assert code == 1
    assert "head.fc.weight has shape [21841, 512], the model's [1000, 512]" in output


@pytest.mark.slow
def test_accuracy_is_that_of_the_images(verify, served, tmp_path):
    """Of two images one lies in the folder of the class that the model sees in it."""
    model = timm.create_model("nat_mini").eval()
    load_checkpoint(model, served / AUTHORS)
    (served / HUB).unlink()
    folder = tmp_path / "val"
    for index in range(1000):
        (folder / f"n{index:08d}").mkdir(parents=True)
    image = Image.effect_noise((300, 280), 80).convert("RGB")
    config = timm.data.resolve_data_config({}, model=model)
    assert config["crop_pct"] == 0.875
    with torch.no_grad():
        logits = model(timm.data.create_transform(**config)(image)[None])
    seen = int(logits.argmax())
    image.save(folder / f"n{seen:08d}" / "right.png")
    image.save(folder / f"n{(seen + 1) % 1000:08d}" / "wrong.png")
    output = verify("nat_mini", "--imagenet", folder)[1]
    assert "50.00" in output
    (folder / f"n{seen:08d}" / "broken.png").write_bytes(b"no image")
    output = verify("nat_mini", "--imagenet", folder)[1]
    assert "cannot identify image file" in output


def test_bad_arguments_end_before_any_download(verify, tmp_path):
    assert verify("resnet*") == (2, "error: no published model is called resnet*\n")
    code, output = verify("--imagenet", tmp_path)
    assert code == 2
    assert f"{tmp_path}: 1 class folders" in output
    (tmp_path / "record.json").write_text("{")
    code, output = verify("nat_mini")
    assert code == 2
    assert f"{tmp_path / 'record.json'}: not a record" in output


def test_every_published_file_is_listed():
    checks = [*published_files(["*"])]
    assert len({check.url for check in checks}) == len(checks)
    assert len([check for check in checks if "shi-labs.com" in check.url]) == 25
    assert {check.model_name for check in checks} == {
        *PUBLISHED_TOP1,
        *(name for name in nat_models.list_models() if "21k" in name),
    }
    assert [check.url for check in published_files(["nat_mini"])] == URLS


@pytest.mark.parametrize(
    ("top1", "images", "wrong"),
    [(81.86, 50_000, False), (81.5, 50_000, True), (82.1, 50_000, True), (50.0, 100, False)],
    ids=["rounded", "below", "above", "subset"],
)
def test_accuracy_is_compared_on_the_whole_set_alone(top1, images, wrong):
    assert bool(accuracy_error("nat_mini", top1, images)) == wrong
