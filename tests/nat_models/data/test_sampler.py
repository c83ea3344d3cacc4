import random

import numpy as np
import pytest
import torch

from nat_models.data.sampler import EpochSampler, SeededDataset, seed_rngs


def drawn(sampler: EpochSampler, epoch: int, skipped: int = 0) -> list[tuple[int, int]]:
    sampler.set_epoch(epoch, skipped)
    return list(sampler)


def test_an_epoch_visits_everything_once_in_its_own_order():
    sampler = EpochSampler(range(50), seed=3)
    first, second = drawn(sampler, 0), drawn(sampler, 1)
    assert sorted(index for _, index in first) == list(range(50))
    assert {epoch for epoch, _ in second} == {1}
    assert [i for _, i in first] != [i for _, i in second]
    assert drawn(EpochSampler(range(50), seed=3), 1) == second
    assert drawn(EpochSampler(range(50), seed=4), 1) != second


def test_skipping_continues_the_same_order_and_only_once():
    sampler = EpochSampler(range(50), seed=3)
    whole = drawn(sampler, 2)
    assert drawn(sampler, 2, skipped=20) == whole[20:]
    sampler.set_epoch(2, skipped=20)
    sampler.set_epoch(2)  # as Lightning does once more before the epoch starts
    assert list(sampler) == whole[20:]
    assert list(sampler) == whole
    assert len(sampler) == 50


def test_ranks_share_without_overlap():
    shares = [drawn(EpochSampler(range(11), seed=0, rank=r, world_size=2), 5) for r in (0, 1)]
    assert [len(share) for share in shares] == [5, 5]
    assert len({index for share in shares for _, index in share}) == 10


def test_a_share_is_whole_steps():
    sampler = EpochSampler(range(11), seed=0, world_size=2, share=2)
    assert len(sampler) == len(drawn(sampler, 5)) == 4
    assert drawn(sampler, 5) == drawn(EpochSampler(range(11), seed=0, world_size=2), 5)[:4]


def test_seed_rngs_seeds_all_three_and_separates_keys():
    def draw(*key: int) -> tuple[float, float, float]:
        seed_rngs(*key)
        return random.random(), np.random.rand(), torch.rand(()).item()

    assert draw(1, 2, 3) == draw(1, 2, 3)
    for a, b in zip(draw(1, 2, 3), draw(1, 3, 2), strict=True):
        assert a != b


class Noise:
    def __getitem__(self, index: int) -> tuple[int, float, float, float]:
        return index, random.random(), np.random.rand(), torch.rand(()).item()


@pytest.mark.parametrize("workers", [0, 2])
def test_samples_do_not_depend_on_what_was_drawn_before(workers: int):
    data = SeededDataset(Noise(), seed=7)
    keys = [(0, 1), (0, 2), (1, 1)]
    alone = [data[key] for key in keys]
    loader = torch.utils.data.DataLoader(
        data, sampler=[*keys[::-1]], batch_size=None, num_workers=workers
    )
    assert [tuple(sample) for sample in loader][::-1] == alone
    assert len(set(alone)) == 3
