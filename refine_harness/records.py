"""A score and everything needed to judge it: one immutable JSON file per scored checkpoint.

What was scored, what it was trained on, how it was scored, by which code on which machine, and the
outcome. The id of a record is a hash of all the rest, so a record that was edited after the fact is
found out when it is read. This file imports no torch and knows nothing of how scores are made or
shown. It keeps no host names, user names or absolute paths: records are published.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
import re
import shlex
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveInt,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
    model_validator,
)

from refine_harness.errors import DataError, RunError

SCHEMA_VERSION = 1
SHORT_ID = 12
"""Hexadecimal digits of an id in file names and links."""

_PACKAGE = Path(__file__).resolve().parent
_CODE = ("refine_harness", "kernels", "tasks", "configs", "pyproject.toml")
"""What a change of makes a checkout dirty: a result depends on these and on nothing else in it."""
_PACKAGES = ("torch", "transformers", "lm_eval", "flash-linear-attention", "triton", "refine-harness")


def canonical_json(value: Any) -> str:
    """The one JSON text of `value`: sorted keys, no spaces, ASCII only. Raises ValueError for NaN and infinities."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


def file_sha256(path: str | Path) -> str:
    """sha256 of a file's bytes, in hexadecimal. Raises DataError when it cannot be read."""
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}). Give the path of a readable file.") from None


_PATH_START = re.compile(r"^\s*(?:~[^/\\\s]*[/\\]|[A-Za-z]:[/\\]|[/\\](?=\S))")
_IN_TEXT = re.compile(r"(?<=\s)(?:~[^/\\\s]*[/\\]|[A-Za-z]:[/\\]|[/\\])\S+")
_DELIMITERS = re.compile(r"((?<![A-Za-z])[A-Za-z]:[/\\][^,=\[\]{}()\"'|;]*|[,=\[\]{}()\"'|;]|:(?!//))")


def shown_path(text: str) -> str:
    """`text` with every absolute path in it cut to its last name, so that no record tells whose disk it was.

    `data.path=/home/ann/books` becomes `data.path=books`; relative paths, hub ids and web addresses stay.
    """
    while True:  # until nothing is left to cut, so that a record read back is the record written
        shorter = re.sub(r"file:/+", "/", text)
        shorter = "".join(_without_folders(piece) for piece in _DELIMITERS.split(shorter) if piece)
        if shorter == text:
            return text
        text = shorter


def _without_folders(piece: str) -> str:
    if _PATH_START.match(piece):
        return _last_name(piece)
    return _IN_TEXT.sub(lambda match: _last_name(match.group()), piece)


def _last_name(path: str) -> str:
    names = [name for name in re.split(r"[/\\]", path.strip()) if name and not re.fullmatch(r"~.*|[A-Za-z]:", name)]
    return names[-1] if names else "/"


def _plain(value: Any) -> Any:
    """`value` as plain JSON with no absolute paths; tuples become lists. Raises ValueError."""
    match value:
        case str():
            return shown_path(value)
        case bool() | int() | None:
            return value
        case float():
            if not math.isfinite(value):
                raise ValueError(f"{value} is not a finite number")
            return value
        case Mapping():
            return {str(key): _plain(item) for key, item in value.items()}
        case list() | tuple():
            return [_plain(item) for item in value]
        case os.PathLike():
            return shown_path(os.fspath(value))
    raise ValueError(f"{type(value).__name__} is not a JSON value")


Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Shown = Annotated[str, AfterValidator(shown_path)]
Version = Annotated[str, BeforeValidator(lambda value: str(value) if isinstance(value, int | float) else value)]
PlainConfig = Annotated[dict[str, Any], BeforeValidator(_plain)]


class Facts(BaseModel):
    """A part of a record: unknown keys and non-finite numbers are refused, values cannot change."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True, protected_namespaces=()
    )

    later: ClassVar[tuple[str, ...]] = ()
    """Fields that came after the first records. At their defaults they are not written, so that a record from before
    them keeps its id."""

    @model_serializer(mode="wrap")
    def _as_first_written(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        tree = serialize(self)
        for name in self.later:
            if getattr(self, name) == type(self).model_fields[name].default:
                tree.pop(name, None)
        return tree


class TaskScore(Facts):
    """One metric of one task, at one context length where the task has lengths."""

    task: str = Field(min_length=1)
    group: str = Field(min_length=1)
    """niah, longqa, longbench, or the task's own name where it belongs to no group; of LongBench-E, whose metrics are
    lengths with examples of their own, with the metric: `longbench_e 0-4k`."""
    metric: str
    length: PositiveInt | None = None
    """Context length in tokens; None where prompts come as they are."""
    value: float
    """Mean over examples, 0 to 100 where the unit is percent."""
    stderr: NonNegativeFloat | None = None
    """One standard error of the mean over examples, in the unit of `value`; None where nobody gives it."""
    n: PositiveInt | None = None
    """Examples scored; None only for numbers of the paper."""
    truncated: NonNegativeInt = 0
    """Examples whose prompt lost a part because it was over the bound."""
    higher_is_better: bool = True
    version: Version = "0"
    """The task's version."""
    unit: Literal["percent", "raw"] = "percent"
    """raw: a number that is no share of 100, such as a perplexity; it enters no group mean."""
    samples_sha256: Sha256 | None = None
    """Hash of the answers, example by example (`evaluation/samples.py`)."""

    @model_validator(mode="after")
    def _in_range(self) -> TaskScore:
        if self.unit == "percent" and not 0 <= self.value <= 100:
            raise ValueError(f"value {self.value} of {self.task} is outside 0 to 100")
        if self.n is not None and self.truncated > self.n:
            raise ValueError(f"{self.task} says {self.truncated} of {self.n} prompts were cut")
        return self


def category_weights(tasks: Sequence[str], categories: Mapping[str, str]) -> list[float] | None:
    """How much each task counts where categories count alike, up to a factor; None without categories."""
    counts = Counter(categories.get(task) for task in tasks)
    return [1 / counts[categories[task]] for task in tasks] if categories else None


class GroupScore(Facts):
    """The mean over the tasks of a group, at one context length where the group has lengths."""

    later: ClassVar[tuple[str, ...]] = ("metrics", "by_size", "categories")

    group: str = Field(min_length=1)
    length: PositiveInt | None = None
    value: float = Field(ge=0, le=100)
    stderr: NonNegativeFloat | None = None
    """One standard error, from those of the tasks; None where one of them has none."""
    n_tasks: PositiveInt
    n: PositiveInt | None = None
    """Examples over all tasks of the group."""
    metrics: dict[str, str] = {}
    """Of tasks with several metrics, the one that is averaged."""
    by_size: bool = False
    """Whether tasks count by their examples (some stock groups of lm-eval) rather than alike."""
    categories: dict[str, str] = {}
    """Category of each task, where categories count alike and the tasks within one (LongBench's official averages)."""

    def weights(self, tasks: Sequence[str], sizes: Sequence[int]) -> list[float] | None:
        """How much each of these tasks counts, up to a factor; None where all count alike. sizes: their examples."""
        return [float(size) for size in sizes] if self.by_size else category_weights(tasks, self.categories)

    def averages(self, score: TaskScore) -> bool:
        """Whether `score` is one of those that this is the mean of."""
        metric = self.metrics.get(score.task, score.metric)
        return (score.group, score.length, score.unit, score.metric) == (self.group, self.length, "percent", metric)


class ModelFacts(Facts):
    """Which weights were scored."""

    name: Shown
    """Name of the model's folder or its hub id, never where it lies."""
    model_type: str
    """Family, as the model's config names it: delta_net, lact, ..."""
    parameters: PositiveInt | None = None
    weights_sha256: Sha256 | None = None
    parent_sha256: Sha256 | None = None
    """Weights that training started from; None for a model that is only scored."""
    tokenizer_sha256: Sha256 | None = None


class TrainingFacts(Facts):
    """What the last stage did."""

    config: PlainConfig
    """The resolved settings, absolute paths cut to their last names."""
    optimizer_steps: NonNegativeInt
    """Steps on documents (test-time: on prompts)."""
    tokens: NonNegativeInt
    """Document tokens learned from."""
    answer_steps: NonNegativeInt = 0
    """Cross-entropy steps on answers (post-training)."""
    seconds: NonNegativeFloat
    data_sha256: Sha256 | None = None
    """Hash of the training data as read."""


class EvaluationFacts(Facts):
    """How the scores were made."""

    backend: str
    """lm-eval's name of the model class: refine or refine-ttt."""
    tasks: tuple[Shown, ...]
    """As asked for."""
    lengths: tuple[PositiveInt, ...] = ()
    limit: PositiveInt | None = None
    """Examples per task and length; None: all of them."""
    samples: PositiveInt | None = None
    """Examples generated per task and length, before `limit`."""
    seed: int | None = None
    max_length: PositiveInt | None = None
    """Bound on prompt plus answer in tokens; None: no bound."""
    truncation: str | None = None
    """What happens to a prompt over the bound, such as `middle`."""
    dtype: str | None = None
    device: str | None = None
    batch_size: PositiveInt | None = None
    data_sha256: dict[Shown, Sha256] = {}
    """Task, or `task@length` where a task has lengths, to the hash of its examples. Rows with different hashes
    answered different questions."""


class Machine(Facts):
    """The computer, without its name."""

    cpu: str | None = None
    gpu: str | None = None
    gpus: NonNegativeInt = 0
    cores: PositiveInt | None = None
    """Cores this process may use."""
    memory_gb: float | None = Field(default=None, gt=0)
    """Main memory this process may use, in 10^9 bytes."""
    os: str | None = None


class Provenance(Facts):
    """By which code, when, where and how."""

    commit: str | None = Field(default=None, pattern=r"^[0-9a-f]{40,64}$")
    """Of the checkout that the package was imported from; None for an installed package."""
    dirty: bool | None = None
    """Whether that checkout held changes that its commit does not; None where there is no commit."""
    versions: dict[str, str]
    machine: Machine
    command: Shown
    date: str = Field(pattern=r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ$")
    """UTC."""
    seed: int


class ScoreRecord(Facts):
    """One scored checkpoint, or one row of a table in the paper."""

    schema_version: Literal[1] = SCHEMA_VERSION
    source: Literal["measured", "paper"]
    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")
    """Of the run; begins the record's file name."""
    label: str = Field(min_length=1, max_length=200, pattern=r"^[^\x00-\x1f\x7f]*$")
    """What tables call it: one line, no control characters."""
    stage: Literal["base", "mid", "post", "test-time"]
    method: Literal["none", "ntp", "refine"]
    """Of the last stage; none for a model that is only scored."""
    restore: Literal["prompt", "never"] | None = None
    """Test-time training: whether weights were put back after each prompt, or carried over."""
    chain: tuple[str, ...] = ()
    """The stages that led here, first to last, such as `refine mid`, `nested refine post`."""
    model: ModelFacts
    training: TrainingFacts | None = None
    evaluation: EvaluationFacts
    scores: tuple[TaskScore, ...] = ()
    groups: tuple[GroupScore, ...] = ()
    seconds: NonNegativeFloat | None = None
    """Of scoring, test-time training included."""
    provenance: Provenance | None = None
    reference: str | None = None
    """Where a number that was not measured here is printed."""

    @model_validator(mode="after")
    def _consistent(self) -> ScoreRecord:
        if (self.stage == "base") != (self.method == "none"):
            raise ValueError(f"stage {self.stage} does not go with method {self.method}")
        if (self.stage == "test-time") != (self.restore is not None):
            raise ValueError(f"restore is {self.restore} at stage {self.stage}; only test-time training has one")
        if not self.scores and not self.groups:
            raise ValueError("there are no scores")
        _refuse_twice([(score.task, score.metric, score.length) for score in self.scores])
        _refuse_twice([(score.group, score.length) for score in self.groups])
        missing = self._missing()
        if missing:
            raise ValueError(f"a record with source {self.source} needs {', '.join(missing)}")
        if self.source == "paper" and self.provenance is not None:
            raise ValueError("a record of the paper's numbers cannot have a provenance of ours")
        return self

    def _missing(self) -> list[str]:
        if self.source == "paper":
            return [] if self.reference else ["reference"]
        needed = {
            "provenance": self.provenance,
            "seconds": self.seconds,
            "model.weights_sha256": self.model.weights_sha256,
            "evaluation.dtype": self.evaluation.dtype,
            "evaluation.device": self.evaluation.device,
            "evaluation.seed": self.evaluation.seed,
        }
        for score in self.scores:
            needed[f"n of {score.task}"] = score.n
        for group in self.groups:
            needed[f"n of {group.group}"] = group.n
        return [name for name, value in needed.items() if value is None]

    @property
    def id(self) -> str:
        """sha256 of the canonical JSON of every field."""
        return hashlib.sha256(canonical_json(self.model_dump(mode="json")).encode()).hexdigest()

    @property
    def file_name(self) -> str:
        """`<name>-<first digits of the id>.json`."""
        return f"{self.name}-{self.id[:SHORT_ID]}.json"

    def as_json(self) -> dict[str, Any]:
        """What the file holds: the id, then every field."""
        return {"id": self.id, **self.model_dump(mode="json")}


def _refuse_twice(keys: Sequence[tuple[Any, ...]]) -> None:
    for key in keys:
        if keys.count(key) > 1:
            raise ValueError(f"{', '.join(str(part) for part in key if part is not None)} is scored twice")


def write_record(record: ScoreRecord, folder: str | Path) -> Path:
    """Write `record` into `folder`, whole or not at all; the file's path.

    Writing the same record again changes nothing. Raises RunError when the folder cannot be written
    or a file of that name holds something else.
    """
    folder = Path(folder)
    path = folder / record.file_name
    content = (json.dumps(record.as_json(), indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            _place(content, path)
        same = path.read_bytes() == content or read_record(path) == record  # the order of keys means nothing
    except OSError as error:
        raise RunError(f"{path} cannot be written ({error.strerror}). Give a folder that you may write to.") from None
    except DataError:
        same = False
    if not same:
        raise RunError(f"{path} exists and holds something else. Records never change: move that file away first.")
    return path


def _place(content: bytes, path: Path) -> None:
    """`content` at `path`, atomically, and never over a file that appeared meanwhile."""
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        try:
            os.link(temporary, path)
        except FileExistsError:
            return
        except OSError:  # a file system without hard links
            os.replace(temporary, path)
    finally:
        Path(temporary).unlink(missing_ok=True)


def read_record(path: str | Path) -> ScoreRecord:
    """The record in a file. Raises DataError when it is no record or was changed after it was written."""
    try:
        tree = json.loads(Path(path).read_bytes(), parse_constant=_refuse_constant)
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}). Give the path of a record.") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not valid JSON ({error}). Restore it, or score the checkpoint again.") from None
    if not isinstance(tree, dict) or not isinstance(tree.get("id"), str):
        raise DataError(f"{path} is no score record: it has no id. Give a file that `refine eval` wrote.")
    version = tree.get("schema_version")
    if version != SCHEMA_VERSION:
        raise DataError(
            f"{path} has schema_version {version!r}; this version of refine-harness reads {SCHEMA_VERSION}. "
            "Use the version that wrote it, or score the checkpoint again."
        )
    said = tree.pop("id")
    try:
        record = ScoreRecord.model_validate_json(canonical_json(tree), strict=True)
    except ValidationError as error:
        raise DataError(f"{path} is no score record: {_first_problem(error)}. Score the checkpoint again.") from None
    except ValueError as error:
        raise DataError(f"{path} holds a number that is not finite ({error}). Score the checkpoint again.") from None
    if record.id != said:
        raise DataError(
            f"{path} was changed after it was written: its id is {said[:SHORT_ID]} but its contents hash to "
            f"{record.id[:SHORT_ID]}. Restore the file, or score the checkpoint again."
        )
    return record


def _refuse_constant(text: str) -> None:
    raise ValueError(f"{text} is not a finite number")


def _first_problem(error: ValidationError) -> str:
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"])
    message = first["msg"].removeprefix("Value error, ")
    return f"{where}: {message}" if where else message


def read_records(folder: str | Path) -> list[ScoreRecord]:
    """Every record directly in `folder`, in the order they were made. Raises DataError for the first bad one."""
    folder = Path(folder)
    if not folder.is_dir():
        raise DataError(f"{folder} is not a folder of records. Give the folder that `refine eval` wrote records to.")
    return in_order(read_record(path) for path in sorted(folder.glob("*.json")))


def in_order(records: Iterable[ScoreRecord]) -> list[ScoreRecord]:
    """`records` without repetitions, by date; those of one second, and the paper's, by name."""
    unique = {record.id: record for record in records}
    return sorted(unique.values(), key=lambda record: (_date(record), record.name, record.id))


def _date(record: ScoreRecord) -> str:
    return record.provenance.date if record.provenance is not None else ""


def provenance(argv: Sequence[str], seed: int) -> Provenance:
    """Who we are, for a record: code, versions, machine, command and time. Names no host, user or folder."""
    commit, dirty = _checkout(_PACKAGE.parent)
    return Provenance(
        commit=commit,
        dirty=dirty,
        versions=_versions(),
        machine=_machine(),
        command=shlex.join(shown_path(argument) for argument in argv),
        date=datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        seed=seed,
    )


def _checkout(folder: Path) -> tuple[str | None, bool | None]:
    """Commit and dirtiness of `folder` if it is itself the top of a git checkout, else (None, None).

    A package installed below somebody's repository, as in its `.venv`, is not of that repository.
    """
    if not (folder / ".git").exists():
        return None, None
    commit = _git(folder, "rev-parse", "--verify", "HEAD")
    if commit is None:
        return None, None
    changes = _git(folder, "status", "--porcelain", "--", *_CODE)
    return commit, None if changes is None else changes != ""


def _git(folder: Path, *arguments: str) -> str | None:
    # GIT_DIR and its kin, set inside git hooks, would point elsewhere; status must take no lock.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    environment |= {"GIT_OPTIONAL_LOCKS": "0", "GIT_CEILING_DIRECTORIES": str(folder.parent)}
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments], env=environment, capture_output=True, text=True, timeout=30
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _versions() -> dict[str, str]:
    """What was imported says itself, because it may stand in front of what is installed; else the installed one."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        said = getattr(sys.modules.get(name.replace("-", "_")), "__version__", None)
        try:
            found[name] = str(said) if said else metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def _machine() -> Machine:
    gpus = _gpus()
    return Machine(
        cpu=_cpu(),
        gpu=gpus[0] if gpus else None,
        gpus=len(gpus),
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        memory_gb=_memory_gb(),
        os=f"{platform.system()} {platform.release()} {platform.machine()}",
    )


def _cpu() -> str | None:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return platform.processor() or None
    found = re.search(r"^model name\s*:\s*(.+)$", text, flags=re.MULTILINE)
    return found.group(1).strip() if found else platform.machine() or None


def _gpus() -> list[str]:
    """Names of the CUDA devices torch sees, if torch is loaded: importing it only to ask would be slow."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available():
        return []
    return [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]


def _memory_gb() -> float | None:
    sizes: list[int] = []
    with suppress(ValueError, OSError, AttributeError):
        sizes.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    with suppress(ValueError, OSError):  # a container's bound
        sizes.append(int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return round(min(sizes) / 1e9, 1) if sizes else None
