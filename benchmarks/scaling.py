"""How training scales over the GPUs of one host, by the project's own engine.

    PYTHONPATH=.:kernels python benchmarks/scaling.py OUTPUT.json [--gpus 1 2] [--set KEY=VALUE ...]

throughput  weak scaling: images a second of DDP and FSDP2 against one GPU, on random images that
            lie on the device; bf16, compiled and replayed as train.py does it, the recipe's
            optimizer and clipping
loader      the same on one GPU, fed by the recipe's loader: scikit-learn's digits, enlarged and
            augmented, by as many processes as there are cores
loss        50 steps on scikit-learn's digits with one global batch, no drop path, no augmentation,
            no mixup: one GPU, one GPU in as many micro-batches as there are GPUs (which differs by
            the order of additions alone), DDP, FSDP2; in fp32 without TF32, and in bf16
resume      FSDP2 told to stop within an epoch, continued on two GPUs (two GPUs: on one)

--set gives values of configs/train.yaml to every run. What OUTPUT.json holds already is not
measured again, so that a script that was stopped goes on. Without a GPU the processes run on the
CPU (gloo). It needs the project's dependencies and scikit-learn.
"""

import argparse
import json
import math
import os
import re
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from multiprocessing import get_context, set_start_method
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import scaling_report
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.exceptions import SIGTERMException
from measuring import Record, Results, today
from omegaconf import DictConfig
from torch.utils.data import ConcatDataset

from nat_models.cli import config_dir
from nat_models.data import ImageDataModule
from nat_models.engine import run
from nat_models.engine.console import set_up_logging
from nat_models.engine.execution import choose_execution
from nat_models.engine.module import Classifier
from nat_models.engine.setup import make_data, make_trainer, plain, set_up_torch
from neighborhood_attention.tune.records import Deadline

PARTS = ("throughput", "loader", "loss", "resume")
STRATEGIES = ("ddp", "fsdp2")
EPOCHS = 5  # of the losses; a run to be resumed is told to stop within the fourth
COMMON = ["logger=none", "callbacks.progress=null", "callbacks.learning_rate=null"]
COMMON += ["trainer.num_nodes=1", "scheduler.cooldown_epochs=0"]


def main() -> int:
    """Measure what is missing, write OUTPUT.json and OUTPUT.png, print the table."""
    arguments = parse()
    description = {**machine(), "commit": arguments.commit, "date": today()}
    # Losses are compared to 1e-3 and less.
    results = Results(arguments.output, description, ["case"], digits=8)
    wanted = [case for case in cases(arguments) if results.find({"case": case}) is None]
    deadline, took, failed = Deadline(arguments.limit_seconds), 0.0, 0
    for number, case in enumerate(wanted):
        if deadline.left < took:  # the first takes longer than the others: it compiles
            print(f"no time for {len(wanted) - number} of {len(wanted)}; start again to go on")
            break
        print(json.dumps(case), flush=True)
        begin = time.monotonic()
        try:
            results.add({"case": case, **measure(case, deadline.left)})
        except RuntimeError as error:  # the others may still run
            print(f"failed: {error}", flush=True)
            failed += 1
            continue
        took = time.monotonic() - begin
    if results.records:
        report = results.content | {"results": results.records}
        print(scaling_report.tables(report))
        for figure in scaling_report.figures(report).values():
            figure.savefig(arguments.output.with_suffix(".png"))
    return int(failed > 0)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    count = torch.cuda.device_count()
    parser.add_argument("output", type=Path)
    parser.add_argument(
        "--gpus", type=int, nargs="+", default=[n for n in (1, 2, 4, 8, 16) if n <= max(count, 1)]
    )
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--models", nargs="+", default=["nat_tiny", "dinat_base"])
    parser.add_argument("--strategies", nargs="+", choices=STRATEGIES, default=STRATEGIES)
    parser.add_argument("--precisions", nargs="+", default=["32-true", "bf16-mixed"])
    parser.add_argument("--size", type=int, default=224, help="pixels a side")
    parser.add_argument("--batch", type=int, default=128, help="images a GPU, of throughput")
    parser.add_argument("--global-batch", type=int, default=128, help="images a step, of loss")
    parser.add_argument("--steps", type=int, default=50, help="of loss; a multiple of 5")
    parser.add_argument("--rounds", type=int, default=5, help="of throughput, after one to warm up")
    parser.add_argument("--round-steps", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=2, help="turns of the throughput")
    parser.add_argument("--set", nargs="+", default=[], dest="overrides", metavar="KEY=VALUE")
    parser.add_argument("--limit-seconds", type=float, default=float("inf"))
    parser.add_argument("--commit", help="of the code that is measured")
    arguments = parser.parse_args()
    for gpus in arguments.gpus:
        if gpus > max(count, 1) and count:
            parser.error(f"--gpus {gpus}: this machine has {count}")
        if arguments.global_batch % gpus:
            parser.error(f"--global-batch {arguments.global_batch}: expected a multiple of {gpus}")
    return arguments


def cases(arguments: argparse.Namespace) -> list[Record]:
    """All that is asked for, with every option that its result depends on, in the order of work."""
    several = [gpus for gpus in arguments.gpus if gpus > 1]
    common = {"size": arguments.size, "set": arguments.overrides}
    wanted: list[Record] = []
    ways = [(1, "auto"), *((n, strategy) for n in several for strategy in arguments.strategies)]
    timed = [("throughput", *way) for way in ways] + [("loader", 1, "auto")]
    length = {"batch": arguments.batch, "rounds": arguments.rounds}
    length["round_steps"] = arguments.round_steps
    wanted += [
        {"part": part, "model": model, "gpus": n, "strategy": strategy, "turn": turn}
        | length
        | common
        for turn in range(arguments.repeats)
        for model in arguments.models
        for part, n, strategy in timed
        if part in arguments.parts
    ]
    steps = {"global_batch": arguments.global_batch, "steps": arguments.steps, **common}
    if {"loss", "resume"} & set(arguments.parts):  # a resumed run is compared with a whole one
        runs = [(n, strategy, 1) for n, strategy in ways]
        runs += [(1, "auto", n) for n in several]
        wanted += [
            {"part": "loss", "gpus": n, "strategy": strategy, "micro_batches": micro}
            | {"precision": precision, **steps}
            for precision in arguments.precisions
            for n, strategy, micro in runs
        ]
    if "resume" in arguments.parts:
        wanted += [
            {"part": "resume", "gpus": n, "onto": 2 if n > 2 else 1, "strategy": "fsdp2"}
            | {"micro_batches": 1, "precision": "32-true", **steps}
            for n in several
        ]
    return wanted


def measure(case: Record, seconds: float) -> Record:
    """Run one case.

    Raises:
        RuntimeError: A process failed, or they took more than so many seconds.
    """
    folder = Path(tempfile.mkdtemp())
    try:
        if case["part"] in ("throughput", "loader"):
            return launch(time_steps, case, folder, seconds)
        first = launch(note_losses, case, folder, seconds)
        if case["part"] == "loss":
            return first
        rest = {**case, "gpus": case["onto"], "continue": True}
        rest["strategy"] = "fsdp2" if case["onto"] > 1 else "auto"
        return {**launch(note_losses, rest, folder, seconds), "losses_before": first["losses"]}
    finally:
        shutil.rmtree(folder)


def launch(work: Any, case: Record, folder: Path, seconds: float) -> Record:
    """Call `work(case, folder)` in a process a GPU, as torchrun would; the first one's result.

    They are forked from a server that has imported everything and has not touched a GPU.
    """
    context = get_context("forkserver")
    context.set_forkserver_preload(["nat_models.engine.run", "sklearn.datasets"])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    path = folder / "result.json"
    path.unlink(missing_ok=True)
    processes = [
        context.Process(target=process, args=(work, case, folder, rank, port))
        for rank in range(case["gpus"])
    ]
    for one in processes:
        one.start()
    deadline, running = Deadline(min(seconds, 3600)), list(processes)
    try:
        while running and deadline.left:
            wait([one.sentinel for one in running], timeout=1)
            if any(one.exitcode for one in processes):
                break
            running = [one for one in running if one.is_alive()]
    finally:
        for one in processes:
            one.kill()
            one.join()
    codes = [one.exitcode for one in processes]
    if any(codes):
        raise RuntimeError(f"exit codes of the processes: {codes}")
    result: Record = json.loads(path.read_text())
    return result


def process(work: Any, case: Record, folder: Path, rank: int, port: int) -> None:
    """One of the processes."""
    if (count := case["gpus"]) > 1:
        ours = {"RANK": rank, "LOCAL_RANK": rank, "GROUP_RANK": 0, "MASTER_PORT": port}
        common = {"WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1"}
        common["TORCHELASTIC_RUN_ID"] = "scaling"  # how Lightning knows torchrun's processes
        os.environ.update({name: str(value) for name, value in {**ours, **common}.items()})
    rank_zero_only.rank = rank  # type: ignore[attr-defined]
    # Workers that load data: from a server of their own they would import everything once more.
    set_start_method("fork", force=True)
    set_up_logging()
    result = work(case, folder)
    if rank == 0:
        (folder / "result.json").write_text(json.dumps(result))


def configuration(case: Record, folder: Path, *values: str) -> DictConfig:
    """configs/train.yaml with values."""
    accelerator = "gpu" if torch.cuda.is_available() else "cpu"
    common = [f"paths.output_dir={folder}", f"trainer.accelerator={accelerator}"]
    common += [f"trainer.devices={case['gpus']}", f"trainer.strategy={case['strategy']}"]
    with initialize_config_dir(config_dir(), version_base="1.3"):
        return compose("train", overrides=[*COMMON, *common, *values, *case["set"]])


def time_steps(case: Record, folder: Path) -> Record:
    """Seconds of rounds of training steps."""
    clock = Clock(case["rounds"], case["round_steps"])
    cfg = configuration(
        case,
        folder,
        f"experiment={case['model']}_in1k",
        *data_options(case, clock.steps),
        "model.num_classes=1000",
        "global_batch_size=null",
        "callbacks.best=null",
        "callbacks.recent=null",
        "callbacks.last=null",
        "callbacks.history=null",
        "scheduler.warmup_epochs=0",
        "trainer.max_epochs=1",
        f"data.batch_size={case['batch']}",
    )
    set_up_torch(cfg)
    module = instantiate(
        cfg.task, model=plain(cfg.model), optimizer=cfg.optimizer, scheduler=cfg.scheduler,
        _convert_="all",
    )  # fmt: skip
    trainer = make_trainer(cfg)
    trainer.callbacks.append(clock)  # type: ignore[attr-defined]
    execution = choose_execution(cfg, trainer, module.model, case["batch"], is_long=True)
    module.run_by(execution)
    if case["part"] == "loader":
        batches: Any = repeated_images(cfg, module, clock.steps * case["batch"])
    else:
        shape = (case["batch"], 3, case["size"], case["size"])
        batches = DeviceBatches(trainer, shape, module.num_classes, clock.steps)
    trainer.fit(module, batches)
    images = case["round_steps"] * case["batch"] * case["gpus"]
    device = trainer.strategy.root_device
    peak = torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else None
    return {
        "arithmetic": str(trainer.precision),
        "execution": str(execution),
        "round_images": images,
        "round_seconds": clock.seconds,
        "images_per_second": images / statistics.median(clock.seconds),
        "first_step_seconds": clock.first,
        "peak_memory_gib": peak,
    }


def data_options(case: Record, steps: int) -> list[str]:
    """Values of the configuration of the data; what lies on the device needs none."""
    if case["part"] != "loader":
        return ["data=fake"]
    return [
        "data=digits",
        f"data.input_size=[3,{case['size']},{case['size']}]",
        f"data.num_workers={len(os.sched_getaffinity(0))}",
        f"trainer.limit_train_batches={steps}",
        "trainer.limit_val_batches=0",
    ]


def repeated_images(cfg: DictConfig, module: Classifier, count: int) -> ImageDataModule:
    """The run's own data, its images again and again until there are so many."""
    data = make_data(cfg)
    data.open(training=True)
    data.follow(module.model)
    images = data.sources["train"]
    data.sources["train"] = ConcatDataset([images] * math.ceil(count / data.sizes["train"]))
    return data


class DeviceBatches:
    """One batch of random images and mixed targets on the device, given again and again."""

    def __init__(self, trainer: Trainer, shape: tuple[int, ...], classes: int, steps: int) -> None:
        self.trainer, self.shape, self.classes, self.steps = trainer, shape, classes, steps

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        device = self.trainer.strategy.root_device
        images = torch.randn(self.shape, device=device)
        targets = torch.rand(len(images), self.classes, device=device).softmax(-1)
        for _ in range(self.steps):
            yield images, targets


class Clock(Callback):
    """Seconds of each round of steps, those of the slowest process, after one that is not timed."""

    def __init__(self, rounds: int, round_steps: int) -> None:
        self.round_steps, self.steps = round_steps, (rounds + 1) * round_steps
        self.seconds: list[float] = []
        self.first = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start all processes together."""
        self._start(trainer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """End a round and begin the next."""
        if batch_idx and (batch_idx + 1) % self.round_steps:
            return
        if trainer.strategy.root_device.type == "cuda":
            torch.cuda.synchronize()
        mine = time.perf_counter() - self._begin
        if batch_idx == 0:
            self.first = mine
        if batch_idx < self.round_steps:
            return self._start(trainer)
        seconds = torch.tensor(mine, device=trainer.strategy.root_device)
        self.seconds.append(float(trainer.strategy.reduce(seconds, reduce_op="max")))
        self._start(trainer)

    def _start(self, trainer: Trainer) -> None:
        trainer.strategy.barrier()
        if trainer.strategy.root_device.type == "cuda":
            torch.cuda.synchronize()
        self._begin = time.perf_counter()


def note_losses(case: Record, folder: Path) -> Record:
    """Loss of each step, over all processes, of a run of the whole engine."""
    micro = case["micro_batches"]
    epoch = case["steps"] // EPOCHS
    stops = case["part"] == "resume" and not case.get("continue")
    stop_after = case["steps"] * 7 // 10 if stops else 0
    cfg = configuration(
        case,
        folder,
        "experiment=nat_tiny_in1k",
        "data=digits",
        f"data.input_size=[3,{case['size']},{case['size']}]",
        "data.num_workers=4",
        "augment=none",
        "tf32=false",
        "model.drop_path_rate=0.0",
        "optimizer.lr=2.0e-4",
        "scheduler.warmup_epochs=1",
        f"global_batch_size={case['global_batch']}",
        f"data.batch_size={case['global_batch'] // case['gpus'] // micro}",
        f"trainer.max_epochs={EPOCHS}",
        f"trainer.limit_train_batches={epoch * micro}",
        "trainer.limit_val_batches=1",
        f"trainer.precision={case['precision']}",
        "callbacks.recent=null",
        f"+callbacks.losses={{_target_: scaling.Losses, stop_after: {stop_after}}}",
        f"ckpt={folder}/last.ckpt" if case.get("continue") else "ckpt=null",
    )
    try:
        run.train(cfg)
    except SIGTERMException:
        if not stops:
            raise
    if rank_zero_only.rank != 0:  # type: ignore[attr-defined]
        return {}
    return {"losses": json.loads((folder / "losses.json").read_text())}


class Losses(Callback):
    """Mean loss of each step over all processes and micro-batches, by the steps before it.

    Args:
        stop_after: Steps after which the run is told to stop, as by a cluster; 0: never.
    """

    def __init__(self, stop_after: int) -> None:
        self.stop_after = stop_after
        self.losses: dict[int, list[float]] = {}

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Note a loss; the counter of steps has moved on where the step is taken."""
        loss = outputs["loss"].detach() * trainer.accumulate_grad_batches
        whole = not trainer.fit_loop.epoch_loop._should_accumulate()
        step = trainer.global_step - whole
        self.losses.setdefault(step, []).append(float(trainer.strategy.reduce(loss)))
        if self.stop_after and trainer.global_step == self.stop_after:
            os.kill(os.getpid(), signal.SIGTERM)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write losses.json into the run's folder."""
        if trainer.is_global_zero:
            means = {step: statistics.mean(losses) for step, losses in self.losses.items()}
            folder = Path(trainer.checkpoint_callback.dirpath)  # type: ignore[union-attr]
            (folder / "losses.json").write_text(json.dumps(means))

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Write them when told to stop, too."""
        self.on_train_end(trainer, pl_module)


def machine() -> Record:
    """What the numbers belong to."""
    on_gpu = torch.cuda.is_available()
    topology = None
    if shutil.which("nvidia-smi"):
        command = ["nvidia-smi", "topo", "-m"]
        underlined = subprocess.run(command, capture_output=True, text=True).stdout
        topology = re.sub(r"\x1b\[\d*m", "", underlined)
    return {
        "device": torch.cuda.get_device_name() if on_gpu else "cpu",
        "devices": torch.cuda.device_count(),
        "interconnect": topology,
        "nccl": ".".join(map(str, torch.cuda.nccl.version())) if on_gpu else None,
        "nccl_settings": {k: v for k, v in os.environ.items() if k.startswith("NCCL_")},
        "versions": {"torch": torch.__version__, "cuda": torch.version.cuda},
    }


if __name__ == "__main__":
    import scaling  # the processes know its functions by this name

    sys.exit(scaling.main())
