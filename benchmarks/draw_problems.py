"""Draws the problems of paper.py into problems/paper.json; the same ones each time.

    python benchmarks/draw_problems.py

Like those of "Faster Neighborhood Attention" (arXiv 2403.04690): windows, dilations, head
dimensions and batches from real models to long sequences, in 1-D, 2-D and 3-D. The 2-D ones
contain the zoo's layers. Every tenth problem is also for providers that take long to compile.
"""

import json
from collections.abc import Callable, Iterator
from math import prod
from random import Random

from problem import FOLDER, Problem, load_problems

COUNT = 240  # a number of axes
# Elements of the query; FLOP of the forward; weights of the unfused backends.
ELEMENTS = 2**20, 2**26
MAX_FLOPS = 2 * 10**11
MAX_WEIGHTS = 2**30
# FlexAttention's block mask; gathered windows.
MAX_SLOW_TOKENS = 2**13
MAX_SLOW_ELEMENTS = 2**30

LENGTHS = [196, 256, 512, 1000, 1024, 2048, 3136, 4096, 8192, 10000, 16384, 32768, 65536, 131072]
WINDOWS = [3, 7, 13, 16, 31, 63, 64, 127, 128, 255, 511, 512, 1023, 1024, 2047]
SIDES = [14, 16, 20, 24, 28, 32, 40, 48, 56, 64, 80, 96, 100, 112, 128, 160, 192, 256]
SQUARE_WINDOWS = [3, 5, 7, 8, 9, 11, 13, 15, 16, 21, 25, 31]
DEPTHS = [4, 8, 12, 16, 24, 32]
VOLUME_SIDES = [7, 8, 14, 16, 20, 24, 28, 32, 48, 56, 64]
VOLUME_WINDOWS = [2, 3, 4, 5, 7, 8, 9]


def main() -> None:
    """Write the file."""
    random = Random(0)
    zoo = [Problem.of(entry) for entry in load_problems("zoo")]
    drawn = [
        *distinct(random, sequence, []),
        *distinct(random, image, [p for p in zoo if is_measurable(p)]),
        *distinct(random, volume, []),
    ]
    slow = {
        problem
        for dims in (1, 2, 3)
        for problem in [p for p in drawn if p.dims == dims and is_slow(p)][::7][:10]
    }
    rows = ",\n".join(f"  {json.dumps(p.record | {'slow': p in slow})}" for p in drawn)
    about = " ".join(__doc__.split("\n\n")[-1].split())
    text = f'{{\n "about": {json.dumps(about)},\n "problems": [\n{rows}\n ]\n}}\n'
    (FOLDER / "paper.json").write_text(text)


def distinct(
    random: Random, draw: Callable[[Random], Problem], first: list[Problem]
) -> Iterator[Problem]:
    """`first`, and as many further ones as are missing."""
    found = dict.fromkeys(first)
    while len(found) < COUNT:
        problem = draw(random)
        if is_measurable(problem):
            found[problem] = None
    yield from found


def is_measurable(problem: Problem) -> bool:
    """By every backend, in a few tenths of a second."""
    weights = problem.elements // problem.head_dim * problem.window
    return (
        ELEMENTS[0] <= problem.elements <= ELEMENTS[1]
        and problem.flops <= MAX_FLOPS
        and weights <= MAX_WEIGHTS
        and all(
            k > 1 and k * d <= n
            for n, k, d in zip(problem.map, problem.kernel_size, problem.dilation, strict=True)
        )
    )


def is_slow(problem: Problem) -> bool:
    """Whether the providers that PyTorch compiles can run it."""
    gathered = problem.elements * problem.window
    return problem.tokens <= MAX_SLOW_TOKENS and gathered <= MAX_SLOW_ELEMENTS


def sequence(random: Random) -> Problem:
    """1-D."""
    length = random.choice(LENGTHS)
    window = random.choice([w for w in WINDOWS if w <= length])
    return complete(random, (length,), (window,))


def image(random: Random) -> Problem:
    """2-D, half of them square, most with square windows."""
    height = random.choice(SIDES)
    width = height if random.random() < 0.5 else random.choice(SIDES)
    windows = [w for w in SQUARE_WINDOWS if w <= min(height, width)]
    rows = random.choice(windows)
    columns = rows if random.random() < 0.8 else random.choice(windows)
    return complete(random, (height, width), (rows, columns))


def volume(random: Random) -> Problem:
    """3-D, square frames of a video, windows with a depth of their own."""
    depth, side = random.choice(DEPTHS), random.choice(VOLUME_SIDES)
    rows = random.choice([w for w in VOLUME_WINDOWS if w <= side])
    depth_window = random.choice([w for w in VOLUME_WINDOWS if w <= depth])
    return complete(random, (depth, side, side), (depth_window, rows, rows))


def complete(random: Random, size: tuple[int, ...], window: tuple[int, ...]) -> Problem:
    """Dilation (half of them none, a quarter the largest), heads, and a batch that fills a GPU."""
    largest = [n // k for n, k in zip(size, window, strict=True)]
    kind = random.random()
    if kind < 0.5:
        dilation = [1] * len(size)
    elif kind < 0.75:
        dilation = largest
    else:
        dilation = [random.randint(1, d) for d in largest]
    heads, head_dim = random.choice([1, 2, 3, 4, 6, 8, 12, 16, 24]), random.choice([32, 64, 128])
    target = 2 ** random.randint(21, 26)
    batch = max(1, target // (prod(size) * heads * head_dim))
    return Problem(size, heads, head_dim, window, tuple(dilation), min(batch, 256))


if __name__ == "__main__":
    main()
