"""Draws the problems of paper.py into problems/paper.json; the same ones each time.

    python benchmarks/draw_problems.py

Like those of "Faster Neighborhood Attention" (arXiv 2403.04690): windows, dilations, head
dimensions and batches from real models to long sequences, in 1-D, 2-D and 3-D. Three at a time
share window, dilation, head dimension and which sizes are multiples of 16, and with them their
compiled kernels. Ten a number of axes are also for providers that take long to compile, every third
for products in TF32. zoo: the layers of the zoo are among the 2-D ones; those that are too large
with 128 images are the last of the list, with a half or a quarter.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from math import prod
from random import Random

from problem import FOLDER, Problem, load_problems

COUNT = 200  # a number of axes
FAMILY = 3  # problems that share kernels
SLOW = 10  # a number of axes
# Elements of the query; FLOP of the forward; weights of the unfused backends.
ELEMENTS = 2**20, 2**26
MAX_FLOPS = 5 * 10**10
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

# How to draw a map, and a window of a map.
Size = tuple[int, ...]
Axes = tuple[Callable[[Random], Size], Callable[[Random, Size], Size]]


def main() -> None:
    """Write the file."""
    random = Random(0)
    zoo = [Problem.of(entry) for entry in load_problems("zoo")]
    drawn = [
        *distinct(random, (length, sequence_window), []),
        *distinct(random, (image, image_window), [p for p in zoo if is_measurable(p)]),
        *distinct(random, (volume, volume_window), []),
    ]
    slow = set()
    for dims in (1, 2, 3):
        possible = [p for p in drawn if p.dims == dims and is_slow(p)]
        slow |= set(possible[:: len(possible) // SLOW][:SLOW])
    zoo = [reduced(p) for p in zoo]
    # The marks of the others hang on their places.
    drawn += [p for p in zoo if p not in drawn]
    rows = ",\n".join(
        f"  {json.dumps(p.record | {'slow': p in slow, 'tf32': number % 3 == 0, 'zoo': p in zoo})}"
        for number, p in enumerate(drawn)
    )
    about = " ".join(__doc__.split("\n\n")[-1].split())
    text = f'{{\n "about": {json.dumps(about)},\n "problems": [\n{rows}\n ]\n}}\n'
    (FOLDER / "paper.json").write_text(text)


def reduced(problem: Problem) -> Problem:
    """With the batch halved until it can be measured."""
    while not is_measurable(problem):
        problem = replace(problem, batch=problem.batch // 2)
    return problem


def distinct(random: Random, axes: Axes, first: list[Problem]) -> Iterator[Problem]:
    """`first`, and as many further ones as are missing."""
    found = dict.fromkeys(first)
    while len(found) < COUNT:
        for problem in family(random, axes)[: COUNT - len(found)]:
            found[problem] = None
    yield from found


def family(random: Random, axes: Axes) -> list[Problem]:
    """Problems that share kernels: half of them not dilated, a quarter as far as the map allows."""
    draw_size, draw_window = axes
    size = draw_size(random)
    window = draw_window(random, size)
    largest = [n // k for n, k in zip(size, window, strict=True)]
    kind = random.random()
    dilation = [1 if kind < 0.5 else d if kind < 0.75 else random.randint(1, d) for d in largest]
    extent = [k * d for k, d in zip(window, dilation, strict=True)]
    head_dim = random.choice([32, 64, 128])
    found: dict[Problem, None] = {}
    for _ in range(100):
        other = draw_size(random)
        is_alike = all(
            e <= m and (m % 16 == 0) == (n % 16 == 0)
            for m, n, e in zip(other, size, extent, strict=True)
        )
        if is_alike and not 0.5 <= kind < 0.75:
            size = other
        heads = random.choice([2, 3, 4, 6, 8, 12, 24])
        target = 2 ** random.randint(21, 26)
        batch = min(256, max(1, target // (prod(size) * heads * head_dim)))
        problem = Problem(size, heads, head_dim, window, tuple(dilation), batch)
        if is_measurable(problem):
            found[problem] = None
        if len(found) == FAMILY:
            break
    return list(found)


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


def length(random: Random) -> Size:
    """1-D."""
    return (random.choice(LENGTHS),)


def sequence_window(random: Random, size: Size) -> Size:
    """1-D."""
    return (random.choice([w for w in WINDOWS if w <= size[0]]),)


def image(random: Random) -> Size:
    """2-D, half of them square."""
    height = random.choice(SIDES)
    return height, height if random.random() < 0.5 else random.choice(SIDES)


def image_window(random: Random, size: Size) -> Size:
    """2-D, most of them square."""
    windows = [w for w in SQUARE_WINDOWS if w <= min(size)]
    rows = random.choice(windows)
    return rows, rows if random.random() < 0.8 else random.choice(windows)


def volume(random: Random) -> Size:
    """3-D, square frames of a video."""
    depth, side = random.choice(DEPTHS), random.choice(VOLUME_SIDES)
    return depth, side, side


def volume_window(random: Random, size: Size) -> Size:
    """3-D, with a depth of its own."""
    depth, rows = (random.choice([w for w in VOLUME_WINDOWS if w <= n]) for n in size[:2])
    return depth, rows, rows


if __name__ == "__main__":
    main()
