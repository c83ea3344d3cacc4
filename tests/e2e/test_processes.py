"""Two processes, started as torchrun starts them, train and evaluate as one."""

import io
import json
import os
import socket
import tarfile
from multiprocessing import get_context
from multiprocessing.connection import wait

import pytest
import torch
from lightning.pytorch.utilities import rank_zero_only
from PIL import Image

from nat_models.engine import replicas, run, sharding

# 33 images: of the held-out ones the processes have 17 and 16, in three and in two batches.
OPTIONS = [
    "data=fake",
    "data.options={size:33,image_size:[1,16,16],num_classes:10}",
    "data.input_size=[1,16,16]",
    "augment.transform.re_prob=0.0",
    "callbacks.progress=null",
    "trainer.accelerator=cpu",
    "trainer.max_epochs=1",
    "scheduler.warmup_epochs=0",
    "optimizer.opt=sgd",
    "optimizer.lr=0.1",
    "global_batch_size=16",
]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The run of one process."""
    import hydra

    from nat_models.cli import config_dir

    output = tmp_path_factory.mktemp("alone")
    options = [*OPTIONS, "data.batch_size=16", f"paths.output_dir={output}"]
    with hydra.initialize_config_dir(config_dir(), version_base="1.3"):
        run.train(hydra.compose("train", overrides=options))
    return output


def process(rank: int, port: int, cfg) -> None:
    """One of two."""
    ours = {"RANK": rank, "LOCAL_RANK": rank, "GROUP_RANK": 0, "MASTER_PORT": port}
    common = {"WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1"}
    common["TORCHELASTIC_RUN_ID"] = "test"
    os.environ.update({name: str(value) for name, value in {**ours, **common}.items()})
    os.environ.pop("NAT_MODELS_OUTPUT_DIR", None)
    rank_zero_only.rank = rank
    run.train(cfg)


def run_both(cfgs) -> None:
    """Train in two processes, each by its own configuration."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = []
    for rank, cfg in enumerate(cfgs):
        processes.append(get_context("fork").Process(target=process, args=(rank, port, cfg)))
        processes[-1].start()
    try:
        wait([one.sentinel for one in processes], timeout=60)  # all, or the first that fails
        for one in processes:
            one.join(timeout=10)
        assert [one.exitcode for one in processes] == [0, 0]
    finally:
        for one in processes:
            one.kill()


@pytest.mark.slow
@pytest.mark.parametrize("way", ["ddp", "ddp of graphs", "fsdp2", "fsdp2 in pieces"])
def test_two_processes_train_as_one_in_one_folder(compose, alone, tmp_path, monkeypatch, way):
    strategy = way.split()[0]
    # The processes are forked.
    if way == "fsdp2 in pieces":
        monkeypatch.setattr(sharding, "MAX_AT_ONCE", 0)
    if way == "ddp of graphs":
        monkeypatch.setattr(replicas, "replays_graphs", lambda module: True)
    options = [*OPTIONS, "data.batch_size=8", "trainer.devices=2", f"trainer.strategy={strategy}"]
    run_both([compose("train", *options, f"paths.output_dir={tmp_path}/{rank}") for rank in (0, 1)])
    assert os.listdir(tmp_path) == ["0"]
    log = (tmp_path / "0" / "train.log").read_text()
    assert log.count("device ") == log.count("epoch 1/1") == 1
    ours, theirs = (
        torch.load(path / "last.ckpt", weights_only=True)["state_dict"]
        for path in (tmp_path / "0", alone)
    )
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, atol=1e-5, rtol=1e-4)
    ours, theirs = (
        json.loads((path / "metrics.json").read_text()) for path in (tmp_path / "0", alone)
    )
    assert ours == pytest.approx(theirs, abs=1e-4)


@pytest.mark.slow
@pytest.mark.usefixtures("undrawn")
def test_shards_of_unequal_length_do_not_hang_a_sharded_model(compose, tmp_path):
    pytest.importorskip("webdataset", reason="comes with nat-models[data]")
    for shard, images in enumerate((20, 4)):  # the processes evaluate 3 batches and 1
        with tarfile.open(tmp_path / f"part-{shard}.tar", "w") as tar:
            for i in range(images):
                file = io.BytesIO()
                Image.new("L", (16, 16), 10 * i).save(file, "PNG")
                for name, content in (("png", file.getvalue()), ("cls", str(i % 10).encode())):
                    info = tarfile.TarInfo(f"{i:04}.{name}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
    split = "'part-{0..1}.tar|24'"
    options = [
        "data=wds", f"data.root={tmp_path}", f"data.train_split={split}", f"data.val_split={split}",
        "data.batch_size=8", "data.num_workers=0", "data.input_size=[1,16,16]",
        "model.num_classes=10", "callbacks.progress=null", "trainer.accelerator=cpu",
        "trainer.max_epochs=1", "scheduler.warmup_epochs=0", "trainer.devices=2",
        "trainer.strategy=fsdp2", f"paths.output_dir={tmp_path}/run",
    ]  # fmt: skip
    run_both([compose("train", *options) for _ in range(2)])
    assert "top-1" in (tmp_path / "run" / "train.log").read_text()
