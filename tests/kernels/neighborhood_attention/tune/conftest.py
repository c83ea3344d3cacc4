from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def _own_tiles() -> Iterator[None]:
    """Tiles that a test sets are gone after it."""
    pytest.importorskip("triton")
    from neighborhood_attention.backends.triton import fused_backward, fused_forward, tile_table

    table = tile_table.table()
    before = dict(table)
    yield
    table.clear()
    table.update(before)
    for module in (fused_forward, fused_backward):
        module._prepare.cache_clear()
