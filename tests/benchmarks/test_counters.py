import json
import os
import sys
from contextlib import nullcontext
from functools import partial
from itertools import product

import counters
import ncu
import peers
import problem
import pytest
import report
import torch

from neighborhood_attention.tune.records import Deadline

SMALL = problem.Problem((6, 5), 2, 8, (3, 3), (1, 1), 2)
PASSES = [(name, g) for name in ("forward", "backward") for g in counters.GENERATIONS]


def kernel(name, us, **numbers):
    return {"name": name} | dict.fromkeys(ncu.METRICS, 0.0) | {"us": us} | numbers


def test_problems_are_two_layers_and_full_ones_of_the_paper():
    first, dilated, *others = counters.problems()
    assert str(first) == "56x56-k7x7-d1x1-h2-D32-B128"
    assert str(dilated) == "28x28-k7x7-d4x4-h4-D32-B128"
    assert [p.dims for p in others] == [1, 3]
    paper = [problem.Problem.of(entry) for entry in problem.load_problems("paper")]
    assert all(p in paper and p.elements >= 2**24 for p in others)


def test_work_is_the_median(monkeypatch):
    def entry(length, window, dilation=1, head_dim=32):
        return problem.Problem((length,), 1, head_dim, (window,), (dilation,), 1).record

    entries = [
        entry(2**20, 7), entry(2**20, 3), entry(2**20, 5), entry(2**18, 3), entry(2**18, 3),
        *[entry(2**20, 3, dilation=2)] * 2, *[entry(2**20, 7, head_dim=64)] * 2,
    ]  # fmt: skip
    monkeypatch.setattr(counters, "load_problems", lambda name: entries)
    assert counters.median_work(1).kernel_size == (5,)


@pytest.fixture
def on_small(monkeypatch):
    monkeypatch.setattr(counters, "problems", lambda: [SMALL])


def test_passes_of_generations_stand_together(on_small):
    found = counters.cases()
    assert [(c.name, c.generation) for c in found[:6]] == PASSES
    assert {c.precision for c in found[:6]} == {"float16"}
    assert len(found) == 12


@pytest.fixture
def events(monkeypatch, on_small, generations_on_cpu):
    """What the calls did, in order; they run the reference backend on the CPU."""
    found = []

    def note(owner, name, function=lambda *_: None):
        def noting(*arguments):
            found.append(name)
            return function(*arguments)

        monkeypatch.setattr(owner, name, noting)

    for name in ("synchronize", "_sleep"):
        note(torch.cuda, name)
    for name in ("start", "stop"):
        note(torch.cuda.profiler, name)
    for name in ("forward", "backward"):
        note(peers._OperatorCall, name, getattr(peers._OperatorCall, name))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    on_cpu = partial(problem.random_tensors, device="cpu")
    monkeypatch.setattr(counters, "random_tensors", on_cpu)
    return found


def test_a_warm_call_is_marked_between_start_and_stop(events):
    counters.make_calls(Deadline(1000))
    each = [
        [case.name, "synchronize", "start", "_sleep", case.name, "synchronize", "stop"]
        for case in counters.cases()
    ]
    assert events == [event for some in each for event in some]


def test_no_call_begins_when_the_time_is_over(events):
    counters.make_calls(Deadline(counters.MARGIN - 1))
    assert events == []


def test_marks_tell_the_calls_apart():
    names = ["spin_kernel", "_a", "_b", "spin_kernel", "spin_kernel", "_a"]
    found = counters.calls([kernel(name, 1) for name in names])
    assert [[k["name"] for k in call] for call in found] == [["_a", "_b"], [], ["_a"]]
    assert counters.calls([]) == []
    with pytest.raises(ValueError, match="the first kernel is _a"):
        counters.calls([kernel("_a", 1)])


RESULT = {
    "device": "GPU", "date": "2026-12-01", "bandwidth": 2e12,
    "results": [
        counters.Case(SMALL, "float32", "backward", "naive").record | {
            "kernels": [
                kernel("_products_kernel", 30.0, read_bytes=9e7, written_bytes=1e7),
                kernel("_sums_kernel", 70.0, read_bytes=3e7, written_bytes=2e7, occupancy=0.5,
                       issue=0.61, tensor_pipe=0.07, fma_pipe=0.33),
            ],
        },
    ],
}  # fmt: skip


def test_the_table_has_sums_and_what_the_longest_kernel_is_bound_by():
    # Elements: 10 tensors of 2 * 30 * 2 * 8 and 8 of 2 * 30 * 2 * 9 weights, 4 bytes each.
    large = RESULT["results"][0] | {"batch": 50_000}
    text = counters.tables(RESULT | {"results": [large]})
    least = (10 * 8 + 8 * 9) * 50_000 * 30 * 2 * 4 / 1e9
    assert text.splitlines()[-1] == (
        "| 6x5-k3x3-d1x1-h2-D8-B50000 | float32 | backward | naive | 100 | 0.15 | "
        f"{least:.2f} | 1500 | 75% | _sums_kernel | 70% | 50% | 61% | 7% | 33% |"
    )
    head, line, row = (line.count("|") for line in text.splitlines()[-3:])
    assert head == line == row


def test_the_report_shows_it(tmp_path):
    (tmp_path / "counters-gpu.json").write_text(json.dumps(RESULT))
    (section,) = report.sections(tmp_path, tmp_path)
    assert section.title == "Hardware counters: counters-gpu"


def run(monkeypatch, tmp_path, printed):
    """The command, on a machine whose ncu prints this; its results."""
    (tmp_path / "printed").write_text(printed)
    script = tmp_path / "ncu"
    script.write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/said\ncp {tmp_path}/printed "$5"\n')
    script.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(counters, "prepare", lambda deadline: 2e12)
    device = {"device": "GPU", "versions": {"torch": "2", "triton": "3"}}
    monkeypatch.setattr(counters, "describe_device", lambda: device)
    output = tmp_path / "r.json"
    words = ["counters.py", str(output), "--commit", "abc", "--limit-seconds", "100"]
    monkeypatch.setattr(sys, "argv", words)
    counters.main()
    return json.loads(output.read_text())


def printed(calls):
    """ncu's table of so many calls of one kernel that takes 2, 3, ... microseconds."""
    head = ["ID", "Kernel Name", *ncu.METRICS.values()]
    units = ["", "", "us", "byte", "byte", "byte", "inst", "%", "%", "%", "%"]
    rows = [head, units]
    for number in range(calls):
        rows += [[0, "spin_kernel", *[1] * 9], [0, "_kernel", number + 2, *[10] * 8]]
    return "\n".join(",".join(f'"{cell}"' for cell in row) for row in rows)


def test_results_name_each_call_and_its_kernels(monkeypatch, tmp_path, on_small, capsys):
    result = run(monkeypatch, tmp_path, printed(12))
    assert [r["kernels"][0]["us"] for r in result["results"]] == list(range(2, 14))
    first, last = result["results"][0], result["results"][-1]
    assert (first["precision"], first["pass"], first["generation"]) == (
        "float16", "forward", "naive",
    )  # fmt: skip
    assert (last["precision"], last["pass"], last["generation"]) == (
        "float32", "backward", "fused",
    )  # fmt: skip
    assert (first["commit"], result["bandwidth"]) == ("abc", 2e12)
    assert result["metrics"]["us"] == "gpu__time_duration.sum"
    assert result["method"].startswith("Two layers")
    command = (tmp_path / "said").read_text().split()
    words = command[command.index(counters.__file__) :]
    assert words[:4] == [counters.__file__, str(tmp_path / "r.json"), "--commit", "abc"]
    assert "--child" in words
    assert 0 < float(words[-1]) < 100
    assert "12 of 12 calls" in capsys.readouterr().out


def test_what_came_before_the_end_of_the_time_is_kept(monkeypatch, tmp_path, on_small, capsys):
    result = run(monkeypatch, tmp_path, printed(5))
    assert len(result["results"]) == 5
    assert "5 of 12 calls" in capsys.readouterr().out


def test_the_same_command_under_ncu_makes_the_calls(monkeypatch, events, tmp_path):
    words = ["counters.py", str(tmp_path / "r.json"), "--commit", "abc", "--child"]
    monkeypatch.setattr(sys, "argv", words)
    counters.main()
    assert events.count("start") == len(counters.cases())


def test_every_kernel_is_compiled_before(monkeypatch, on_small):
    waited = []
    monkeypatch.setattr(counters, "Ahead", lambda parts: nullcontext(parts))
    monkeypatch.setattr(counters, "wait", lambda ahead, part, _: waited.append(part))
    monkeypatch.setattr(counters, "copy_bandwidth", lambda: 3e12)
    for name, value in {"Stream": lambda: None, "stream": nullcontext}.items():
        monkeypatch.setattr(torch.cuda, name, value)
    assert counters.prepare(Deadline(10)) == 3e12
    found = {(p.backend, p.precision, p.backward) for p in waited}
    assert found == set(product(counters.GENERATIONS, ("float16", "float32"), (False, True)))
