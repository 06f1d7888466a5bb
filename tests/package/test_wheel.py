"""What a wheel built from this checkout holds: a glob of `include` that matches nothing does not fail a build."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
PACKAGE = "mminference_sgl"


@pytest.fixture(scope="module")
def names(tmp_path_factory) -> set[str]:
    out = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "maturin", "build", "--release", "--offline", "--out", out]
    result = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    (wheel,) = out.glob("*.whl")
    assert wheel.name.startswith("mminference_sgl-0.1.0-cp311-abi3-")
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def files(folder: str, *suffixes: str) -> set[str]:
    """Files below a folder of the repository, as paths from it."""
    root = REPOSITORY / folder
    return {
        path.relative_to(root).as_posix()
        for path in root.rglob("*")
        if path.suffix in suffixes and "__pycache__" not in path.parts
    }


@pytest.mark.parametrize(("folder", "suffix"), [("kernels", ".py"), ("patterns", ".json"), ("patterns", ".md")])
def test_top_level_folder_ships_inside_the_package(names, folder, suffix):
    inside = f"{PACKAGE}/{folder}/"
    shipped = {name.removeprefix(inside) for name in names if name.startswith(inside)}
    assert shipped >= files(folder, suffix) > set()
    assert shipped <= files(folder, ".py", ".json", ".md")


def test_package_ships_whole(names):
    assert {f"{PACKAGE}/{name}" for name in files(f"python/{PACKAGE}", ".py", ".pyi", ".typed")} <= names
    assert f"{PACKAGE}/_core.abi3.so" in names
    assert f"{PACKAGE}/py.typed" in names


def test_nothing_else_at_the_top(names):
    assert {name.split("/")[0] for name in names} == {PACKAGE, f"{PACKAGE}-0.1.0.dist-info"}


def test_no_caches(names):
    assert not [name for name in names if "__pycache__" in name or name.endswith(".pyc")]


def test_kernels_is_no_package():
    """With an __init__.py it would shadow, in scripts run from here, the package `kernels` that SGLang needs."""
    assert not (REPOSITORY / "kernels" / "__init__.py").exists()
