import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import timm
import torch
from lightning import Trainer
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import nn

from nat_models.data import ImageDataModule
from nat_models.data.images import decode
from nat_models.errors import RunStopped

NAMES = ["cat", "dog", "newt"]


def attached(data: ImageDataModule, model: nn.Module, training: bool = True, **trainer: Any) -> Any:
    """Open the data for a model and give it to a trainer that stands at the start of training."""
    data.open(training)
    data.follow(model)
    data.trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, **trainer)
    data.trainer.training = training
    return data


def model_of(input_size: tuple[int, int, int], classes: int = 10) -> Any:
    channels = input_size[0]
    cfg = {
        "input_size": input_size,
        "mean": (0.25,) * channels,
        "std": (0.5,) * channels,
        "crop_pct": 0.5,
    }
    model: Any = nn.Identity()
    model.pretrained_cfg, model.num_classes = cfg, classes
    return model


def on_device(data: ImageDataModule, batch: Any) -> Any:
    return data.on_after_batch_transfer(data.on_before_batch_transfer(batch, 0), 0)


def test_evaluation_follows_the_models_pretrained_cfg(image_folder):
    data = attached(
        ImageDataModule("folder", str(image_folder)), model_of((3, 10, 10)), training=False
    )
    images, targets, *rest = next(iter(data.val_dataloader()))
    assert images.dtype == torch.uint8
    assert images.shape == (6, 3, 10, 10)
    assert targets.tolist() == [0, 0, 1, 1, 2, 2]
    normalised, _ = on_device(data, (images, targets, *rest))
    torch.testing.assert_close(normalised, (images / 255 - 0.25) / 0.5)
    # crop_pct 0.5: the image's shorter side becomes 20, of which the middle 10 are kept
    transform = timm.data.create_transform(
        (3, 10, 10), crop_pct=0.5, interpolation="bicubic", mean=(0.25,) * 3, std=(0.5,) * 3
    )
    torch.testing.assert_close(normalised[0], transform(decode(data.sources["val"][0][0], "RGB")))


@pytest.mark.parametrize(
    ("precision", "dtype"),
    [("bf16-mixed", torch.float32), ("bf16-true", torch.bfloat16), ("64-true", torch.float64)],
)
def test_images_are_in_the_models_precision(image_folder, precision, dtype):
    data = ImageDataModule("folder", str(image_folder))
    data = attached(data, model_of((3, 32, 32), 3), training=False, precision=precision)
    images, targets = on_device(data, next(iter(data.val_dataloader())))
    assert images.dtype == dtype
    none_left, _ = data.on_after_batch_transfer((images[:0], targets[:0]), 0)
    assert none_left.dtype == dtype


def test_own_arguments_go_before_the_models_and_one_channel_is_grey(image_folder):
    own = {"input_size": [1, 12, 12], "mean": [0.0], "std": [1.0]}
    data = attached(
        ImageDataModule("folder", str(image_folder), **own), model_of((3, 10, 10)), training=False
    )
    images, _ = on_device(data, next(iter(data.val_dataloader())))
    assert images.shape == (6, 1, 12, 12)


def test_training_batches_repeat_exactly_whatever_the_workers(image_folder):
    augment = {
        "scale": [0.2, 1.0],
        "auto_augment": "rand-m9-mstd0.5",
        "re_prob": 0.5,
        "re_mode": "pixel",
    }

    def batches(workers: int, seed: int = 0) -> list[torch.Tensor]:
        data = ImageDataModule(
            "folder", str(image_folder), batch_size=4, num_workers=workers, augment=augment,
            mixup={"mixup_alpha": 0.8, "cutmix_alpha": 1.0}, seed=seed,
        )  # fmt: skip
        attached(data, model_of((3, 16, 16), classes=3))
        mixed = [on_device(data, batch) for batch in data.train_dataloader()]
        assert all(targets.shape == (4, 3) for _, targets in mixed)
        torch.testing.assert_close(torch.cat([t for _, t in mixed]).sum(1), torch.ones(12))
        return [images for images, _ in mixed]

    ours = batches(0)
    assert all(map(torch.equal, ours, batches(2)))
    assert not any(map(torch.equal, ours, batches(0, seed=1)))


@pytest.mark.parametrize(("given", "workers"), [(8, 2), (1, 1)])
def test_at_most_one_process_a_core_loads(monkeypatch, caplog, given, workers):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 5}, raising=False)
    data = ImageDataModule("fake", batch_size=4, num_workers=given, options={"size": 8})
    attached(data, model_of((3, 16, 16)))
    with caplog.at_level("INFO", logger="nat_models"):
        loaders = [data.train_dataloader(), data.val_dataloader()]
    assert [loader.num_workers for loader in loaders] == [workers] * 2
    assert data.settings.num_workers == workers
    told = ["data.num_workers=8: 2, one for each core here"] if workers < given else []
    assert [text for text in caplog.messages if "num_workers" in text] == told


def test_restored_loader_goes_on_where_the_state_says(image_folder):
    data = ImageDataModule("folder", str(image_folder), batch_size=4, augment={"no_aug": True})
    attached(data, model_of((3, 16, 16), classes=3))
    data.load_state_dict({"epoch": 1, "batches_done": 0})
    epoch = [images for images, *_ in data.train_dataloader()]
    data.load_state_dict({"epoch": 1, "batches_done": 2})
    loader = data.train_dataloader()
    rest = [images for images, *_ in loader]
    assert (len(rest), len(loader)) == (1, 3)
    assert torch.equal(rest[0], epoch[2])


def test_state_is_the_next_batch_to_train_on(image_folder):
    data = attached(
        ImageDataModule("folder", str(image_folder), batch_size=4), model_of((3, 16, 16))
    )
    loop = data.trainer.fit_loop
    loop.epoch_progress.current.processed = 1
    loop.epoch_loop.batch_progress.current.processed = 2
    state = data.state_dict()
    assert state.pop("pace") == {"images_a_step": 4, "images_a_batch": 4}
    assert state == {"epoch": 1, "batches_done": 2, "class_names": NAMES}
    loop.epoch_loop.batch_progress.is_last_batch = True
    assert data.state_dict()["batches_done"] == 0


def test_an_epoch_has_whole_steps_only(image_folder):
    data = ImageDataModule("folder", str(image_folder), batch_size=2, augment={"no_aug": True})
    attached(data, model_of((3, 16, 16), classes=3), accumulate_grad_batches=4)
    loader = data.train_dataloader()
    assert len(loader) == len(list(loader)) == 4  # of six
    assert data.pace(data.trainer) == {"images_a_step": 8, "images_a_batch": 2}


def test_ranks_evaluate_every_image_once(image_folder):
    seen = []
    for rank in range(4):
        data = attached(ImageDataModule("folder", str(image_folder)), model_of((3, 16, 16)), False)
        strategy = SingleDeviceStrategy(torch.device("cpu"))
        data.trainer = SimpleNamespace(global_rank=rank, world_size=4, strategy=strategy)
        seen += [image for images, *_ in data.val_dataloader() for image in images]
    assert len(seen) == 6
    assert len({image.numpy().tobytes() for image in seen}) == 6


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 13}, r"data\.batch_size=13: there are 12 training images"),
        (
            {"batch_size": 3, "mixup": {"mixup_alpha": 1.0}},
            r"data\.batch_size=3: mixup needs an even",
        ),
    ],
)
def test_bad_batch_size(image_folder, arguments, message):
    with pytest.raises(ValueError, match=message):
        ImageDataModule("folder", str(image_folder), **arguments).open(training=True)


def test_splits_must_have_the_same_classes(image_folder):
    shutil.rmtree(image_folder / "val" / "dog")
    with pytest.raises(
        ValueError, match=r"'train' and 'validation' have different classes.*\['dog'\]"
    ):
        ImageDataModule("folder", str(image_folder), batch_size=2).open(training=True)


def test_training_and_held_out_images_must_not_be_the_same_folder(image_folder):
    root = str(image_folder / "train")
    with pytest.raises(ValueError, match=rf"data\.root={root}: .*'train' and 'validation'.*same"):
        ImageDataModule("folder", root, batch_size=2).open(training=True)


def flatten(folder: Path, classes: dict[str, str]) -> str:
    """Bring the held-out images of some classes into one folder; the file of their classes."""
    lines = []
    for old, new in classes.items():
        for path in sorted((folder / "val" / old).glob("*.png")):
            lines.append(f"{old}{path.name} {new}")
            path.rename(folder / "val" / f"{old}{path.name}")
    for name in NAMES:
        shutil.rmtree(folder / "val" / name)
    (folder / "labels.txt").write_text("\n".join(lines))
    return str(folder / "labels.txt")


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_a_flat_folders_classes_are_numbered_as_the_training_folders(image_folder, training):
    labels = flatten(image_folder, {"dog": "dog", "newt": "newt"})
    data = ImageDataModule("folder", str(image_folder), batch_size=2, labels=labels)
    data.open(training)
    assert [target for _, target in data.sources["val"]] == [1, 1, 2, 2]
    assert (data.num_classes, data.class_names) == (3, NAMES)


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_a_flat_folders_classes_are_numbered_by_the_class_map(image_folder, training):
    labels = flatten(image_folder, {"dog": "dog", "newt": "newt"})
    class_map = {"newt": 0, "dog": 1}
    data = ImageDataModule(
        "folder", str(image_folder), batch_size=2, class_map=class_map, labels=labels
    )
    data.open(training)
    assert [target for _, target in data.sources["val"]] == [1, 1, 0, 0]


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_a_flat_folders_class_that_the_training_folders_have_not_is_named(image_folder, training):
    labels = flatten(image_folder, {"cat": "cat", "dog": "emu", "newt": "newt"})
    data = ImageDataModule("folder", str(image_folder), batch_size=2, labels=labels)
    with pytest.raises(
        ValueError,
        match=rf"data\.labels={labels}: unknown class 'emu'; expected .*cat, dog, newt",
    ):
        data.open(training)


def test_a_flat_folder_must_not_be_the_training_folder(image_folder):
    labels = flatten(image_folder, {"cat": "0"})
    shutil.rmtree(image_folder / "train")
    data = ImageDataModule("folder", str(image_folder / "val"), batch_size=2, labels=labels)
    with pytest.raises(ValueError, match=r"'train' and 'validation' are the same folder"):
        data.open(training=True)


def broken(folder: Path) -> Path:
    path = folder / "val" / "cat" / "1.png"
    path.write_bytes(path.read_bytes()[:500])
    return path


@pytest.mark.parametrize("workers", [0, 2])
def test_a_broken_image_ends_an_evaluation_with_its_name(image_folder, workers):
    path = broken(image_folder)
    data = ImageDataModule("folder", str(image_folder), num_workers=workers)
    attached(data, model_of((3, 16, 16)), training=False)
    [batch] = data.val_dataloader()
    with pytest.raises(RunStopped, match=rf"^{path}: .*truncated.*data\.on_error=skip"):
        on_device(data, batch)


def test_a_broken_image_is_left_out_and_counted(image_folder):
    broken(image_folder)
    data = ImageDataModule("folder", str(image_folder), batch_size=1, on_error="skip")
    attached(data, model_of((3, 16, 16)), training=False)
    targets = [on_device(data, batch)[1].tolist() for batch in data.val_dataloader()]
    assert targets == [[0], [], [1], [1], [2], [2]]
    assert data.complaints.count == 1


def test_training_ends_where_too_many_images_in_a_row_are_broken(image_folder):
    for path in (image_folder / "train").glob("*/*.png"):
        path.write_bytes(b"")
    options = {"batch_size": 4, "on_error": "skip", "augment": {"no_aug": True}}
    data = ImageDataModule("folder", str(image_folder), **options)
    attached(data, model_of((3, 16, 16), classes=3))
    with pytest.raises(RunStopped, match=r"10 images in a row cannot be read, the last .*\.png: "):
        on_device(data, next(iter(data.train_dataloader())))


@pytest.mark.parametrize("label", [3, -1])
def test_a_label_out_of_range_is_named(image_folder, label):
    data = ImageDataModule("folder", str(image_folder))
    attached(data, model_of((3, 16, 16), classes=3), training=False)
    batch = (torch.zeros(2, 3, 16, 16), torch.tensor([0, label]), [], torch.arange(2))
    with pytest.raises(RunStopped, match=rf"label {label}, the model's classes are 0 to 2"):
        data.on_before_batch_transfer(batch, 0)
