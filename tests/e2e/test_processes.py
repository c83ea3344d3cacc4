"""Two processes, started as torchrun starts them, train and evaluate as one."""

import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from multiprocessing import get_context
from multiprocessing.connection import wait
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.pytorch.utilities import rank_zero_only
from PIL import Image
from two_processes import free_port

from nat_models import cli
from nat_models.data.sampler import EpochSampler
from nat_models.engine import replicas, run, sharding
from nat_models.engine.module import Classifier

ROOT = Path(__file__).parents[2]
# 33 images: of the held-out ones the processes have 17 and 16, in three and in two batches.
OPTIONS = [
    "data=fake",
    "data.options={size:33,image_size:[3,16,16],num_classes:10}",
    "data.input_size=[3,16,16]",
    "+model.in_chans=3",
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

    output = tmp_path_factory.mktemp("alone")
    options = [*OPTIONS, "data.batch_size=16", f"paths.output_dir={output}"]
    with hydra.initialize_config_dir(cli.config_dir(), version_base="1.3"):
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
    cli._run(run.train, cfg)


def run_both(cfgs) -> list[int | None]:
    """Train in two processes, each by its own configuration; their exit codes."""
    port = free_port()
    processes = []
    for rank, cfg in enumerate(cfgs):
        processes.append(get_context("fork").Process(target=process, args=(rank, port, cfg)))
        processes[-1].start()
    try:
        wait([one.sentinel for one in processes], timeout=60)  # all, or the first that fails
        for one in processes:
            one.join(timeout=10)
        return [one.exitcode for one in processes]
    finally:
        for one in processes:
            one.kill()


@pytest.mark.slow
@pytest.mark.parametrize(
    "way", ["ddp", "ddp of graphs", "fsdp2", "fsdp2 in pieces", "fsdp2 in channels_last"]
)
def test_two_processes_train_as_one_in_one_folder(compose, alone, tmp_path, monkeypatch, way):
    strategy = way.split()[0]
    # The processes are forked.
    if way == "fsdp2 in pieces":
        monkeypatch.setattr(sharding, "MAX_AT_ONCE", 0)
    if way == "ddp of graphs":
        monkeypatch.setattr(replicas, "replays_graphs", lambda module: True)
    options = [*OPTIONS, "data.batch_size=8", "trainer.devices=2", f"trainer.strategy={strategy}"]
    layout = "channels_last" if "channels_last" in way else "contiguous"
    options.append(f"channels_last={layout == 'channels_last'}")
    cfgs = [compose("train", *options, f"paths.output_dir={tmp_path}/{rank}") for rank in (0, 1)]
    assert run_both(cfgs) == [0, 0]
    check_same_run(tmp_path, alone)
    assert f"eager, {layout}" in (tmp_path / "0" / "train.log").read_text()


@pytest.mark.slow
def test_two_nodes_train_as_one(alone, tmp_path):
    meet = ["--nnodes=2", "--nproc-per-node=1", "--rdzv-backend=c10d"]
    meet.append(f"--rdzv-endpoint=localhost:{free_port()}")
    command = [sys.executable, "-m", "torch.distributed.run", *meet, str(ROOT / "train.py")]
    command += [*OPTIONS, "data.batch_size=8", "logger=none"]
    command += ["trainer.devices=1", "trainer.num_nodes=2"]
    nodes = [start([*command, f"paths.output_dir={tmp_path}/{node}"], tmp_path) for node in (0, 1)]
    outputs = [finish(node) for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], outputs
    check_same_run(tmp_path, alone)


def check_same_run(folder, alone) -> None:
    """In it is the only folder of two processes' run; it has the results of the run alone."""
    [ours] = folder.iterdir()
    log = (ours / "train.log").read_text()
    assert log.count("device ") == log.count("epoch 1/1") == 1
    assert json.loads((ours / "environment.json").read_text())["processes"] == 2
    weights, expected = (
        torch.load(path / "last.ckpt", weights_only=True)["state_dict"] for path in (ours, alone)
    )
    assert weights.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(weights[name], value, atol=1e-5, rtol=1e-4)
    metrics, expected = (json.loads((p / "metrics.json").read_text()) for p in (ours, alone))
    assert metrics == pytest.approx(expected, abs=1e-4)


def start(command, folder) -> subprocess.Popen[str]:
    """A command, as the first of its own group of processes."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    env = {**os.environ, "PYTHONPATH": path}
    return subprocess.Popen(command, env=env, cwd=folder, start_new_session=True, **pipes)


def finish(process) -> str:
    """What it and those that it has started wrote, when all have ended."""
    try:
        return process.communicate(timeout=60)[0]
    finally:
        if process.returncode is None:
            os.killpg(process.pid, signal.SIGKILL)


def truncated(folder, rank) -> Path:
    """An image that one of two processes reads in the second step, of a data set made there."""
    paths = [folder / "train" / "ab"[i // 8] / f"{i:02}.png" for i in range(16)]
    for i, path in enumerate(
        [*paths, folder / "val" / "a" / "0.png", folder / "val" / "b" / "0.png"]
    ):
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(i).integers(0, 256, (16, 16, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path)
    *_, (_, index) = EpochSampler(range(16), 0, rank, 2)
    path = paths[index]
    path.write_bytes(path.read_bytes()[:400])
    return path


def fault_options(data, output) -> list[str]:
    return [
        *OPTIONS[3:], "data=imagefolder", f"data.root={data}", "data.input_size=[3,16,16]",
        "data.batch_size=4", "data.num_workers=0", "global_batch_size=8", "model.num_classes=2",
        "logger=none", "trainer.devices=2", f"paths.output_dir={output}",
    ]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("faulty", [0, 1])
def test_a_fault_of_one_process_ends_the_other(compose, tmp_path, monkeypatch, capfd, faulty):
    def hear_nothing(self, batch, batch_idx):  # as one that waits in NCCL
        if batch_idx == 1 and self.global_rank != faulty:
            time.sleep(600)

    monkeypatch.setattr(Classifier, "on_train_batch_start", hear_nothing)
    path = truncated(tmp_path / "data", faulty)
    cfg = compose("train", *fault_options(tmp_path / "data", tmp_path / "run"))
    assert run_both([cfg, cfg]) == [1, 1]
    output = capfd.readouterr()
    said = output.out + output.err
    assert said.count("error: ") == said.count(f"error: {path}: image file is truncated") == 1


HEARS_NOTHING = """
import os, time
from nat_models.cli import train
from nat_models.engine.module import Classifier

def hear_nothing(self, batch, batch_idx):
    if batch_idx == 1 and os.environ["LOCAL_RANK"] == "1":
        time.sleep(600)

Classifier.on_train_batch_start = hear_nothing
train()
"""


@pytest.mark.slow
def test_a_fault_of_the_first_process_ends_one_that_it_started(tmp_path):
    path = truncated(tmp_path / "data", 0)
    (tmp_path / "script.py").write_text(HEARS_NOTHING)
    options = fault_options(tmp_path / "data", tmp_path / "run")
    process = start([sys.executable, "script.py", *options], tmp_path)
    output = finish(process)  # both have ended
    assert process.returncode == 1, output
    assert output.splitlines()[-1].startswith(f"error: {path}: image file is truncated")
    assert output.count("error: ") == 1


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
    assert run_both([compose("train", *options) for _ in range(2)]) == [0, 0]
    assert "top-1" in (tmp_path / "run" / "train.log").read_text()
