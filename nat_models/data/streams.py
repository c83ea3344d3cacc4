"""Data sets that are read as a stream of shards (WebDataset), in an order that can be repeated."""

from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

from PIL import Image
from torch import Generator, Tensor, cuda
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from nat_models.data.images import MAX_TRIES, Sample, collate, decode
from nat_models.data.sampler import seed_rngs
from nat_models.errors import RunStopped


def share(source: Any, rank: int, world_size: int, training: bool) -> None:
    """Give a process its part of the shards.

    In training all parts are made equally long, as steps are taken together; in evaluation every
    sample comes once, so the parts may differ.

    Args:
        source: timm's data set over shards.
        rank: This process's number.
        world_size: Number of processes.
        training: Which of the two.
    """
    reader = source.reader
    # Remembered: a second loader divides the same whole.
    shards = reader.all_shards = getattr(reader, "all_shards", reader.split_info.filenames)
    if len(shards) < world_size:
        raise ValueError(f"data.root={reader.root}: {len(shards)} shards, {world_size} processes")
    if training:
        reader.dist_rank, reader.dist_num_replicas = rank, world_size
    else:
        reader.split_info.filenames = shards[rank::world_size]


class DecodedStream(IterableDataset[Any]):
    """Tensors from a stream of (PIL image, class index).

    What cannot be read is left out, and told together with the next image.

    Args:
        source: timm's data set over shards.
        transform: PIL image to tensor.
        mode: Colour mode that the transform expects, see `decode`.
        seed: Seed of the transform.
    """

    def __init__(
        self, source: Any, transform: Callable[[Image.Image], Tensor], mode: str, seed: int
    ) -> None:
        self.source = source
        self.transform = transform
        self.mode = mode
        self.seed = seed
        self.epoch = 0
        source.reader.input_img_mode = ""  # images come as they are: 16 bits would be clipped

    def __iter__(self) -> Iterator[Sample]:
        worker = get_worker_info()
        errors = _noted_errors(self.source.reader)
        index = -1
        for index, (image, target) in enumerate(self.source):
            seed_rngs(self.seed, self.epoch, worker.id if worker else 0, index)
            yield self.transform(decode(image, self.mode)), target, errors[:], index
            errors.clear()
        if errors:
            yield None, -1, errors, index + 1

    def __len__(self) -> int:
        return len(self.source)


def _noted_errors(reader: Any) -> list[str]:
    """Let timm's reader, about to begin, note in a list what it would only log."""
    errors: list[str] = []

    def shard_ended(error: Exception) -> bool:
        errors.append(f"{error.args[-1]}: {error.args[0]}")  # webdataset adds the shard
        return goes_on(error)

    def goes_on(error: Exception) -> bool:
        if reader.is_training and len(errors) >= MAX_TRIES:  # perhaps for ever
            raise RunStopped(
                f"data.root={reader.root}: {MAX_TRIES} images in a row cannot be read, the last "
                f"{errors[-1]}"
            )
        return True

    def read(sample: dict[str, Any]) -> Any:
        try:
            return decode_sample(sample)
        except Exception as error:
            errors.append(f"{sample['__url__']}: {sample['__key__']}: {error}")
            raise

    reader._lazy_init()
    *_, reading, _ = reader.ds.pipeline
    [decode_sample] = reading.args
    for stage in reader.ds.pipeline:
        if "handler" in getattr(stage, "kw", {}):  # the shards, the images
            stage.kw["handler"] = shard_ended
    reading.args, reading.kw["handler"] = (read,), goes_on
    return errors


class StreamLoader(DataLoader[Any]):
    """Batches of a stream. Order and augmentation depend on the seed, the epoch and the workers.

    Processes evaluate equally many batches, of which the last may be empty.

    Args:
        data: The stream.
        epoch: Tells the epoch that is about to begin.
        batch_size: Images a batch.
        num_workers: Processes that load.
        skipped: Batches that the first iteration leaves out.
        training: Whether only whole batches are given.
        batches_a_step: Their number is rounded down to a multiple of this in training.
        in_any_process: Tells whether what is so here is so in any process.
    """

    def __init__(
        self,
        data: DecodedStream,
        epoch: Callable[[], int],
        batch_size: int,
        num_workers: int,
        skipped: int,
        training: bool,
        batches_a_step: int,
        in_any_process: Callable[[bool], bool],
    ) -> None:
        super().__init__(
            data,
            batch_size=batch_size,
            num_workers=min(num_workers, len(data.source.reader.split_info.filenames)),
            drop_last=training,
            collate_fn=collate,
            generator=Generator(),
            pin_memory=cuda.is_available(),
        )
        self.stream = data
        self.epoch = epoch
        self.skipped = skipped
        self.training = training
        self.batches_a_step = batches_a_step
        self.in_any_process = in_any_process
        data.source.reader.batch_size = batch_size  # each worker gives whole batches
        data.source.set_loader_cfg(num_workers=self.num_workers)

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        epoch, reader = self.epoch(), self.stream.source.reader
        reader.ds, reader.worker_info = None, None  # its shuffling begins anew
        self.stream.source.set_epoch(epoch)
        self.stream.epoch = epoch
        self.generator.manual_seed(self.stream.seed + epoch)
        batches = super().__iter__()
        if not self.training:
            return self._as_many_as_any(batches)
        first, self.skipped = self.skipped, 0
        return islice(batches, first, len(self))

    def __len__(self) -> int:
        if not self.training:
            raise TypeError("how many batches of evaluation there are shows at their end")
        return super().__len__() // self.batches_a_step * self.batches_a_step

    def _as_many_as_any(self, batches: Iterator[Any]) -> Iterator[Any]:
        while self.in_any_process((batch := next(batches, None)) is not None):
            yield collate([]) if batch is None else batch
