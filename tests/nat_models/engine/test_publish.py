import base64
import json
from http.server import BaseHTTPRequestHandler, HTTPServer
from threading import Thread

import pytest
import timm
import torch
from PIL import Image
from timm.data import resolve_data_config

from nat_models.data import ImageDataModule
from nat_models.engine.module import Classifier
from nat_models.engine.publish import check_repository, push, write_card, write_model
from nat_models.errors import RunStopped


@pytest.fixture
def module():
    return Classifier(model={"name": "nat_demo", "num_classes": 3, "in_chans": 3}).eval()


@pytest.fixture
def data(module, tmp_path) -> ImageDataModule:
    for label in ("cat", "dog", "newt"):
        (tmp_path / "val" / label).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / "val" / label / "1.png")
    data = ImageDataModule("folder", str(tmp_path), input_size=[3, 40, 40], mean=[0.1] * 3)
    data.open(training=False)
    data.follow(module.model)
    return data


def test_the_folder_opens_as_the_same_model_with_its_preprocessing(module, data, tmp_path):
    write_model(tmp_path / "model", module, data)
    again = timm.create_model(f"local-dir:{tmp_path}/model", pretrained=True).eval()
    images = torch.randn(2, 3, 40, 40)
    assert torch.equal(again(images), module(images))
    config = resolve_data_config({}, model=again)
    assert (config["input_size"], tuple(config["mean"])) == ((3, 40, 40), (0.1,) * 3)
    assert json.loads((tmp_path / "model" / "config.json").read_text())["label_names"] == [
        "cat",
        "dog",
        "newt",
    ]


def test_the_card_tells_what_the_model_is_and_how_good(module, data, tmp_path):
    metrics = {"val/top1": 0.5, "val/top5": 1.0}
    write_card(tmp_path, module, data, metrics, images=2000)
    card = (tmp_path / "README.md").read_text()
    for part in ("license: mit", "nat_demo", "**Classes:** 3", "3x40x40", "2,000, top-1 50.00 %"):
        assert part in card


class Hub(BaseHTTPRequestHandler):
    """As much of the Hugging Face hub as an upload of small files asks for."""

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        answer = {"url": "https://huggingface.co/a/b"}
        if self.path == "/api/models/a/b/preupload/main":
            how = {"uploadMode": "regular", "shouldIgnore": False}
            answer = {"files": [{"path": f["path"], **how} for f in json.loads(body)["files"]]}
        elif self.path == "/api/models/a/b/commit/main":
            for line in map(json.loads, body.splitlines()[1:]):
                content = base64.b64decode(line["value"]["content"])
                self.server.received[line["value"]["path"]] = content
            answer = {"commitUrl": "https://huggingface.co/a/b/commit/1", "commitOid": "1"}
        content = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def do_GET(self) -> None:
        self.send_error(404)

    def log_message(self, *_) -> None:
        pass


@pytest.fixture
def hub(monkeypatch):
    server = HTTPServer(("127.0.0.1", 0), Hub)
    server.received = {}
    Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", address)
    monkeypatch.setenv("HF_TOKEN", "x")
    yield server
    server.shutdown()
    server.server_close()


def test_the_whole_folder_is_uploaded(module, data, hub, tmp_path):
    write_model(tmp_path / "model", module, data)
    write_card(tmp_path / "model", module, data, {"val/top1": 0.5, "val/top5": 1.0}, images=3)
    push(tmp_path / "model", "a/b")
    assert hub.received == {p.name: p.read_bytes() for p in (tmp_path / "model").iterdir()}
    assert {"README.md", "config.json", "model.safetensors"} == set(hub.received)


def test_a_repository_is_an_organisation_and_a_name():
    check_repository("a/b.c-d")
    for wrong in ("foo", "a/b/c", "/a", "a/", "a/b c", "a/b--c", 7):
        with pytest.raises(ValueError, match=rf"^push_to_hub={wrong}: expected ORG/NAME: ."):
            check_repository(wrong)


def test_a_failed_upload_says_where_the_model_is(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(RunStopped, match=rf"push_to_hub=a/b: .*the model is in {tmp_path}"):
        push(tmp_path, "a/b")
