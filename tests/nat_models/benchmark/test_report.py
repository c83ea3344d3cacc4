import json

import torch
from rich.console import Console

from nat_models.benchmark import report

OK = {
    "model": "nat_tiny",
    "pass": "inference",
    "execution": "eager",
    "batch_size": 8,
    "status": "ok",
    "input_size": [3, 224, 224],
    "images_per_second": 123.4,
    "spread": 0.02,
    "latency_ms": {"p50": 64.8, "p95": 70.1},
}
FAILED = OK | {"model": "nat_base", "status": "out of memory"}


def test_the_file_holds_what_the_numbers_belong_to(tmp_path, settings_with):
    path = tmp_path / "new" / "bench.json"
    report.write(path, report.describe(settings_with("batch_size=[2,4]")), [OK])
    written = json.loads(path.read_text())
    assert written["versions"]["torch"] == torch.__version__
    assert written["settings"]["batch_size"] == [2, 4]
    assert written["results"] == [OK]
    assert {"device", "threads", "commit", "date"} <= written.keys()


def test_the_table_shows_every_result(settings_with):
    console = Console(width=120)
    with console.capture() as capture:
        console.print(report.table(report.describe(settings_with()), [OK, FAILED]))
    rows = {line.split()[1]: line for line in capture.get().splitlines() if "nat_" in line}
    assert "123.4" in rows["nat_tiny"]
    assert "8x3x224x224" in rows["nat_tiny"]
    assert "out of memory" in rows["nat_base"]
    assert "123.4" not in rows["nat_base"]
