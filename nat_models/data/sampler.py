"""Random order and augmentation as functions of seed, epoch and index: a resume repeats nothing.

No state of a random generator has to be saved: whoever knows the epoch and the batch can go on, in
any number of worker processes.
"""

import random
from collections.abc import Iterator, Sized
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler


def seed_rngs(*key: int) -> None:
    """Seed `random`, NumPy and PyTorch (CPU, and the CUDA device in use) from integers >= 0."""
    word = int(np.random.SeedSequence(key).generate_state(1)[0])
    random.seed(word)
    np.random.seed(word)
    torch.default_generator.manual_seed(word)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed(word)


class EpochSampler(Sampler[tuple[int, int]]):
    """Yields (epoch, index), in an order that depends on the seed and the epoch alone.

    Args:
        data: Data set to draw from.
        seed: Seed of the order.
        rank: This process's number.
        world_size: Number of processes.
        share: Each process's share is rounded down to a multiple of this.
    """

    def __init__(
        self, data: Sized, seed: int, rank: int = 0, world_size: int = 1, share: int = 1
    ) -> None:
        self.length = len(data)
        self.share = share
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.epoch = 0
        self.skipped = 0

    def set_epoch(self, epoch: int, skipped: int = 0) -> None:
        """Choose the epoch; the next iteration alone leaves out its first `skipped` samples."""
        # Lightning announces the epoch once more after a resume: that must not rewind it.
        if epoch != self.epoch or skipped:
            self.epoch, self.skipped = epoch, skipped

    def __iter__(self) -> Iterator[tuple[int, int]]:
        first, self.skipped = self.skipped, 0
        order = torch.randperm(
            self.length, generator=torch.Generator().manual_seed(self.seed + self.epoch)
        )
        share = order[self.rank :: self.world_size][: len(self)].tolist()
        return iter([(self.epoch, index) for index in share[first:]])

    def __len__(self) -> int:
        return self.length // self.world_size // self.share * self.share


class SeededDataset(Dataset[Any]):
    """A data set read by (epoch, index), with every random generator seeded before each sample.

    Args:
        data: Data set with random transforms.
        seed: Seed of the transforms.
    """

    def __init__(self, data: Dataset[Any], seed: int) -> None:
        self.data = data
        self.seed = seed

    def __getitem__(self, key: tuple[int, int]) -> Any:
        epoch, index = key
        seed_rngs(self.seed, epoch, index)
        return self.data[index]
