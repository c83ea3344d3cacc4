"""`pretrained=True` from an address and from a hub repository, both served on this machine."""

import hashlib
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import huggingface_hub.constants
import pytest
import timm
import torch

SMALL = {"embed_dim": 32, "depths": (2, 1, 2, 1), "num_heads": (1, 2, 4, 8)}
REPOSITORY = "shi-labs/nat-mini-in1k-224/resolve/main"


class HubHandler(SimpleHTTPRequestHandler):
    """Serves files with the headers that the hub's client asks for."""

    def end_headers(self):
        path = self.translate_path(self.path).encode()
        self.send_header("ETag", f'"{hashlib.sha256(path).hexdigest()}"')
        self.send_header("X-Repo-Commit", "0" * 40)
        super().end_headers()

    def send_error(self, code, message=None, explain=None):
        self.send_response(code)
        self.send_header("X-Error-Code", "EntryNotFound")
        self.end_headers()

    def log_message(self, *args):
        pass


@pytest.fixture
def address(tmp_path):
    """Address of a server of the folder `served`."""
    handler = partial(HubHandler, directory=str(tmp_path / "served"))
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("source", ["url", "hub"])
def test_published_weights_are_downloaded_and_converted(
    tiny_nat, to_original, to_transformers, address, source, tmp_path, monkeypatch
):
    model = tiny_nat("nat_mini", num_classes=1000)
    weights = to_original(model.state_dict())
    folder = tmp_path / "served" / REPOSITORY
    folder.mkdir(parents=True)
    torch.save(weights, folder / "nat_mini.pth")
    torch.save(to_transformers(weights), folder / "pytorch_model.bin")

    hub = f"{address}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", address)
    url = {"url": f"{address}/{REPOSITORY}/nat_mini.pth", "hf_hub_id": None}
    again = timm.create_model(
        "nat_mini",
        pretrained=True,
        pretrained_cfg_overlay=url if source == "url" else {"url": None},
        cache_dir=tmp_path / "cache",
        **SMALL,
    )
    images = torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(again.eval()(images), model(images), rtol=0, atol=0)
    names = {path.name for path in (tmp_path / "cache").rglob("*")}
    assert ("nat_mini.pth" if source == "url" else "pytorch_model.bin") in names
