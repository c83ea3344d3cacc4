"""Rules of the tree that no tool checks."""

import os
import re
import subprocess
import sys
from pathlib import Path

REPO = Path(__file__).parents[2]
PACKAGES = {"nat_models": REPO, "neighborhood_attention": REPO / "kernels"}
SOURCES = sorted(
    path.relative_to(REPO)
    for name, folder in PACKAGES.items()
    for path in (folder / name).rglob("*.py")
)


def tracked_files() -> list[Path]:
    """Files under version control, and those about to be."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(command, cwd=REPO, check=True, capture_output=True, text=True).stdout
    return [REPO / name for name in names.splitlines() if (REPO / name).is_file()]


def test_kernels_is_a_folder_and_not_a_package():
    assert (REPO / "kernels").is_dir()
    assert not (REPO / "kernels" / "__init__.py").exists()


def test_the_attention_package_imports_torch_alone():
    code = "import sys, neighborhood_attention; print(*sys.modules)"
    env = os.environ | {"PYTHONPATH": str(REPO / "kernels")}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=env, check=True, capture_output=True, text=True)
    loaded = set(done.stdout.split())
    assert "torch" in loaded
    assert not loaded & {"timm", "lightning", "hydra", "triton", "nat_models"}


def test_no_file_names_a_path_of_one_machine():
    machine_path = re.compile(rb"(?<![\w.~$}-])/(work|root|home|tmp)/|\.\./shared")
    files = [path for path in tracked_files() if path.suffix not in {".png", ".gz", ".pt"}]
    assert len(files) > 20
    assert [path for path in files if machine_path.search(path.read_bytes())] == []


def test_no_kernel_uses_what_triton_removed():
    removed = re.compile(r"tl\.(make_block_ptr|advance)\b")
    assert [path for path in SOURCES if removed.search((REPO / path).read_text())] == []


def test_source_files_of_some_length_have_their_tests():
    """`name.py` has a `test_name.py`, the `__init__.py` of a package one of the package's name.

    Parts of one thing may share a test: `test_fused.py` covers `fused_forward.py`.
    """
    missing = []
    for source in SOURCES:
        words = (source.parent.name if source.stem == "__init__" else source.stem).split("_")
        names = {f"test_{'_'.join(words[:n])}.py" for n in range(1, len(words) + 1)}
        found = {path.name for path in (REPO / "tests" / source.parts[0]).rglob("test_*.py")}
        if len((REPO / source).read_text().splitlines()) > 40 and not names & found:
            missing.append(str(source))
    assert missing == []
