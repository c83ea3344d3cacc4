from rich.console import Console

from nat_models.benchmark.table import table

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
DESCRIPTION = {
    "device": "a processor",
    "versions": {"torch": "2.11"},
    "settings": {"precision": "float32"},
}
FAILED = OK | {"model": "nat_base", "status": "out of memory"}


def test_the_table_shows_every_result():
    console = Console(width=120)
    with console.capture() as capture:
        console.print(table(DESCRIPTION, [OK, FAILED]))
    rows = {line.split()[1]: line for line in capture.get().splitlines() if "nat_" in line}
    assert "123.4" in rows["nat_tiny"]
    assert "8x3x224x224" in rows["nat_tiny"]
    assert "out of memory" in rows["nat_base"]
    assert "123.4" not in rows["nat_base"]
