import pytest

from neighborhood_attention.backends.triton.tile import Tile


@pytest.mark.parametrize(
    ("tile", "num_warps", "warps"),
    [
        pytest.param((1, 4, 8), 1, (1, 1), id="one"),
        pytest.param((1, 8, 8), 4, (4, 1), id="rows"),
        pytest.param((1, 2, 8), 2, (1, 2), id="columns"),
        pytest.param((2, 4, 4), 4, (2, 2), id="both"),
        pytest.param((1, 1, 8), 2, (1, 2), id="few tokens"),
    ],
)
def test_warps_take_16_rows_first_and_then_columns(tile, num_warps, warps):
    assert Tile(tile, (1, 2, 16), num_warps).warps == warps


def test_a_tile_gives_tritons_options():
    tile = Tile((1, 4, 8), (1, 1, 16), 2, num_stages=3, max_registers=96)
    assert tile.options == {"num_warps": 2, "num_stages": 3, "maxnreg": 96}


def test_a_tile_reads_shortly():
    tile = Tile((1, 4, 8), (1, 2, 16), 1, max_registers=128, programs=792)
    assert str(tile) == "1x4x8/1x2x16 w1 s2 r128 n792"
    assert str(Tile((1, 4, 8), (1, 1, 16), 4, 3)) == "1x4x8/1x1x16 w4 s3"
    assert str(Tile((1, 2, 8), (1, 2, 16), 1, 1, walk=7)) == "1x2x8/1x2x16 w1 s1 walk7"
