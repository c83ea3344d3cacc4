import time
from itertools import groupby

import pytest
import torch
from torch import nn

from nat_models.benchmark.case import Case
from nat_models.benchmark.measure import Candidate, Sampling, is_out_of_memory, measure_in_turns

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
SHORT = Sampling(warmup=1, rounds=2, round_seconds=0.01)


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
def probes():
    calls, failures = [], {}
    return lambda case, device: Probe(case.model, calls, failures), calls, failures


def measure(
    *models,
    kind="inference",
    execution="eager",
    batch_size=2,
    side=64,
    device=CPU,
    advance=lambda: None,
    **options,
):
    settings = kind, execution, batch_size, "float32", side
    candidates = [Candidate(Case(model, *settings), device, SHORT, **options) for model in models]
    return measure_in_turns(candidates, SHORT.rounds, advance)


def test_cases_are_measured_in_turns(probes):
    create_model, calls, _ = probes
    ticks = []
    measure("resnet18", "resnet34", create_model=create_model, advance=lambda: ticks.append(None))
    assert [name for name, _ in groupby(calls)] == ["resnet18", "resnet34"] * 3
    assert len(ticks) == 6


def test_a_round_is_as_long_as_asked_for_though_preparing_was_slow():
    class Busy(nn.Module):
        seconds = 0.05

        def forward(self, x):
            time.sleep(self.seconds)
            return x

    model = Busy()
    case = Case("test_vit", "inference", "eager", 1, "float32", 64)
    candidate = Candidate(case, CPU, Sampling(1, 1, 0.2), lambda *_: model)
    candidate.prepare()
    model.seconds = 0.001
    candidate.time_round()
    assert sum(candidate.rounds[0]) > 0.1


def test_many_models_of_a_class_are_all_compiled():
    graphs = []

    class Scaled(nn.Module):
        def __init__(self, factor):
            super().__init__()
            self.factor = factor

        def compile(self, **_):
            super().compile(backend=lambda graph, _: graphs.append(graph) or graph)

        def forward(self, x):
            return x * self.factor

    factors = iter(range(2, 14))
    case = Case("test_vit", "inference", "compiled", 1, "float32", 64)
    candidates = [Candidate(case, CPU, SHORT, lambda *_: Scaled(next(factors))) for _ in range(12)]
    measure_in_turns(candidates, 1, lambda: None)
    assert len(graphs) == 12


def test_a_model_out_of_memory_is_recorded_and_the_others_go_on(probes):
    create_model, _, failures = probes
    failures["resnet18"] = torch.OutOfMemoryError("CUDA out of memory.")
    first, second = measure("resnet18", "resnet34", kind="training", create_model=create_model)
    assert first["status"] == "out of memory"
    assert "images_per_second" not in first
    assert second["status"] == "ok"
    assert len(second["round_medians_ms"]) == SHORT.rounds


def test_other_errors_are_not_swallowed(probes):
    create_model, _, failures = probes
    failures["resnet18"] = RuntimeError("shapes do not match")
    with pytest.raises(RuntimeError, match="shapes do not match"):
        measure("resnet18", create_model=create_model)


def test_the_hosts_own_error_counts_as_out_of_memory():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)
    assert is_out_of_memory(caught.value)


def test_a_record_holds_the_case_and_consistent_numbers():
    (record,) = measure("test_vit", kind="training")
    assert record["pass"] == "training"
    assert record["model"] == "test_vit"
    assert record["input_size"] == [3, 64, 64]
    assert record["parameters"] > 0
    assert record["flops_per_image"] > 2 * 16 * record["parameters"] / 10
    fastest, slowest = min(record["round_medians_ms"]), max(record["round_medians_ms"])
    assert 2000 / slowest <= record["images_per_second"] <= 2000 / fastest
    assert record["latency_ms"]["p50"] <= record["latency_ms"]["p95"]
    assert len(record["round_medians_ms"]) == 2


@pytest.mark.gpu
def test_peak_memory_counts_the_model_and_its_activations():
    settings = {"kind": "training", "batch_size": 32, "side": 224, "device": CUDA}
    first, second = measure("resnet18", "resnet18", **settings)
    weights_gradients_moments = 4 * 4 * first["parameters"] / 2**20
    assert first["peak_memory_mib"] > weights_gradients_moments
    assert second["peak_memory_mib"] == pytest.approx(first["peak_memory_mib"], rel=0.05)
    (captured,) = measure("resnet18", execution="captured", **settings)
    assert captured["peak_memory_mib"] > 0.9 * first["peak_memory_mib"]


@pytest.mark.gpu
def test_a_gpu_out_of_memory_is_recorded():
    (record,) = measure("test_vit", batch_size=2**17, side=2048, device=CUDA)
    assert record["status"] == "out of memory"


@pytest.mark.gpu
def test_a_profile_shares_the_time_out():
    candidate = Candidate(Case("nat_mini", "training", "eager", 8), CUDA, SHORT)
    candidate.prepare()
    candidate.time_round()
    candidate.profile()
    record = candidate.result()
    assert 0 < record["attention_share"] < 1
    assert record["component_ms"]["optimizer"] > 0
    assert sum(record["component_ms"].values()) < 1.2 * record["latency_ms"]["p50"]
