from time import sleep

import pytest
import torch

from nat_models.benchmark.timing import Timing, time_calls

CPU = torch.device("cpu")


def test_each_call_is_timed_but_the_first():
    calls = []
    seconds = time_calls(lambda: calls.append(None), CPU, calls=4)
    assert len(calls) == 5
    assert len(seconds) == 4


def test_a_call_lasts_at_least_as_long_as_its_work():
    assert min(time_calls(lambda: sleep(0.01), CPU, calls=2)) >= 0.01


@pytest.mark.gpu
def test_events_see_the_work_that_the_host_does_not_wait_for():
    device = torch.device("cuda")
    matrix = torch.randn(4096, 4096, device=device)
    short = time_calls(lambda: matrix @ matrix, device, calls=5)
    long = time_calls(lambda: [matrix @ matrix for _ in range(20)], device, calls=5)
    assert min(long) > 5 * min(short)


def test_quantiles_are_over_all_calls_and_spread_is_between_rounds():
    timing = Timing([[1.0, 2.0, 3.0], [3.0, 4.0, 5.0]])
    assert timing.quantile(0.5) == 3.0
    assert timing.quantile(1.0) == 5.0
    assert timing.medians == [2.0, 4.0]
    assert timing.spread == pytest.approx(2 / 3)
