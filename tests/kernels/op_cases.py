"""The sizes of `data/op_cases.json` as cases: each with no, all and one mixed causal mask."""

import json
from math import prod
from pathlib import Path

from oracle import Case

FILE = Path(__file__).parent / "data" / "op_cases.json"


def op_cases():
    """All cases, half of them with a bias; the same size comes with and without."""
    found = []
    for number, size in enumerate(json.loads(FILE.read_text())["cases"]):
        for mask, is_causal in enumerate(causal_masks(size["dims"], number)):
            found.append(
                Case(
                    *(tuple(size[n]) for n in ("input", "kernel_size", "stride", "dilation")),
                    is_causal,
                    batch=size["batch"],
                    heads=size["heads"],
                    head_dim=size["head_dim"],
                    rpb=(number + mask) % 2 == 0,
                    key_heads=size["heads_kv"],
                    value_dim=size["value_dim"],
                )
            )
    return found


def causal_masks(dims, number):
    """None, all, and one mixed mask where there are several axes; which one goes round."""
    mixed = [
        tuple(bool(bits >> axis & 1) for axis in range(dims)) for bits in range(1, 2**dims - 1)
    ]
    return [(False,) * dims, (True,) * dims, *mixed[number % len(mixed) :][:1]] if mixed else [
        (False,) * dims, (True,) * dims
    ]  # fmt: skip


def pairs_of_tokens(case):
    """Elements of the matrix of scores that the oracle holds."""
    return prod(case.spatial) ** 2 * case.batch * case.heads
