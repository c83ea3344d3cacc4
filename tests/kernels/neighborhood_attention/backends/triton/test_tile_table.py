import json

import pytest
import torch

pytest.importorskip("triton")

from neighborhood_attention.backends import Inputs
from neighborhood_attention.backends.triton import tile_table
from neighborhood_attention.backends.triton.launch import Problem, describe
from neighborhood_attention.backends.triton.tile import Tile
from neighborhood_attention.backends.triton.tile_table import Key, capability, load, save, table
from neighborhood_attention.geometry import Neighborhood


def key(spatial, *, head_dim=32, value_dim=None, dtype=torch.bfloat16, kernel_size=7, dilation=1):
    query, value = (
        torch.empty(1, *spatial, 2, d, dtype=dtype, device="meta")
        for d in (head_dim, value_dim or head_dim)
    )
    dims = len(spatial)
    window = Neighborhood(*[(n,) * dims for n in (kernel_size, 1, dilation)], (False,) * dims)
    return Key.of(Problem.of(describe(Inputs(query, query, value))), window)


def test_a_key_holds_what_decides():
    assert key((56, 28)) == Key(None, "half", 32, (7, 7), (56, 28), False)
    assert key((57, 56), dilation=8, kernel_size=3) == Key(None, "half", 32, (3, 3), (8, 7), True)


def test_both_16_bit_types_share_a_key():
    assert key((9,), dtype=torch.float16) == key((9,), dtype=torch.bfloat16)


def test_fp32_has_a_key_of_its_own_for_each_precision(tf32):
    assert key((9,), dtype=torch.float32).precision == "tf32"
    torch.backends.cuda.matmul.allow_tf32 = False
    assert key((9,), dtype=torch.float32).precision == "ieee"


@pytest.mark.parametrize(
    ("head_dims", "expected"),
    [((17, 20), 32), ((8, 8), 16), ((33, 16), 64), ((16, 33), 64)],
    ids=str,
)
def test_head_dimensions_count_as_they_are_padded(head_dims, expected):
    assert key((9,), head_dim=head_dims[0], value_dim=head_dims[1]).head_dim == expected


def test_maps_with_equal_dilation_groups_share_a_key():
    assert key((56, 56), dilation=8) == key((28, 28), dilation=4)
    assert key((56, 56), dilation=8) != key((7, 7))


def test_the_interpreter_has_no_capability():
    assert capability(torch.device("cpu")) is None


KEY = Key("9.0", "half", 32, (7, 7), (56, 56), False)
ENTRIES = {
    KEY: {
        "forward": Tile((1, 4, 8), (1, 2, 16), 1, max_registers=128),
        "whole_group": None,
        "key_gradient": Tile((1, 2, 8), (1, 1, 16), 2, 3, programs=9),
        "ring_forward": Tile((1, 2, 8), (1, 2, 16), 1, 1, walk=7),
    },
    KEY._replace(capability="8.0", kernel_size=(3,), group=(5,)): {},
}


def test_a_table_reads_as_it_was_written(tmp_path):
    path = tmp_path / "table.json"
    save(ENTRIES, path)
    assert load(path) == ENTRIES
    before = path.read_text()
    save(dict(reversed(load(path).items())), path)
    assert path.read_text() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["table.json"]


def test_defaults_are_not_written(tmp_path):
    save({KEY: {"forward": Tile((1, 4, 8), (1, 2, 16), 1)}}, tmp_path / "table.json")
    (record,) = json.loads((tmp_path / "table.json").read_text())
    written = {"tile": [1, 4, 8], "strip": [1, 2, 16], "num_warps": 1}
    assert record["tiles"] == {"forward": written}


RING = {"tile": [1, 2, 8], "strip": [1, 2, 16], "num_warps": 1, "walk": 7}


def broken(**changes):
    tile = {"tile": [1, 4, 8], "strip": [1, 2, 16], "num_warps": 1}
    settings = KEY._asdict() | {"tiles": {"forward": tile | changes.pop("forward", {})}}
    settings["tiles"] |= changes.pop("tiles", {})
    return settings | changes


@pytest.mark.parametrize(
    ("records", "message"),
    [
        pytest.param([broken(precision="bf16")], "entry 0: precision 'bf16'", id="precision"),
        pytest.param([broken(), broken()], "entry 1: a second one for", id="twice"),
        pytest.param([broken(tiles={"backward": None})], "kernel 'backward'", id="kernel"),
        pytest.param([broken(tiles={"forward": None})], "cannot be null", id="null"),
        pytest.param([broken(forward={"warps": 2})], "entry 0: .*warps", id="setting"),
        pytest.param([broken(forward={"tile": [1, 4, 7]})], "powers of 2", id="size"),
        pytest.param([broken(forward={"strip": [4, 8]})], "powers of 2", id="axes"),
        pytest.param(
            [
                broken(
                    tiles={"whole_group": {"tile": [1, 8, 8], "strip": [1, 8, 4], "num_warps": 1}}
                )
            ],
            "its tile is its strip",
            id="whole group",
        ),
        *(
            pytest.param(
                [broken(tiles={"ring_forward": {**RING, **change}})], "expected a walk", id=name
            )
            for name, change in {
                "no walk": {"walk": None},
                "warps without queries": {"num_warps": 2},
                "half a strip": {"strip": [1, 4, 8]},
                "few keys": {"strip": [1, 1, 8]},
                "deep": {"tile": [2, 1, 8]},
                "nothing to walk": {"walk": 0},
                "no programs": {"programs": 0},
            }.items()
        ),
        pytest.param([broken(forward={"walk": 7})], "forward .* expected a walk", id="walk"),
        pytest.param([broken(batch=3)], "entry 0: .*batch", id="field"),
        pytest.param(["forward"], "entry 0", id="no object"),
    ],
)
def test_a_broken_table_names_the_entry(records, message, tmp_path):
    path = tmp_path / "table.json"
    path.write_text(json.dumps(records))
    with pytest.raises(ValueError, match=f"table.json: .*{message}"):
        load(path)


def test_what_is_not_json_is_no_table(tmp_path):
    path = tmp_path / "table.json"
    path.write_text("[{")
    with pytest.raises(ValueError, match=r"table\.json: no JSON"):
        load(path)


def test_the_packages_table_is_as_the_tuner_writes_it(tmp_path):
    save(load(tile_table.PATH), tmp_path / "table.json")
    assert (tmp_path / "table.json").read_text() == tile_table.PATH.read_text()
    assert {key.capability for key in table()} >= {"9.0"}
