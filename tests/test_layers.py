"""Who may import whom, read from the source: the order of rooms, and what stays light or apart."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "refine_harness"
KERNELS = ROOT / "kernels" / "refine_kernels"

# A room imports from itself and from lines above it.
ORDER = [
    {"errors"},
    {"config", "resources"},
    {"types", "records", "synthetic"},
    {"data"},
    {"models"},
    {"algorithm"},
    {"training"},
    {"checkpoint"},
    {"evaluation", "leaderboard"},
    {"log"},
    {"run"},
    {"registration"},
    {"cli"},
    {"__main__"},
]
RANK = {room: rank for rank, rooms in enumerate(ORDER) for room in rooms}
# The package's own door may be opened by everyone; only `cli` looks in, for the version.
DOOR = "__init__"

TORCHLESS = (
    "errors",
    "config",
    "resources",
    "records",
    "synthetic.needles",
    "evaluation.statistics",
    "evaluation.samples",
    "evaluation.compare",
    "evaluation.rescore",
    "leaderboard",
    "log",
    "registration",
    "cli",
)


def sources(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.py"))


def room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported(path: Path) -> Iterator[str]:
    """Dotted names of everything a file imports, wherever in it; `from a import b` gives a and a.b."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} line {node.lineno}: write imports from the package's name"
            assert node.module is not None
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def ours(path: Path) -> set[str]:
    """Rooms of refine_harness that a file imports from."""
    names = (name.split(".") for name in imported(path) if name.startswith("refine_harness."))
    return {parts[1] for parts in names if parts[1] in RANK}


def test_every_file_is_in_a_room_with_a_place_in_the_order() -> None:
    assert {room(path) for path in sources(PACKAGE)} - {DOOR, "assets"} <= set(RANK)


@pytest.mark.parametrize("path", sources(PACKAGE), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_downwards(path: Path) -> None:
    here = room(path)
    if here == DOOR:
        assert ours(path) == {"registration"}
        return
    upwards = {other for other in ours(path) if other != here and RANK[other] >= RANK[here]}
    assert not upwards, f"{path.relative_to(ROOT)} imports from {', '.join(sorted(upwards))}, which comes after {here}"


def test_kernels_know_nothing_of_the_package() -> None:
    assert not [path for path in sources(KERNELS) if any(name.startswith("refine_harness") for name in imported(path))]


def test_only_kernels_import_fla_and_triton() -> None:
    def behind_the_door(path: Path) -> bool:
        return any(name.split(".")[0] in ("fla", "triton") for name in imported(path))

    assert not [path for path in [*sources(PACKAGE), *sources(ROOT / "tasks")] if behind_the_door(path)]


def test_kernels_is_no_import_package_of_its_own() -> None:
    # The import name `kernels` is another project's, which transformers imports.
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_light_rooms_import_no_torch() -> None:
    code = "\n".join(
        [
            "import sys, importlib",
            f"for name in {TORCHLESS!r}:",
            "    importlib.import_module('refine_harness.' + name)",
            "    heavy = {'torch', 'transformers', 'lm_eval', 'datasets'} & set(sys.modules)",
            "    assert not heavy, (name, heavy)",
        ]
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_every_import_is_a_declared_dependency() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = [
        *project["dependencies"],
        *project["optional-dependencies"]["gpu"],
        *project["optional-dependencies"]["peft"],
    ]
    declared = {_normal(line) for line in lines}
    # fla comes with its other half, fla-core.
    declared.add("fla-core")
    known = packages_distributions()
    missing = set()
    for path in [*sources(PACKAGE), *sources(KERNELS), *sources(ROOT / "tasks")]:
        for name in {name.split(".")[0] for name in imported(path)}:
            if name in sys.stdlib_module_names or name in ("refine_harness", "refine_kernels"):
                continue
            distributions = {_normal(distribution) for distribution in known.get(name, [name])}
            if not distributions & declared:
                missing.add((str(path.relative_to(ROOT)), name))
    assert not missing


def _normal(requirement: str) -> str:
    """The distribution's name in a requirement, as package indexes compare names."""
    name = requirement
    for character in "[<>=!~; ":
        name = name.split(character)[0]
    return name.lower().replace("_", "-").replace(".", "-")
