"""`python -m nat_models.timm SCRIPT ARGS`: one of timm's scripts, with this package's models in it.

SCRIPT is the path of train.py, validate.py, benchmark.py, inference.py, ... in a checkout of timm,
with or without ".py"; timm's wheel does not hold them. `torchrun -m nat_models.timm` works too.
The import of this package has registered the models by then.
"""

import runpy
import sys
from pathlib import Path
from typing import NoReturn


def main(arguments: list[str]) -> None:
    """Run a script as `python SCRIPT ARGS` would.

    Args:
        arguments: The script's path, then its own arguments.
    """
    if not arguments:
        _fail("usage: python -m nat_models.timm SCRIPT ARGS")
    script = Path(arguments[0])
    if not script.is_file():
        script = script.with_name(f"{script.name}.py")
    if not script.is_file():
        _fail(f"error: {arguments[0]}: no such script; timm's are in its repository, not its wheel")
    sys.argv = [str(script), *arguments[1:]]
    sys.path[0] = str(script.parent.resolve())  # as Python does; scripts import each other
    runpy.run_path(str(script), run_name="__main__")


def _fail(message: str) -> NoReturn:
    print(message, file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    main(sys.argv[1:])
