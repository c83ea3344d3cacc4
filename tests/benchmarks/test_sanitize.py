import pytest
import sanitize
import torch


@pytest.mark.parametrize("problem", sanitize.PROBLEMS, ids=str)
def test_its_problems_are_calls_that_work(problem):
    sanitize.run_problem(problem, torch.float32, "cpu", "reference")
