import pytest
import torch
from lightning import Trainer
from torch.nn import functional as F

from nat_models.data import ImageDataModule
from nat_models.engine.distillation import Distiller, renormalisation
from nat_models.engine.module import Classifier

STUDENT = {"name": "nat_demo", "num_classes": 4, "in_chans": 3}
TEACHER = {"name": "test_vit", "img_size": 32}
IMAGES, TARGETS = torch.linspace(-1, 1, 2 * 3 * 32 * 32).view(2, 3, 32, 32), torch.tensor([1, 3])


def distiller(**arguments) -> Distiller:
    return Distiller(
        **{"teacher": TEACHER, "distillation_weight": 0.5, "temperature": 2.0, **arguments},
        model=STUDENT,
    ).eval()


def test_the_loss_is_the_weighted_sum_of_its_parts():
    module = distiller(distillation_weight=0.3)
    [teacher] = module._teacher
    logits = module(IMAGES)
    p, q = ((x / 2.0).softmax(-1) for x in (teacher(IMAGES), logits))
    imitation = 4.0 * (p * (p / q).log()).sum(-1).mean()
    expected = 0.7 * F.cross_entropy(logits, TARGETS) + 0.3 * imitation
    torch.testing.assert_close(module.loss(IMAGES, logits, TARGETS), expected)


def test_the_teacher_is_neither_saved_nor_trained():
    module = distiller()
    module.loss(IMAGES, module(IMAGES), TARGETS).backward()
    [teacher] = module._teacher
    assert all(p.grad is None for p in teacher.parameters())
    assert module.state_dict().keys() == Classifier(model=STUDENT).state_dict().keys()
    assert {"model", "teacher", "label_smoothing"} <= set(module.hparams)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"distillation_weight": 2}, r"task\.distillation_weight=2: expected a number from 0 to 1"),
        ({"temperature": 0}, r"task\.temperature=0: expected more than 0"),
        ({"teacher": {**TEACHER, "num_classes": 9}}, r"teacher\.name=test_vit: has num_classes 9"),
        ({"teacher": {"name": "nat_x"}}, r"task\.teacher\.name=nat_x: timm has no such model"),
        (
            {"teacher": {"name": "nat_demo", "pretrained": True}},
            r"^task\.teacher\.pretrained=true: no weights for nat_demo",
        ),
        ({"teacher": {**TEACHER, "in_chans": 1}}, r"teacher\.name=test_vit: has in_chans 1"),
    ],
)
def test_bad_input_is_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        distiller(**arguments)


def test_the_teacher_sees_the_same_pixels_in_its_own_normalisation():
    options = {"size": 4, "image_size": [3, 32, 32], "num_classes": 4}
    own = {"mean": [0.1, 0.2, 0.3], "std": [0.6, 0.7, 0.8]}  # neither the student's nor its own
    data = ImageDataModule("fake", batch_size=4, options=options, input_size=[3, 32, 32], **own)
    module = distiller(optimizer={"opt": "sgd", "lr": 0.1})
    [teacher] = module._teacher
    seen = {}
    module.model.register_forward_pre_hook(lambda _, given: seen.update(student=given[0]))
    teacher.register_forward_pre_hook(lambda _, given: seen.update(teacher=given[0]))
    data.open(training=True)
    data.follow(module.model)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    Trainer(
        accelerator="cpu", max_epochs=1, limit_val_batches=0, enable_model_summary=False, **quiet
    ).fit(module, data)

    def pixels(images: torch.Tensor, mean: list[float], std: list[float]) -> torch.Tensor:
        return images * torch.tensor(std).view(3, 1, 1) + torch.tensor(mean).view(3, 1, 1)

    theirs = {name: list(teacher.pretrained_cfg[name]) for name in own}
    assert theirs != own
    torch.testing.assert_close(pixels(seen["teacher"], **theirs), pixels(seen["student"], **own))
    assert renormalisation(own, own) == []
