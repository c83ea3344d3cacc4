"""Images from any source, as batches for training and evaluation.

Work is divided as in timm's loaders: worker processes decode, crop and augment to uint8, and the
device normalises, erases and mixes whole batches.
"""

import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning import LightningDataModule, Trainer
from numpy.typing import NDArray
from PIL.Image import Image
from timm.data import Mixup, create_transform, resolve_data_config
from timm.data.random_erasing import RandomErasing
from timm.models import get_model_traits
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset
from torchvision.transforms import InterpolationMode

import nat_models.data.posterize  # noqa: F401 - replaces timm's
from nat_models.data.images import MAX_TRIES, Batch, Complaints, DecodedDataset, collate
from nat_models.data.prefetch import DevicePrefetcher
from nat_models.data.sampler import EpochSampler, SeededDataset, seed_rngs
from nat_models.data.sources import (
    ClassMap,
    class_indices,
    count,
    num_classes,
    open_dataset,
    training_classes,
)
from nat_models.data.streams import DecodedStream, StreamLoader, share
from nat_models.errors import RunStopped

_log = logging.getLogger(__name__)

INTERPOLATIONS = {mode.value for mode in InterpolationMode}


class ImageDataModule(LightningDataModule):
    """Data sets, transforms and loaders of one run.

    Size, crop, interpolation and normalisation follow the model's `pretrained_cfg` where they are
    not given here. In order: `open`, build the model, `follow(model)`, give this to a Trainer.

    Args:
        name: Data set, see `open_dataset`; so are root, class_map and options.
        root: See above.
        train_split: Name of the split to train on.
        val_split: Name of the split to evaluate on.
        class_map: See above.
        options: See above.
        labels: Of a flat folder of held-out images: file with their names and classes, which are
            numbered as class_map or else the training folders say.
        on_error: What to do about an image that cannot be read: "raise", or "skip" and count it.
        input_size: Channels, height and width that the model is fed; one channel: grey.
        mean: Mean of each channel, in [0, 1].
        std: Standard deviation of each channel.
        interpolation: Of resizing: "bilinear", "bicubic", ...
        crop_pct: Share of the resized image's side that the evaluation's centre crop keeps.
        batch_size: Images a step and process.
        num_workers: Processes that load, but for "wds" at most one a core; 0 loads in the training
            process.
        augment: Training transforms, arguments of `timm.data.create_transform`.
        mixup: Arguments of `timm.data.Mixup`; None: off.
        seed: Seed of order, augmentation and mixup.
    """

    def __init__(
        self,
        name: str,
        root: str | None = None,
        train_split: str = "train",
        val_split: str = "validation",
        class_map: str | dict[str, int] | None = None,
        options: dict[str, Any] | None = None,
        labels: str | None = None,
        on_error: str = "raise",
        input_size: list[int] | None = None,
        mean: list[float] | None = None,
        std: list[float] | None = None,
        interpolation: str | None = None,
        crop_pct: float | None = None,
        batch_size: int = 128,
        num_workers: int = 0,
        augment: dict[str, Any] | None = None,
        mixup: dict[str, Any] | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        for key, value, least in (("batch_size", batch_size, 1), ("num_workers", num_workers, 0)):
            if not isinstance(value, int) or value < least:
                raise ValueError(f"data.{key}={value}: expected an integer, at least {least}")
        if input_size is not None and (not isinstance(input_size, list) or len(input_size) != 3):
            raise ValueError(f"data.input_size={input_size}: expected [channels, height, width]")
        if mixup is not None and batch_size % 2:
            raise ValueError(f"data.batch_size={batch_size}: mixup needs an even number")
        self.save_hyperparameters()
        self.settings: Any = self.hparams
        self.sources: dict[str, Dataset[Any]] = {}
        self.config: dict[str, Any] = {}
        self._normalise = Normalise((0.0,), (1.0,))
        self._erase: RandomErasing | None = None
        self._mix: Mixup | None = None
        self.complaints = Complaints(on_error)
        self._classes: int | None = None
        self.indices = torch.empty(0)  # of the batch at hand, in its data set
        self._epoch = self._batches_done = 0

    def open(self, training: bool) -> None:
        """Find the images of the held-out split, and of the training split if asked.

        Raises:
            ValueError: The data is not there, or its splits do not belong together.
        """
        s = self.settings
        parts = {"train": s.train_split, "val": s.val_split} if training else {"val": s.val_split}
        for part, split in parts.items():
            self.sources[part] = open_dataset(
                s.name, s.root, split, part == "train",
                s.class_map if part == "train" else self._class_map(), s.options,
                None if part == "train" else s.labels,
            )  # fmt: skip
        if training:
            self._check_splits()

    @property
    def num_classes(self) -> int | None:
        """Number of classes in the data, None if its source does not say."""
        return num_classes(next(iter(self.sources.values())))

    @property
    def sizes(self) -> dict[str, int]:
        """Number of images in each opened split."""
        return {part: count(source) for part, source in self.sources.items()}

    def follow(self, model: nn.Module) -> None:
        """Take what is not given here from the model: image size, crop, normalisation, classes."""
        given = dict(self.hparams)
        traits = get_model_traits(model)
        if given["input_size"] is None and traits.get("img_size"):  # not its published one
            given["input_size"] = [traits["in_chans"], *traits["img_size"]]
        self.config = resolve_data_config(given, model=model)
        if self.config["interpolation"] not in (*INTERPOLATIONS, "random"):
            expected = f"expected one of {sorted(INTERPOLATIONS)}"
            raise ValueError(f"data.interpolation={self.config['interpolation']}: {expected}")
        self._classes = getattr(model, "num_classes", None)
        augment = self.settings.augment or {}
        self._normalise = Normalise(self.config["mean"], self.config["std"])
        if probability := augment.get("re_prob", 0.0):
            mode, count = augment.get("re_mode", "const"), augment.get("re_count", 1)
            self._erase = RandomErasing(probability, mode=mode, max_count=count)
        if self.settings.mixup:
            mixup = {"label_smoothing": 0.0, **self.settings.mixup}
            self._mix = Mixup(**mixup, num_classes=model.num_classes)

    @property
    def class_names(self) -> list[str] | None:
        """Names of the classes in order, None if the source has none."""
        classes = class_indices(next(iter(self.sources.values()))) or {}
        ordered = sorted(classes, key=lambda name: classes[name])
        return ordered if sorted(classes.values()) == [*range(len(classes))] and classes else None

    def image_name(self, index: int) -> str:
        """Name of a held-out image: its file's, else its number."""
        try:
            return str(self.sources["val"].filename(index))  # type: ignore[attr-defined]
        except (AttributeError, AssertionError):
            return str(index)

    @property
    def mode(self) -> str:
        """Colour mode of the images: "L" (grey) or "RGB"."""
        return "L" if self.config["input_size"][0] == 1 else "RGB"

    def resize(self, size: int, model: nn.Module) -> None:
        """Feed the model square images of another side."""
        if not isinstance(size, int) or size < 1:
            raise ValueError(f"sizes={size}: expected integers, at least 1")
        self.settings.input_size = [self.config["input_size"][0], size, size]
        self.follow(model)

    def prepare(self, picture: Image) -> tuple[Tensor, NDArray[np.uint8]]:
        """A picture as the model is fed it in evaluation, and as uint8 [H, W(, 3)]."""
        transform = create_transform(**{**self.config, "use_prefetcher": True})
        pixels = torch.as_tensor(transform(picture)).contiguous()  # as batches are
        return self._normalise(pixels), pixels.permute(1, 2, 0).squeeze(-1).numpy()

    def train_dataloader(self) -> DataLoader[Batch] | DevicePrefetcher:
        """Batches of uint8 images and class indices, from where a resumed trainer stands."""
        assert self.trainer is not None
        augment = {**(self.settings.augment or {}), "is_training": True}
        data = self._transformed("train", **augment)
        seed = self.settings.seed
        if isinstance(data, DecodedStream):
            return self._on_device(self._stream(data, training=True))
        size = self.settings.batch_size
        sampler = EpochSampler(
            data, seed, self.trainer.global_rank, self.trainer.world_size,
            share=size * self.trainer.accumulate_grad_batches,
        )  # fmt: skip
        sampler.set_epoch(self._epoch, self._batches_done * size)
        return self._on_device(
            self._loader(
                SeededDataset(data, seed), sampler=sampler, batch_size=size, drop_last=True
            )
        )

    def val_dataloader(self) -> DataLoader[Batch] | DevicePrefetcher:
        """Batches of uint8 images and class indices; over all ranks each image comes once."""
        assert self.trainer is not None
        data = self._transformed("val")
        if isinstance(data, DecodedStream):
            return self._on_device(self._stream(data, training=False))
        processes, size = self.trainer.world_size, self.settings.batch_size
        indices = range(self.trainer.global_rank, len(data), processes)
        longest = -(-len(data) // processes)  # equally many batches for each, the last may be empty
        batches = [indices[i : i + size] for i in range(0, longest, size)]
        return self._on_device(self._loader(data, batch_sampler=batches))

    def state_dict(self) -> dict[str, Any]:
        """The epoch to go on with, how many of its batches are done, and the classes' names."""
        assert self.trainer is not None
        loop: Any = self.trainer.fit_loop
        batches = loop.epoch_loop.batch_progress
        done = 0 if batches.is_last_batch else batches.current.processed
        return {
            "epoch": loop.epoch_progress.current.processed,
            "batches_done": done,
            "pace": self.pace(self.trainer),
            "class_names": self.class_names,
        }

    def pace(self, trainer: Trainer) -> dict[str, int]:
        """Images over all processes; what a number of batches says depends on it."""
        s = self.settings
        images = s.batch_size * trainer.world_size
        pace = {
            "images_a_step": images * trainer.accumulate_grad_batches,
            "images_a_batch": images,
        }
        if s.name == "wds":  # whose shards are divided among all that read
            pace |= {"processes": trainer.world_size, "num_workers": s.num_workers}
        return pace

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Let the next training loader begin there."""
        self._epoch, self._batches_done = state_dict["epoch"], state_dict["batches_done"]

    def example(self) -> tuple[Tensor, NDArray[np.uint8]]:
        """The held-out image in the middle, as the model is fed and as uint8 [H, W(, 3)]."""
        data = self._transformed("val")
        sample = next(iter(data)) if isinstance(data, DecodedStream) else data[len(data) // 2]
        pixels = torch.as_tensor(sample[0])
        picture = pixels.permute(1, 2, 0).squeeze(-1).numpy()
        return self._normalise(pixels), picture

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Batch:
        """Check the batch, and seed what follows in a training step: erasing, mixup, dropout.

        Raises:
            RunStopped: An image cannot be read, in training too many in a row although they are to
                be skipped, or a label is not one of the model's classes.
        """
        assert self.trainer is not None
        images, targets, errors, self.indices = batch
        self.complaints(errors)
        self._check_labels(targets)
        if self.trainer.training:
            if len(targets) < self.settings.batch_size:
                raise RunStopped(
                    f"data.name={self.settings.name}: {MAX_TRIES} images in a row cannot be read, "
                    f"the last {errors[-1]}"
                )
            batches = self.trainer.fit_loop.epoch_loop.batch_progress.current.ready
            place = (self.trainer.current_epoch, batches, self.trainer.global_rank)
            seed_rngs(self.settings.seed, *place)
        return images, targets

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """Normalise; in training also erase and mix, targets to probabilities [B, classes].

        Images get the precision of the model. A batch without targets gets a blank image, for the
        model to run in all processes.
        """
        assert self.trainer is not None
        images, targets = batch
        precision = self.trainer.precision_plugin
        if not len(targets):  # none is left, or none could be read
            images = torch.zeros(1, *self.config["input_size"], device=targets.device)
            return precision.convert_input(images), targets
        images = self._normalise(images)
        if self.trainer.training:
            if self._erase:
                self._erase.device = images.device
                images = self._erase(images)
            if self._mix:
                images, targets = self._mix(images, targets)
        return precision.convert_input(images), targets

    def _check_labels(self, targets: Tensor) -> None:
        classes = self._classes
        if classes and len(targets) and not 0 <= targets.min() <= targets.max() < classes:
            wrong = targets[(targets < 0) | (targets >= classes)][0]
            raise RunStopped(
                f"data.name={self.settings.name}: an image has label {wrong}, the model's classes "
                f"are 0 to {classes - 1} (model.num_classes, data.class_map)"
            )

    def _class_map(self) -> ClassMap:
        """Of the held-out images; those of a flat folder have no class folders of their own."""
        s = self.settings
        if s.name == "folder" and s.labels is not None:
            if "train" in self.sources:
                return class_indices(self.sources["train"])
            return s.class_map or training_classes(s.root, s.train_split)
        return s.class_map  # type: ignore[no-any-return]

    def _transformed(self, part: str, **augment: Any) -> DecodedDataset | DecodedStream:
        # use_prefetcher: timm's transforms then end in uint8 tensors, as for its own loader.
        options = {**self.config, "use_prefetcher": True, **augment}
        source, transform = self.sources[part], create_transform(**options)
        if isinstance(source, IterableDataset):
            return DecodedStream(source, transform, self.mode, self.settings.seed)
        return DecodedDataset(source, transform, self.mode, training=part == "train")

    def _stream(self, data: DecodedStream, training: bool) -> StreamLoader:
        trainer, s = self.trainer, self.settings
        assert trainer is not None
        share(data.source, trainer.global_rank, trainer.world_size, training)
        return StreamLoader(
            data,
            epoch=lambda: trainer.current_epoch,
            batch_size=s.batch_size,
            num_workers=s.num_workers,
            skipped=self._batches_done if training else 0,
            training=training,
            batches_a_step=trainer.accumulate_grad_batches,
            in_any_process=self._in_any_process,
        )

    def _on_device(self, loader: DataLoader[Batch]) -> DataLoader[Batch] | DevicePrefetcher:
        trainer: Any = self.trainer
        device = trainer.strategy.root_device
        if device.type != "cuda":
            return loader
        execution = getattr(trainer.lightning_module, "execution", None)
        channels_last = getattr(execution, "channels_last", False)
        return DevicePrefetcher(loader, device, channels_last)

    def _in_any_process(self, here: bool) -> bool:
        strategy: Any = self.trainer.strategy  # type: ignore[union-attr]
        return bool(
            strategy.reduce(torch.tensor(float(here), device=strategy.root_device), reduce_op="max")
        )

    def _loader(self, data: Dataset[Any], **batches: Any) -> DataLoader[Batch]:
        workers, cores = self.settings.num_workers, _cores()
        if workers > cores:
            _log.info("data.num_workers=%d: %d, one for each core here", workers, cores)
            workers = self.settings.num_workers = cores
        return DataLoader(
            data,
            **batches,
            collate_fn=collate,
            num_workers=workers,
            persistent_workers=workers > 0,
            pin_memory=torch.cuda.is_available(),
        )

    def _check_splits(self) -> None:
        s, train, val = self.settings, self.sources["train"], self.sources["val"]
        if self.sizes["train"] < s.batch_size:
            raise ValueError(
                f"data.batch_size={s.batch_size}: there are {self.sizes['train']} training images"
            )
        splits = f"data.root={s.root}: the splits {s.train_split!r} and {s.val_split!r}"
        if s.name == "folder" and Path(train.reader.root) == Path(val.reader.root):  # type: ignore[attr-defined]
            raise ValueError(f"{splits} are the same folder; expected a folder for each")
        # Where a file labels the images, it was checked when opened.
        if s.labels is None and class_indices(train) != class_indices(val):
            ours, theirs = set(class_indices(train) or {}), set(class_indices(val) or {})
            raise ValueError(
                f"{splits} have different classes, such as {sorted(ours ^ theirs)[:5]}"
            )


class Normalise:
    """uint8 images to floats of the given mean and standard deviation, on the images' device.

    Args:
        mean: Mean of each channel, in [0, 1].
        std: Standard deviation of each channel.
    """

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        self.mean = torch.tensor(mean).view(-1, 1, 1) * 255
        self.std = torch.tensor(std).view(-1, 1, 1) * 255

    def __call__(self, images: Tensor) -> Tensor:
        """uint8 [B, C, H, W] to fp32 of the same shape."""
        if self.mean.device != images.device:
            self.mean, self.std = self.mean.to(images.device), self.std.to(images.device)
        return images.float().sub_(self.mean).div_(self.std)


def _cores() -> int:
    """Number of cores that this process may use."""
    may_tell = hasattr(os, "sched_getaffinity")  # Linux
    return len(os.sched_getaffinity(0)) if may_tell else os.cpu_count() or 1
