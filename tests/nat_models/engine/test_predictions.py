from types import SimpleNamespace

import numpy as np
import torch

from nat_models.engine.predictions import Predictions


def gathered(monkeypatch, parts: int) -> dict:
    """The table when `parts` processes evaluate ten images in turns, three at a time."""
    logits = torch.randn(10, 7)
    keeps, sent = [], []

    def all_gather_object(found, ours):
        sent.append(ours)
        found[:] = sent

    monkeypatch.setattr(torch.distributed, "all_gather_object", all_gather_object)
    for rank in range(parts):
        data = SimpleNamespace(indices=None)
        trainer = SimpleNamespace(datamodule=data, world_size=parts)
        keep = Predictions()
        keep.on_validation_epoch_start(trainer, None)
        for indices in torch.arange(rank, 10, parts).split(3):
            data.indices = indices
            keep.on_validation_batch_end(trainer, None, logits[indices], (None, indices % 7), 0)
        data.indices = none = torch.empty(0, dtype=torch.int64)
        keep.on_validation_batch_end(trainer, None, logits[none], (None, none), 0)  # a batch lost
        keep.on_validation_epoch_end(trainer, None)
        keeps.append(keep)
    table = keeps[-1].table()
    shares, classes = logits.softmax(-1).topk(5)
    assert np.array_equal(table["classes"], classes.numpy())
    np.testing.assert_allclose(table["probabilities"], shares.numpy(), rtol=1e-6)
    return table


def test_the_table_is_in_the_data_sets_order_however_many_processes(monkeypatch):
    for parts in (1, 3):
        table = gathered(monkeypatch, parts)
        assert table["index"].tolist() == list(range(10))
        assert table["label"].tolist() == [i % 7 for i in range(10)]
