import json

import torch

from nat_models.benchmark import report


def test_the_file_holds_what_the_numbers_belong_to(tmp_path):
    path = tmp_path / "new" / "bench.json"
    report.write(path, report.describe(torch.device("cpu")), [{"model": "nat_tiny"}])
    written = json.loads(path.read_text())
    assert written["versions"]["torch"] == torch.__version__
    assert written["results"] == [{"model": "nat_tiny"}]
    assert {"device", "threads", "commit", "date"} <= written.keys()
