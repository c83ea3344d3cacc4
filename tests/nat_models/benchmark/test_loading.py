import json
from pathlib import Path

import pytest

from nat_models.benchmark.run import run

FAKE = ["data=fake", "data.options={size:64,image_size:[3,40,40],num_classes:5}"]


def test_the_loader_alone_is_measured(compose_bench):
    cfg = compose_bench(*FAKE, "data.batch_size=4", "model.name=nat_mini", "round_seconds=0.2")
    run(cfg)
    [result] = json.loads(Path(cfg.output).read_text())["results"]
    assert result["input_size"] == [3, 224, 224]
    assert 0 < result["images"] <= 60  # all but the four to warm up
    assert result["images"] % 4 == 0
    assert result["images_per_second"] == pytest.approx(result["images"] / result["seconds"])


def test_data_that_is_not_there_is_named(compose_bench):
    with pytest.raises(ValueError, match=r"data\.root=no/where: expected a folder"):
        run(compose_bench("data=imagefolder", "data.root=no/where"))
