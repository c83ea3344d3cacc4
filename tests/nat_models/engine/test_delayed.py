import pytest
import torch

from nat_models.engine.delayed import Delayed


def test_the_cpu_has_no_delay():
    delayed = Delayed()
    assert delayed.exchange(torch.tensor(1), "a") == (torch.tensor(1), "a")
    assert delayed.drain() is None


@pytest.mark.gpu
def test_a_gpus_values_come_one_call_late():
    delayed = Delayed()
    assert delayed.exchange(torch.tensor(1, device="cuda"), "a") is None
    value, about = delayed.exchange(torch.tensor(2, device="cuda"), "b")
    assert (value.item(), value.device.type, about) == (1, "cpu", "a")
    value, about = delayed.drain()
    assert (value.item(), about) == (2, "b")
    assert delayed.drain() is None
