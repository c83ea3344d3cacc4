import pytest
import torch


def test_auto_on_the_cpu_means_eager_float32(settings_with):
    settings = settings_with("device=cpu")
    assert settings.execution == ["eager"]
    assert settings.precision == "float32"


def test_auto_on_a_gpu_means_all_but_captured_in_bfloat16(settings_with, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    settings = settings_with("device=auto")
    assert settings.device == "cuda"
    assert settings.execution == ["eager", "compiled", "cuda_graphs"]
    assert settings.precision == "bfloat16"


def test_auto_device_follows_the_machine(settings_with):
    assert settings_with("device=auto").device == ("cuda" if torch.cuda.is_available() else "cpu")


def test_single_values_become_lists(settings_with):
    settings = settings_with("models=resnet18", "passes=training", "batch_size=3")
    assert settings.models == ["resnet18"]
    assert settings.passes == ["training"]
    assert settings.batch_size == [3]


def test_a_group_is_all_models_under_one_condition(settings_with):
    settings = settings_with("models=[nat_mini,test_vit]", "batch_size=[1,2]")
    conditions = [{(c.kind, c.execution, c.batch_size) for c in group} for group in settings.groups]
    assert [len(condition) for condition in conditions] == [1] * 4
    assert len(set.union(*conditions)) == 4
    for group in settings.groups:
        assert [case.model for case in group] == ["nat_mini", "test_vit"]


def test_a_case_names_the_attention_backend_where_there_is_one(settings_with):
    [[nat, vit], *_] = settings_with("models=[nat_mini,test_vit]").groups
    assert nat.attention_backend == "reference"
    assert vit.attention_backend is None


def test_model_name_is_the_default_of_models(settings_with):
    assert settings_with("model.name=resnet18", "models=[${model.name}]").models == ["resnet18"]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("models=[resnet18,nat_minni]", "models=nat_minni: .*did you mean nat_mini or"),
        ("models=[]", r"models=\[\]"),
        ("passes=[train]", "passes=train: .*'training'"),
        ("execution=fast", "execution=fast: .*'compiled'"),
        ("execution=cuda_graphs", "execution=cuda_graphs: device=cpu"),
        ("execution=captured", "execution=captured: device=cpu"),
        ("execution=captured_compiled", "execution=captured_compiled: device=cpu"),
        ("precision=int8", "precision=int8: .*'bfloat16'"),
        ("attention_backend=flash", "attention_backend=flash: .*'reference'"),
        ("batch_size=[1,0]", "batch_size=0: expected at least 1"),
        ("batch_size=many", "(?s)many.*batch_size"),
        ("input_size=0", "input_size=0"),
        ("device=tpu", "device=tpu"),
        ("warmup=0", "warmup=0"),
        ("rounds=2.5", "(?s)2.5.*rounds"),
        ("round_seconds=0", "round_seconds=0"),
        ("round_seconds=nan", "round_seconds=nan"),
        ("channels_last=maybe", "(?s)maybe.*channels_last"),
        ("seed=-1", "seed=-1"),
        ("output=/", "output=/: expected a file"),
    ],
)
def test_a_bad_value_is_named_with_its_key(settings_with, override, message):
    with pytest.raises(ValueError, match=message):
        settings_with(override)
