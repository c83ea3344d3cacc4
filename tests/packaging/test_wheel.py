"""The wheel works without the checkout: it is built and installed beside the same dependencies."""

import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

REPO = Path(__file__).parents[2]
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder, REPO]
    subprocess.run(build, check=True)
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The programs' folder of an environment that holds the wheel and sees the dependencies."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False)
    scheme = {"base": str(folder), "platbase": str(folder)}
    packages = Path(sysconfig.get_path("purelib", "venv", vars=scheme))
    # A path file adds a folder without reading the path files in it: no editable install is seen.
    shared = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    (packages / "dependencies.pth").write_text("\n".join(sorted(shared)))
    programs = Path(sysconfig.get_path("scripts", "venv", vars=scheme))
    pip = [sys.executable, "-m", "pip", f"--python={programs / 'python'}", "install"]
    subprocess.run([*pip, "--no-deps", "--no-index", "--ignore-installed", wheel], check=True)
    return programs


def run(programs: Path, folder: Path, *command: str) -> str:
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    command = (str(programs / command[0]), *command[1:])
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_it_holds_the_two_packages_and_the_configs(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    top = {name.split("/")[0] for name in names}
    assert {name for name in top if not name.endswith(".dist-info")} == {
        "nat_models",
        "neighborhood_attention",
    }
    configs = {path.relative_to(REPO / "configs") for path in (REPO / "configs").rglob("*.yaml")}
    assert configs
    assert configs == {
        Path(name).relative_to("nat_models/configs")
        for name in names
        if name.startswith("nat_models/configs/")
    }
    assert {"nat_models/py.typed", "neighborhood_attention/py.typed"} <= set(names)
    assert "neighborhood_attention/backends/triton/tile_table.json" in names


def test_the_models_are_registered_with_timm(installed, tmp_path):
    code = (
        "import nat_models, neighborhood_attention, timm;"
        "timm.create_model('nat_mini');"
        "print(nat_models.__file__, neighborhood_attention.__file__)"
    )
    places = run(installed, tmp_path, "python", "-c", code).split()
    assert all(Path(place).is_relative_to(installed.parent) for place in places)


def test_it_trains_two_steps_with_its_own_configs(installed, tmp_path):
    run(installed, tmp_path, "nat-train", "debug=short")
    assert [*tmp_path.rglob("*.ckpt")]


def test_the_benchmark_explains_itself(installed, tmp_path):
    assert "attention_backend" in run(installed, tmp_path, "nat-bench", "--help")
