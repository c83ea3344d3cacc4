import pytest
import torch

from nat_models.checkpoints import CheckpointError
from nat_models.engine.module import Classifier
from nat_models.engine.trained import TrainedRun

MODEL = {"name": "nat_demo", "num_classes": 3, "in_chans": 1}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("run") / "best.ckpt"
    torch.manual_seed(0)
    module = Classifier(model=MODEL)
    content = {
        "state_dict": module.state_dict(),
        "hyper_parameters": {"model": MODEL, "label_smoothing": 0.1},
        "datamodule_hyper_parameters": {"name": "digits", "batch_size": 32, "mixup": {}, "seed": 1},
    }
    torch.save(content, path)
    return path, module


def test_the_classifier_comes_back_with_its_weights_and_settings(checkpoint):
    path, module = checkpoint
    again = TrainedRun.read(path).module({"attention_backend": "reference"})
    assert again.label_smoothing == 0.1
    assert again.state_dict().keys() == module.state_dict().keys()
    assert all(
        torch.equal(a, b) for a, b in zip(again.parameters(), module.parameters(), strict=True)
    )


def test_the_epochs_and_steps_that_are_done_are_known(checkpoint, tmp_path):
    content = torch.load(checkpoint[0], weights_only=True)
    torch.save({**content, "global_step": 7, "ImageDataModule": {"epoch": 2}}, tmp_path / "x.ckpt")
    run = TrainedRun.read(tmp_path / "x.ckpt")
    assert (run.epochs, run.steps) == (2, 7)


def test_the_data_keeps_its_arguments_but_those_given_now(checkpoint):
    settings = TrainedRun.read(checkpoint[0]).data({"batch_size": 7}).settings
    assert (settings.name, settings.batch_size, settings.mixup) == ("digits", 7, None)


def test_another_data_set_does_not_inherit_what_belongs_to_the_first(checkpoint):
    run = TrainedRun.read(checkpoint[0])
    run.data_hparams["options"] = {"size": 8}
    assert run.data({}).settings.options == {"size": 8}
    assert run.data({"name": "mnist5k"}).settings.options is None


@pytest.mark.parametrize("given", [{"name": "nat_mini"}, {"num_classes": 4}])
def test_another_model_is_refused(checkpoint, given):
    [(key, value)] = given.items()
    with pytest.raises(ValueError, match=rf"model\.{key}={value}"):
        TrainedRun.read(checkpoint[0]).module(given)


@pytest.mark.parametrize(
    ("content", "reason"),
    [(b"", "damaged"), (b"not a checkpoint", "damaged"), (None, "no such file")],
)
def test_a_file_that_is_no_checkpoint_is_named(tmp_path, content, reason):
    path = tmp_path / "last.ckpt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"last\.ckpt.*{reason}"):
        TrainedRun.read(path)


def test_a_checkpoint_of_something_else_is_refused(tmp_path):
    path = tmp_path / "weights.pt"
    torch.save({"state_dict": {}}, path)
    with pytest.raises(CheckpointError, match="not the checkpoint of a training run"):
        TrainedRun.read(path)


PACE = {"images_a_step": 256, "images_a_batch": 64}


@pytest.mark.parametrize(
    ("batches_done", "now", "message"),
    [
        (0, {**PACE, "images_a_batch": 32}, None),
        (4, PACE, None),
        (4, {**PACE, "images_a_batch": 32}, r"within an epoch, with 64 images a batch, now 32"),
        (0, {**PACE, "images_a_step": 512}, r"end of an epoch, with 256 images a step, now 512"),
        (4, {**PACE, "processes": 2}, r"within an epoch, with None processes, now 2"),
    ],
    ids=["end", "same", "batch", "step", "shards"],
)
def test_a_resume_keeps_its_steps_and_within_an_epoch_its_batches(
    checkpoint, batches_done, now, message
):
    run = TrainedRun.read(checkpoint[0])
    run.progress.update(batches_done=batches_done, pace=PACE)
    if message is None:
        return run.check_same_pace(now)
    with pytest.raises(ValueError, match=message):
        run.check_same_pace(now)
