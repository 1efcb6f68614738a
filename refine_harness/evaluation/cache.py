"""Answers kept on disk as they come, so that an interrupted evaluation goes on where it was.

A key is a hash of everything that decides an answer: the weights themselves (never their name), the
tokenizer, the settings and the request. Two checkpoints in one folder can share the file; neither
meets the other's answers. Values are JSON, never pickles.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from refine_harness.errors import RunError

_FORMAT = 2
"""Part of every key: raised when answers to the same request may differ from those of earlier code."""


def request_key(method: str, request: Sequence[Any]) -> str:
    """Hex sha256 of a method's name and a request's JSON values: equal for equal requests."""
    return hashlib.sha256(json.dumps([method, list(request)], sort_keys=True, default=str).encode()).hexdigest()


class ResponseCache:
    """A table of answers in `folder/responses.sqlite`; several processes may share it.

    Args:
        folder: made if it is not there.
        identity: JSON values that all requests share (weights, dtype, bounds, ...).

    Raises RunError when the folder cannot be written or the file is something else.
    """

    def __init__(self, folder: str | Path, identity: dict[str, Any]) -> None:
        self.path = Path(folder) / "responses.sqlite"
        self._identity = json.dumps([_FORMAT, identity], sort_keys=True)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._database = sqlite3.connect(self.path, timeout=60, isolation_level=None)
            self._database.execute("CREATE TABLE IF NOT EXISTS responses (key TEXT PRIMARY KEY, value TEXT NOT NULL)")
        except sqlite3.DatabaseError as error:
            raise RunError(
                f"{self.path} cannot be used to keep answers ({error}). Delete it, or name another folder."
            ) from None
        except OSError as error:
            raise RunError(f"{self.path.parent} cannot be written ({error.strerror}). Name another folder.") from None

    def get(self, request: str) -> Any | None:
        """The value kept for a request (its `request_key`), or None."""
        row = self._database.execute("SELECT value FROM responses WHERE key = ?", (self._key(request),)).fetchone()
        return None if row is None else json.loads(row[0])

    def put(self, values: Mapping[str, Any]) -> None:
        """Keep JSON values by request: all are in the file when this returns, or none if it is interrupted."""
        rows = [(self._key(request), json.dumps(value)) for request, value in values.items()]
        with self._database:
            self._database.execute("BEGIN IMMEDIATE")
            self._database.executemany("INSERT OR REPLACE INTO responses VALUES (?, ?)", rows)

    def _key(self, request: str) -> str:
        return hashlib.sha256(f"{self._identity}{request}".encode()).hexdigest()

    def __len__(self) -> int:
        return self._database.execute("SELECT COUNT(*) FROM responses").fetchone()[0]

    def close(self) -> None:
        self._database.close()
