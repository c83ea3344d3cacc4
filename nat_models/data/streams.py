"""Data sets that are read as a stream of shards (WebDataset), in an order that can be repeated."""

from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

from torch import Generator, cuda
from torch.utils.data import DataLoader

from nat_models.data.images import DecodedStream, collate


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
