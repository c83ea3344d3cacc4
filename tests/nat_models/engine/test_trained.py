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
