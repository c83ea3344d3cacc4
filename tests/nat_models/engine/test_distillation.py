import pytest
import torch
from torch.nn import functional as F

from nat_models.engine.distillation import Distiller
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
    mean, std = 0.5, 0.5
    theirs = teacher.pretrained_cfg
    pixels = IMAGES * std + mean
    seen = (pixels - torch.tensor(theirs["mean"]).view(3, 1, 1)) / torch.tensor(theirs["std"]).view(
        3, 1, 1
    )
    p, q = ((x / 2.0).softmax(-1) for x in (teacher(seen), logits))
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
        ({"teacher": {**TEACHER, "in_chans": 1}}, r"teacher\.name=test_vit: has in_chans 1"),
    ],
)
def test_bad_input_is_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        distiller(**arguments)
