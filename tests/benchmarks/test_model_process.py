import pytest
from adapters import create_model
from model_process import Worker, Workers

from nat_models.benchmark.case import Case
from nat_models.benchmark.measure import Sampling
from neighborhood_attention.tune.records import Deadline

SHORT = Sampling(warmup=1, rounds=2, round_seconds=0.01)


def case(batch_size, model="test_vit", **settings):
    return Case(model, "inference", "eager", batch_size, "float32", **settings)


def measure(cases, **options):
    with Workers("cpu", SHORT, **options) as workers:
        found = dict(workers.measure(cases, Deadline(100)))
    return [found[case] for case in cases]


def test_one_that_fails_does_not_touch_the_others():
    cases = [case(10**9), case(2), case(1, "nat_mini", attention_backend="fused")]
    huge, fine, misplaced = measure(cases)
    assert huge["status"] == "out of memory"
    assert fine["status"] == "ok"
    assert len(fine["round_medians_ms"]) == 2
    assert fine["latency_ms"]["p95"] > 0
    assert misplaced["status"].startswith("failed: NotImplementedError: backend='fused'")


def create_hungry(case, device):
    """Its first calls find too little memory: one with a batch of 3, three with one of 5."""
    model = create_model(case, device)
    forward, failures = model.forward, [0] * {3: 1, 5: 3}.get(case.batch_size, 0)

    def forward_with_memory(images):
        if failures:
            failures.pop()
            raise RuntimeError("out of memory")
        return forward(images)

    model.forward = forward_with_memory
    return model


def test_too_little_memory_beside_others_is_waited_for_once():
    with Workers("cpu", SHORT, create_hungry) as workers:
        found = [*workers.measure([case(3), case(5), case(2)], Deadline(100))]
    statuses = [(case.batch_size, record["status"]) for case, record in found]
    assert statuses == [(3, "ok"), (2, "ok"), (5, "out of memory")]  # the last one alone


def test_a_process_is_used_again_if_it_neither_compiled_nor_profiled():
    with Workers("cpu", SHORT) as workers:
        [first] = workers.measure([case(1)], Deadline(100), profile=False)
        [kept] = workers._idle
        [second] = workers.measure([case(2)], Deadline(100), profile=False)
        assert workers._idle == [kept]
        [_] = workers.measure([case(2)], Deadline(100), profile=True)
        assert workers._idle == []
    assert [first[1]["status"], second[1]["status"]] == ["ok", "ok"]
    assert first[1]["batch_size"] == 1 != second[1]["batch_size"]


def test_a_process_that_dies_is_a_failure():
    worker = Worker("cpu", SHORT)
    worker.start("prepare", case(1))
    worker.finish(Deadline(100))
    assert not worker.failed
    worker._process.kill()
    worker.run("time_round", Deadline(100))
    assert worker.record["status"] == "failed: process ended with -9"
    worker.end()


def test_the_deadline_ends_the_processes():
    with Workers("cpu", SHORT) as workers, pytest.raises(TimeoutError):
        next(workers.measure([case(1)], Deadline(0)))
    assert workers._idle == []
