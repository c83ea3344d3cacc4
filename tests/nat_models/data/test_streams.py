import io
import tarfile
from itertools import chain
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from lightning.pytorch.strategies import SingleDeviceStrategy
from PIL import Image
from torch import nn

from nat_models.data import ImageDataModule
from nat_models.errors import RunStopped, faults_of_the_machine

pytest.importorskip("webdataset", reason="comes with nat-models[data]")
SHARDS = "part-{0000..0003}.tar"  # of five images each, whose class is their number


@pytest.fixture
def shards(tmp_path):
    for shard in range(4):
        with tarfile.open(tmp_path / f"part-{shard:04}.tar", "w") as tar:
            for i in range(5):
                label = 5 * shard + i
                file = io.BytesIO()
                Image.fromarray(np.full((9, 9, 3), 10 * label, np.uint8)).save(file, "PNG")
                for name, content in (("png", file.getvalue()), ("cls", str(label).encode())):
                    info = tarfile.TarInfo(f"{label:04}.{name}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
    return tmp_path


def opened(
    root, epoch: int = 0, rank: int = 0, world_size: int = 1, accumulated: int = 1, **options
):
    data = ImageDataModule(
        "wds", str(root), f"{SHARDS}|20", f"{SHARDS}|20", batch_size=5, on_error="skip",
        augment={"scale": [0.2, 1.0], "color_jitter": 0.4}, **options,
    )  # fmt: skip
    data.open(training=True)
    model = nn.Identity()
    model.pretrained_cfg, model.num_classes = {"input_size": (3, 8, 8)}, 20
    data.follow(model)
    data.trainer = SimpleNamespace(
        global_rank=rank, world_size=world_size, current_epoch=epoch,
        accumulate_grad_batches=accumulated, strategy=SingleDeviceStrategy(torch.device("cpu")),
    )  # fmt: skip
    return data


def labels(batches) -> list[int]:
    return list(chain.from_iterable(targets.tolist() for _, targets, *_ in batches))


def test_sizes_are_known(shards):
    data = opened(shards)
    assert (data.sizes, data.num_classes) == ({"train": 20, "val": 20}, None)
    assert len(data.train_dataloader()) == 4


@pytest.mark.parametrize("workers", [0, 2])
def test_an_epoch_repeats_and_goes_on_where_the_state_says(shards, workers):
    def batches(epoch: int, done: int = 0):
        data = opened(shards, epoch, num_workers=workers)
        data.load_state_dict({"epoch": epoch, "batches_done": done})
        return list(data.train_dataloader())

    whole = batches(1)
    assert len(labels(whole)) == 20
    for (images, targets, *_), (again, same, *_) in zip(whole, batches(1), strict=True):
        assert torch.equal(images, again)
        assert torch.equal(targets, same)
    rest = batches(1, done=3)
    assert len(rest) == 1
    assert torch.equal(rest[0][0], whole[3][0])
    assert labels(batches(2)) != labels(whole)


def test_one_loader_orders_each_epoch_as_a_new_one_would(shards):
    data = opened(shards, 0)
    loader = data.train_dataloader()
    list(loader)
    data.trainer.current_epoch = 1
    assert labels(loader) == labels(opened(shards, 1).train_dataloader())


@pytest.mark.parametrize("workers", [0, 2])
def test_ranks_evaluate_every_image_once(shards, workers):
    seen = []
    for rank in range(3):
        data = opened(shards, 0, rank, 3, num_workers=workers)
        data.val_dataloader()  # as a validation in training makes one before
        seen += labels(data.val_dataloader())
    assert sorted(seen) == list(range(20))


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("workers", [0, 3])
def test_an_epoch_has_whole_steps_only_and_as_many_as_it_says(shards, workers):
    # Three workers have 7 images each at most, which are filled up to 10.
    for accumulated in (1, 3):
        data = opened(shards, 0, accumulated=accumulated, num_workers=workers)
        loader = data.train_dataloader()
        assert len(loader) == len(list(loader))
        assert len(loader) % accumulated == 0
    assert data.pace(data.trainer)["num_workers"] == workers


def test_a_process_that_has_ended_gives_empty_batches_until_all_have(shards):
    data = opened(shards, 0, rank=0, world_size=2)
    left = iter([True] * 4 + [False])
    data._in_any_process = lambda here: next(left)
    batches = list(data.val_dataloader())
    assert [len(targets) for _, targets, *_ in batches] == [5, 5, 0, 0]


def test_too_few_shards_are_named(shards):
    with pytest.raises(ValueError, match=r"data\.root=.*: 4 shards, 5 processes"):
        opened(shards, 0, 0, 5).train_dataloader()


def damage(shards, count: int) -> None:
    """Cut the first images of the first shard."""
    whole = (shards / "part-0000.tar").read_bytes()
    for _ in range(count):
        start = whole.index(b"\x89PNG")
        whole = whole[:start] + bytes(40) + whole[start + 40 :]
    (shards / "part-0000.tar").write_bytes(whole)


@pytest.mark.parametrize("workers", [0, 2])
def test_broken_images_of_shards_are_named_and_left_out(shards, workers):
    damage(shards, 2)
    data = opened(shards, num_workers=workers)
    batches = list(data.val_dataloader())
    assert sorted(labels(batches)) == list(range(2, 20))
    errors = [error for _, _, errors, _ in batches for error in errors]
    assert len(errors) == 2
    assert "part-0000.tar: 0000: cannot identify image" in errors[0]
    training = labels(data.train_dataloader())
    assert len(training) == 20
    assert not {0, 1} & set(training)


def test_the_end_of_a_stream_tells_what_was_broken_too(shards):
    damage(shards, 5)
    data = opened(shards, rank=0, world_size=4)
    data._in_any_process = lambda here: here
    [(_, targets, errors, _)] = data.val_dataloader()
    assert (len(targets), len(errors)) == (0, 5)


@pytest.mark.parametrize("workers", [0, 2])
def test_shards_in_which_all_is_broken_end_a_training(shards, workers):
    damage(shards, 5)
    for i in (1, 2, 3):
        (shards / f"part-{i:04}.tar").write_bytes((shards / "part-0000.tar").read_bytes())
    message = r"\Adata.root=.*: 10 images in a row cannot be read, the last .*part-.*\Z"
    with pytest.raises(RunStopped, match=message), faults_of_the_machine():
        list(opened(shards, num_workers=workers).train_dataloader())


def test_a_shard_that_ends_early_is_told(shards):
    whole = (shards / "part-0000.tar").read_bytes()
    (shards / "part-0000.tar").write_bytes(whole[:700])  # within its first file
    batches = list(opened(shards).val_dataloader())
    told = [error for *_, errors, _ in batches for error in errors]
    assert any(error.endswith("part-0000.tar: unexpected end of data") for error in told)
