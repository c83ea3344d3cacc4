import pytest
from measuring import Deadline
from model_process import CaseProcess, measure_together

from nat_models.benchmark.case import Case
from nat_models.benchmark.measure import Sampling

SHORT = Sampling(warmup=1, rounds=2, round_seconds=0.01)


def case(batch_size, model="test_vit", **settings):
    return Case(model, "inference", "eager", batch_size, "float32", **settings)


def test_one_that_fails_does_not_touch_the_others():
    cases = [case(10**9), case(2), case(1, "nat_mini", attention_backend="fused")]
    huge, fine, misplaced = measure_together(cases, "cpu", SHORT, Deadline(100))
    assert huge["status"] == "out of memory"
    assert fine["status"] == "ok"
    assert len(fine["round_medians_ms"]) == 2
    assert fine["latency_ms"]["p95"] > 0
    assert misplaced["status"].startswith("failed: NotImplementedError: backend='fused'")


def test_a_process_that_dies_is_a_failure():
    member = CaseProcess(case(1), "cpu", SHORT)
    member.run("prepare", Deadline(100))
    assert not member.failed
    member._process.kill()
    member.run("time_round", Deadline(100))
    assert member.record["status"] == "failed: process ended with -9"
    member.end()


def test_the_deadline_ends_the_processes():
    with pytest.raises(TimeoutError):
        measure_together([case(1)], "cpu", SHORT, Deadline(0))
