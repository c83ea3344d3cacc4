from itertools import groupby

import pytest
import torch
from torch import nn

from nat_models.benchmark import measure
from nat_models.benchmark.measure import is_out_of_memory, measure_in_turns


class Probe(nn.Module):
    """Writes its name into `calls`; its tenth call raises what `failures` holds for the name."""

    num_classes = 3

    def __init__(self, name, calls, failures):
        super().__init__()
        self.name, self.calls, self.failures = name, calls, failures
        self.head = nn.Linear(3, self.num_classes)

    def forward(self, x):
        self.calls.append(self.name)
        if self.name in self.failures and self.calls.count(self.name) == 10:
            raise self.failures[self.name]
        return self.head(x.mean((2, 3)))


@pytest.fixture
def probes(monkeypatch):
    calls, failures = [], {}
    monkeypatch.setattr(
        measure, "create_model", lambda name, settings: Probe(name, calls, failures)
    )
    return calls, failures


def no_progress():
    pass


def test_models_are_measured_in_turns(probes, settings_with):
    calls, _ = probes
    ticks = []
    settings = settings_with("models=[resnet18,resnet34]", "rounds=3")
    measure_in_turns("inference", "eager", 2, settings, lambda: ticks.append(None))
    assert [name for name, _ in groupby(calls)] == ["resnet18", "resnet34"] * 4
    assert len(ticks) == 8


def test_a_model_out_of_memory_is_recorded_and_the_others_go_on(probes, settings_with):
    _, failures = probes
    failures["resnet18"] = torch.OutOfMemoryError("CUDA out of memory.")
    settings = settings_with("models=[resnet18,resnet34]")
    first, second = measure_in_turns("training", "eager", 2, settings, no_progress)
    assert first["status"] == "out of memory"
    assert "images_per_second" not in first
    assert second["status"] == "ok"
    assert len(second["round_medians_ms"]) == settings.rounds


def test_other_errors_are_not_swallowed(probes, settings_with):
    _, failures = probes
    failures["resnet18"] = RuntimeError("shapes do not match")
    with pytest.raises(RuntimeError, match="shapes do not match"):
        measure_in_turns("inference", "eager", 2, settings_with("models=resnet18"), no_progress)


def test_the_hosts_own_error_counts_as_out_of_memory():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)
    assert is_out_of_memory(caught.value)


def test_a_record_holds_the_model_and_consistent_numbers(settings_with):
    (record,) = measure_in_turns("training", "eager", 2, settings_with(), no_progress)
    assert record["model"] == "test_vit"
    assert record["input_size"] == [3, 64, 64]
    assert record["parameters"] > 0
    assert record["images_per_second"] == pytest.approx(2000 / record["latency_ms"]["p50"])
    assert record["latency_ms"]["p50"] <= record["latency_ms"]["p95"]
    assert len(record["round_medians_ms"]) == 2


def test_a_record_names_the_attention_backend_where_there_is_one(settings_with):
    settings = settings_with("models=[nat_mini,test_vit]")
    nat, vit = measure_in_turns("inference", "eager", 1, settings, no_progress)
    assert nat["attention_backend"] == "reference"
    assert "attention_backend" not in vit


@pytest.mark.gpu
def test_peak_memory_counts_the_model_and_its_activations(settings_with):
    settings = settings_with("device=cuda", "models=[resnet18,resnet18]", "input_size=224")
    first, second = measure_in_turns("training", "eager", 32, settings, no_progress)
    weights_gradients_moments = 4 * 4 * first["parameters"] / 2**20
    assert first["peak_memory_mib"] > weights_gradients_moments
    assert second["peak_memory_mib"] == pytest.approx(first["peak_memory_mib"], rel=0.05)


@pytest.mark.gpu
def test_a_gpu_out_of_memory_is_recorded(settings_with):
    settings = settings_with("device=cuda", "input_size=2048")
    (record,) = measure_in_turns("inference", "eager", 2**17, settings, no_progress)
    assert record["status"] == "out of memory"
