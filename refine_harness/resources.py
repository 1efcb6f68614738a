"""Where the data folders `tasks`, `configs` and `leaderboard` are: in an installed wheel or in a checkout.

Nobody else computes such a path.
"""

from __future__ import annotations

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent


def resource(name: str) -> Path:
    """The folder `tasks`, `configs` or `leaderboard`; in a wheel it is read-only.

    Raises FileNotFoundError when neither the wheel's copy nor the checkout's folder exists.
    """
    for folder in (_PACKAGE / "_data" / name, _PACKAGE.parent / name):
        if folder.is_dir():
            return folder
    raise FileNotFoundError(f"{name}/ is neither packaged under {_PACKAGE / '_data'} nor beside {_PACKAGE}")


def find(path: str | Path, kind: str) -> Path:
    """`path` itself if it exists; else the same path below the shipped folder `kind`.

    `find("configs/quickstart.yaml", "configs")` works from any folder of any machine. The
    returned path may not exist: the caller says what was expected of it.
    """
    path = Path(path)
    if path.exists() or path.is_absolute():
        return path
    parts = path.parts[1:] if path.parts[:1] == (kind,) else path.parts
    shipped = resource(kind).joinpath(*parts)
    return shipped if shipped.exists() else path
