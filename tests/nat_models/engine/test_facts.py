import json
from types import SimpleNamespace

import torch
from lightning import Trainer

from nat_models.data import ImageDataModule
from nat_models.engine import facts
from nat_models.engine.module import Classifier


def start(**model):
    module = Classifier(model={"name": "nat_demo", **model})
    data = ImageDataModule("digits")
    data.open(training=True)
    data.follow(module.model)
    return Trainer(accelerator="cpu", logger=False, enable_checkpointing=False), module, data


def test_lines_say_what_runs_where_and_why():
    lines = facts.describe(*start())
    threads = torch.get_num_threads()
    assert lines["device"].startswith(f"cpu, {threads} thread")
    assert lines["precision"] == "32-true"
    assert lines["attention"] == "backend reference (automatic on cpu)"
    assert lines["data"] == "digits: 1,438 training and 359 held-out images of 1x28x28, 10 classes"
    assert lines["model"].startswith("nat_demo: 0.")


def test_attention_line_knows_a_choice_and_its_absence():
    assert (
        "reference (model.attention_backend)"
        in facts.describe(*start(attention_backend="reference"))["attention"]
    )
    trainer, _, data = start()
    plain = Classifier(model={"name": "test_vit"})
    assert (
        facts.describe(trainer, plain, data)["attention"]
        == "the model has no neighborhood attention"
    )


def test_attention_line_on_a_cuda_device():
    trainer = SimpleNamespace(strategy=SimpleNamespace(root_device=torch.device("cuda", 0)))
    assert (
        facts._attention(trainer, Classifier(model={"name": "nat_demo"}))
        == "backend fused (automatic on cuda)"
    )


def test_environment_is_json_with_versions():
    record = json.loads(json.dumps(facts.environment(start()[0])))
    assert record["torch"] == torch.__version__.partition("+")[0]
    assert {"date", "command", "commit", "python", "timm", "lightning", "device"} <= set(record)
