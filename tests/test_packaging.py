"""What is shipped: a wheel built from the source distribution, installed elsewhere and used from an empty folder."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the source distribution and the wheel that was built from it, not from the checkout."""
    out = tmp_path_factory.mktemp("dist")
    run([sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(ROOT)])
    return out


@pytest.fixture(scope="module")
def installed(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds nothing but the installed wheel."""
    target = tmp_path_factory.mktemp("installed")
    [wheel] = built.glob("*.whl")
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--no-compile"]
    run([*install, "--target", str(target), str(wheel)])
    return target


def run(command: list[str], cwd: Path | None = None, path: Path | None = None) -> str:
    environment = os.environ if path is None else {**os.environ, "PYTHONPATH": str(path)}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def relative(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def shipped(folder: Path) -> set[str]:
    """Files of a data folder that belong to the project: not what Python, an editor or a run left there."""
    return {name for name in relative(folder) if "__pycache__" not in name and not name.endswith(".pyc")}


def test_the_source_distribution_has_what_building_and_testing_needs(built: Path) -> None:
    [archive] = built.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        names = {name.split("/", 1)[1] for name in tar.getnames() if "/" in name}
    needed = {
        "pyproject.toml",
        "Makefile",
        "constraints.txt",
        "README.md",
        "LICENSE",
        "NOTICE",
        "CHANGELOG.md",
        ".ci/run",
    }
    assert needed <= names
    assert {"tests/conftest.py", "tests/test_packaging.py", "kernels/refine_kernels/__init__.py"} <= names


def test_the_wheel_has_two_packages_and_no_more(built: Path) -> None:
    [wheel] = built.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    tops = {name.split("/")[0] for name in names}
    assert tops == {"refine_harness", "refine_kernels", f"refine_harness-{wheel.name.split('-')[1]}.dist-info"}
    assert {"refine_harness/py.typed", "refine_kernels/py.typed"} <= set(names)


def test_python_files_of_checkout_and_wheel_are_the_same(installed: Path) -> None:
    for package, source in (("refine_harness", ROOT), ("refine_kernels", ROOT / "kernels")):
        theirs = {name for name in shipped(installed / package) if not name.startswith("_data/")}
        assert theirs == shipped(source / package)


@pytest.mark.parametrize("name", ["tasks", "configs", "leaderboard"])
def test_an_installed_wheel_finds_its_data(name: str, installed: Path, tmp_path: Path) -> None:
    code = f"from refine_harness.resources import resource; print(resource({name!r}))"
    found = Path(run([sys.executable, "-c", code], cwd=tmp_path, path=installed).strip())
    assert found.is_relative_to(installed)
    assert shipped(found) == shipped(ROOT / name)


def test_an_installed_wheel_runs_from_an_empty_folder(installed: Path, tmp_path: Path) -> None:
    refine = [sys.executable, "-m", "refine_harness"]
    printed = run([*refine, "explain", "configs/midtrain/deltanet_1b.yaml"], cwd=tmp_path, path=installed)
    assert "window: 16384" in printed
    code = "import refine_harness, refine_kernels; print(refine_harness.__file__, refine_kernels.__file__)"
    files = run([sys.executable, "-c", code], cwd=tmp_path, path=installed).split()
    assert all(Path(file).is_relative_to(installed) for file in files)
    assert list(tmp_path.iterdir()) == []


def test_entry_points_lead_to_what_there_is(installed: Path) -> None:
    [metadata] = installed.glob("*.dist-info")
    code = f"""
import importlib.metadata as metadata
from pathlib import Path
points = metadata.Distribution.at(Path({str(metadata)!r})).entry_points
for point in points:
    point.load()
print(sorted((point.group, point.name, point.value) for point in points))
"""
    from refine_harness.registration import BACKENDS

    points = [("console_scripts", "refine", "refine_harness.cli:main")]
    points += [("lm_eval.models", name, target) for name, target in BACKENDS.items()]
    assert run([sys.executable, "-c", code], path=installed).strip() == str(sorted(points))


def test_constraints_pin_every_dependency_within_its_bounds() -> None:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = dict(line.split("==") for line in lines if not line.startswith("#"))
    assert not [version for version in pins.values() if "+" in version], "a pin must not name one build"
    versions = {canonicalize_name(name): version for name, version in pins.items()}
    extras = PROJECT["optional-dependencies"]
    for line in [*PROJECT["dependencies"], *extras["dev"], *extras["peft"]]:
        requirement = Requirement(line)
        if requirement.name != PROJECT["name"]:
            assert requirement.specifier.contains(versions[canonicalize_name(requirement.name)]), line
