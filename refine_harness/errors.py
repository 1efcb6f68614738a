"""Errors meant for people: one clear sentence that says what, where, what was expected and what to do.

The command line prints the sentence of what is `for_people` and exits with code 2. Every other
exception keeps its traceback, because that is the clearest report of a mistake of ours.
"""

from __future__ import annotations

import difflib
import sys
from collections.abc import Iterable


class RefineError(Exception):
    """Something the user can put right."""


class ConfigError(RefineError):
    """A setting that is unknown, of the wrong type, or at odds with another."""


class DataError(RefineError):
    """Text, questions or records that cannot be used as they are."""


class ModelError(RefineError):
    """A model folder or tokenizer that cannot be used as it is."""


class TaskError(RefineError):
    """A benchmark that is unknown or cannot be built."""


class RunError(RefineError):
    """A run folder that cannot be written or holds something else."""


def for_people(error: Exception) -> str | None:
    """The sentence of a `RefineError`, or of a kernel that was asked for and cannot run here; None of other errors."""
    if isinstance(error, RefineError):
        return str(error)
    kernels = sys.modules.get("refine_kernels.choose")  # importing it takes torch; what raised its error has done so
    return f"{error}." if kernels is not None and isinstance(error, kernels.ImplementationError) else None


def suggest(word: str, known: Iterable[str]) -> str:
    """`" Did you mean X?"` for the nearest known word, or `""` when nothing is near."""
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f" Did you mean {near[0]}?" if near else ""
