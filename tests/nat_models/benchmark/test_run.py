import json
from pathlib import Path

import pytest

from nat_models.benchmark.run import run


def test_every_condition_is_in_the_file(compose_bench, capsys):
    cfg = compose_bench("batch_size=[1,2]", "models=[test_vit,test_resnet]")
    run(cfg)
    results = json.loads(Path(cfg.output).read_text())["results"]
    conditions = [(r["pass"], r["batch_size"], r["model"]) for r in results]
    assert sorted(conditions) == sorted(
        (kind, batch_size, model)
        for kind in ("inference", "training")
        for batch_size in (1, 2)
        for model in ("test_vit", "test_resnet")
    )
    assert "images/s" in capsys.readouterr().out


def test_the_run_goes_on_after_out_of_memory(compose_bench):
    cfg = compose_bench("batch_size=[1000000000,2]", "passes=inference")
    run(cfg)
    statuses = [r["status"] for r in json.loads(Path(cfg.output).read_text())["results"]]
    assert statuses == ["out of memory", "ok"]


def test_a_bad_setting_leaves_no_file(compose_bench, tmp_path):
    with pytest.raises(ValueError, match="precision"):
        run(compose_bench("precision=int8"))
    assert not [*tmp_path.iterdir()]
