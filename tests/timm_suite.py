"""timm's own tests of models, run on ours: python tests/timm_suite.py [PATTERN ...] [-OPTION ...]

Patterns choose models by name ("dinat_s_*"), options go to pytest. The tests are those of the
installed timm, downloaded as its source distribution. This file is also the plugin that points them
at our models.
"""

import fnmatch
import os
import subprocess
import sys
import tarfile
from collections import Counter
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import timm

import nat_models

TESTS_PER_MODEL = 11
PATTERNS = "TIMM_SUITE_PATTERNS"  # in the environment: pytest's worker processes read it too

_list_timm_models = timm.list_models
OURS = nat_models.list_models()


def chosen_models(patterns: list[str]) -> list[str]:
    """Our models that match a pattern; all if there is none.

    Raises:
        ValueError: A pattern matches no model.
    """
    for pattern in patterns:
        if not fnmatch.filter(OURS, pattern):
            raise ValueError(f"no model is named {pattern!r}; there are {', '.join(OURS)}")
    return [name for name in OURS if any(fnmatch.fnmatch(name, p) for p in patterns or ["*"])]


def download_tests(folder: Path) -> None:
    """Unpack timm's tests, not its code, into a folder."""
    source = [sys.executable, "-m", "pip", "download", f"timm=={timm.__version__}", "--no-deps"]
    subprocess.run([*source, "--no-binary", ":all:", "--quiet", "--dest", folder], check=True)
    with tarfile.open(next(folder.glob("timm-*.tar.gz"))) as archive:
        for member in archive.getmembers():
            member.name = member.name.partition("/")[2]
            if member.name.startswith("tests/") or member.name == "pyproject.toml":
                archive.extract(member, folder, filter="data")


def main() -> int:
    """Run the suite on the models that the command line names."""
    patterns = [argument for argument in sys.argv[1:] if not argument.startswith("-")]
    options = [argument for argument in sys.argv[1:] if argument.startswith("-")]
    try:
        chosen_models(patterns)
    except ValueError as error:
        sys.exit(str(error))
    with TemporaryDirectory() as folder:
        download_tests(Path(folder))
        here = Path(__file__).parent
        paths = [here, here.parent, here.parent / "kernels", os.environ.get("PYTHONPATH", "")]
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(map(str, filter(None, paths))),
            PATTERNS: " ".join(patterns),
        }
        environment.pop("GITHUB_ACTIONS", None)  # timm leaves out tests there
        return subprocess.run(
            [sys.executable, "-m", "pytest", "-p", "timm_suite", "-p", "no:timeout",
             "-p", "no:cacheprovider", "-c", "pyproject.toml", "tests/test_models.py",
             "-W", "ignore::pytest.PytestUnknownMarkWarning", *options],
            cwd=folder, env=environment,
        ).returncode  # fmt: skip


def pytest_configure(config: pytest.Config) -> None:
    """Show timm's tests our models alone; they list their cases when they are imported."""
    chosen = chosen_models(os.environ[PATTERNS].split())

    def list_models(filter: str = "", module: str = "", *args: Any, **kwargs: Any) -> list[str]:
        # Of our modules, whatever modules the test asks for.
        names = _list_timm_models(filter, nat_models.models.__all__, *args, **kwargs)
        return [name for name in names if _architecture(name) in chosen]

    timm.list_models = list_models
    timm.list_pretrained = lambda *_, **__: []  # tests that download weights


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keep the tests of our models; each model must have all of them."""
    kept = [item for item in items if _architecture(_model_name(item)) in OURS]
    kept = [item for item in kept if "pretrained" not in item.name]
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = kept
    tests = Counter(_architecture(_model_name(item)) for item in items)
    if tests != dict.fromkeys(chosen_models(os.environ[PATTERNS].split()), TESTS_PER_MODEL):
        raise pytest.UsageError(f"expected {TESTS_PER_MODEL} tests of every model, got {tests}")


def _model_name(item: pytest.Item) -> str:
    callspec = getattr(item, "callspec", None)
    name = callspec.params.get("model_name") if callspec else None
    return name if isinstance(name, str) else ""  # an empty list of models leaves a placeholder


def _architecture(name: str) -> str:
    return name.partition(".")[0]


if __name__ == "__main__":
    sys.exit(main())
