"""The built wheel: what is in it, and that it runs in an environment of its own."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest

from wandapp.kernels import FUNCTIONS

ROOT = Path(__file__).parents[1]
NOT_SOURCES = shutil.ignore_patterns(
    ".*", "build", "dist", "out", "tests", "benchmarks", "*.egg-info", "*.so", "__pycache__"
)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built from a copy of the sources, so that nothing of an earlier build gets in; without CUDA, to be quick."""
    work = tmp_path_factory.mktemp("wheel")
    shutil.copytree(ROOT, work / "source", ignore=NOT_SOURCES)
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "-q",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        work,
        work / "source",
    ]
    run = subprocess.run(command, env=os.environ | {"WANDAPP_CUDA": "0"}, capture_output=True, text=True, timeout=280)
    assert run.returncode == 0, run.stderr
    return next(work.glob("wandapp-*.whl"))


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    """Folder of the commands of a fresh environment: the wheel, and this environment's packages behind it."""
    home = tmp_path_factory.mktemp("fresh")
    venv.create(home)
    python = home / "bin" / "python"
    install = [sys.executable, "-m", "pip", "--python", python, "install", "-q", "--no-deps", "--no-index", wheel]
    subprocess.run(install, check=True, capture_output=True, timeout=120)
    site = next(home.glob("lib/python*/site-packages"))
    # A path in a .pth file is searched after the environment's own packages, and its .pth files are not read: an
    # editable install of wandapp in it stays out of sight.
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return home / "bin"


def test_wheel_holds_one_top_level_package_and_every_kernel(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    read = {Path(name).name: zipfile.ZipFile(wheel).read(name).decode() for name in names if ".dist-info/" in name}
    assert read["top_level.txt"].split() == ["wandapp"]
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"wandapp"}
    assert any(name.startswith("wandapp/_C.") for name in names)
    for op in set(FUNCTIONS.values()):
        assert f"wandapp/kernels/{op}/reference.py" in names
    sources = {str(path.relative_to(ROOT)) for path in (ROOT / "wandapp").rglob("*.py")}
    assert sources <= set(names)
    assert "wandapp = wandapp.cli:main" in read["entry_points.txt"]


def test_wheel_runs_where_the_sources_are_not(installed, tmp_path):
    code = "import wandapp, wandapp._C; wandapp.prune, wandapp.verify_model; print(wandapp.__file__)"
    run = subprocess.run([installed / "python", "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    assert Path(run.stdout.strip()).is_relative_to(installed.parent)
    run = subprocess.run(
        [installed / "wandapp", "doctor", "--json"], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout)
    assert found["versions"]["wandapp"] != "not installed"
    select = next(row for row in found["backends"] if (row["function"], row["device"]) == ("select_nm", "cpu"))
    assert select["backend"] == "cpu"


def test_every_dependency_has_a_tested_version():
    """So that no install with constraints.txt picks a version that nobody tried (torch's newest may be several GB)."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    extras = project["project"]["optional-dependencies"].values()
    wanted = [*project["project"]["dependencies"], *(requirement for extra in extras for requirement in extra)]
    wanted = [requirement for requirement in wanted if not requirement.startswith("wandapp[")]  # its own extras
    pinned = {
        line.partition("==")[0].lower() for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line
    }
    assert {requirement.partition(">")[0].partition(";")[0].strip().lower() for requirement in wanted} <= pinned
    assert set(project["build-system"]["requires"]) and {"setuptools", "pybind11", "ninja"} <= pinned


@pytest.mark.slow
def test_sdist_builds_a_wheel_that_runs(tmp_path):
    """The archive alone, without the repository around it, is enough."""
    shutil.copytree(
        ROOT, tmp_path / "source", ignore=shutil.ignore_patterns(".*", "build", "*.egg-info", "*.so", "out")
    )
    environment = os.environ | {"WANDAPP_CUDA": "0"}
    build = "from setuptools import build_meta; print(build_meta.build_sdist({!r}))"
    command = [sys.executable, "-c", build.format(str(tmp_path))]
    run = subprocess.run(command, cwd=tmp_path / "source", env=environment, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    archive = tmp_path / run.stdout.splitlines()[-1]
    with tarfile.open(archive) as tar:
        names = {name.partition("/")[2] for name in tar.getnames()}
        tar.extractall(tmp_path / "unpacked", filter="data")
    headers = {str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*.h")}
    wanted = {
        "LICENSE",
        "README.md",
        "Makefile",
        "tests/tiny.py",
        "docs/index.md",
        "wandapp/report.html.j2",
        "wandapp/py.typed",
    }
    assert headers and headers | wanted <= names and not [name for name in names if name.endswith(".so")]
    pip = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", tmp_path]
    run = subprocess.run(
        [*pip, next((tmp_path / "unpacked").iterdir())], env=environment, capture_output=True, text=True, timeout=280
    )
    assert run.returncode == 0, run.stderr
    held = zipfile.ZipFile(next(tmp_path.glob("*.whl"))).namelist()
    assert {"wandapp/py.typed", "wandapp/report.html.j2", "wandapp/kernels/select/reference.py"} <= set(held)
    assert any(name.startswith("wandapp/_C.") for name in held)
