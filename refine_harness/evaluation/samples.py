"""What was answered, example by example, in one small file beside the record: `samples.parquet`.

A row holds no prompt, which may be long and not ours to give, but its hash and length; the answer as it was given; what
scoring needs to know of the example; and the scores. That is enough to compute every score again without the model
(`rescore`) and to compare two runs on the same examples (`compare`). Parquet with zstd: a needle task of 500 examples
takes some 30 KB at any length, and any parquet reader opens it.

A record has a hash of the rows of each of its tasks, which `read_samples` does not trust but `checked` does compare.
The hash is of what the rows say, not of the file, so that it does not depend on the version of a compressor.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from refine_harness.errors import DataError, RunError
from refine_harness.records import ScoreRecord, canonical_json

if TYPE_CHECKING:
    import pyarrow

SAMPLES = "samples.parquet"
"""Name of the file."""

_FORMAT = "1"
"""Of the file; raised when its columns change their meaning."""


@dataclass(frozen=True)
class Sample:
    """One example, answered and scored."""

    task: str
    """Short name, as in the record."""
    length: int | None
    """Context length in tokens, for tasks that have lengths."""
    doc_id: int
    """Place of the example in its task's data."""
    prompt_sha256: str
    """Of the prompt's text; of several, the first one's."""
    doc_sha256: str
    """Of the example with all its fields, as lm-eval hashes it."""
    output_type: str
    """lm-eval's: generate_until, multiple_choice, loglikelihood or loglikelihood_rolling."""
    answers: tuple[str, ...]
    """What the model gave: one generated text (several, if the task asks for repetitions), or for every continuation
    the JSON of [log-probability in nats, is it the greedy one]."""
    reference: Any
    """JSON. A task of ours: the example without its prompt, all that scoring reads. A stock task, whose data lm-eval
    has: its target."""
    scores: dict[str, Any]
    """Metric -> score, on the task's own scale; for corpus scores, what they are computed from."""
    prompt_tokens: int | None = None
    """Of the whole prompt, whatever was cut."""
    answer_tokens: int | None = None
    """Of the answer's text, or of the scored continuations together."""
    truncated: bool = False
    """Whether the prompt was cut before it was read."""

    @property
    def part(self) -> tuple[str, int | None]:
        return self.task, self.length


def score_name(metric: str, filtered: str, scorer: str | None) -> str:
    """What records call a score.

    Args:
        metric, filtered: lm-eval's names of the metric and of the filter before it.
        scorer: what the task itself calls its score; None where it does not say.
    """
    return scorer or (metric if filtered == "none" else f"{metric},{filtered}")


def as_text(answer: Any) -> str:
    """A generated text as it is, log-probabilities as JSON (which gives back the same bits)."""
    return answer if isinstance(answer, str) else json.dumps(answer)


def plain(value: Any) -> Any:
    """`value` as JSON has it; numbers that are not finite, and what JSON does not know, as text."""
    if type(value).__module__ == "numpy" and hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set):
        return [plain(item) for item in value]
    return value if isinstance(value, str | int | float | bool | None) else str(value)


def samples_sha256(samples: Iterable[Sample]) -> str:
    """Hash of one task's rows, in their order."""
    return hashlib.sha256("\n".join(canonical_json(vars(sample)) for sample in samples).encode()).hexdigest()


def by_part(samples: Iterable[Sample]) -> dict[tuple[str, int | None], list[Sample]]:
    """Rows of every task at every length."""
    parts: dict[tuple[str, int | None], list[Sample]] = {}
    for sample in samples:
        parts.setdefault(sample.part, []).append(sample)
    return parts


def write_samples(samples: Sequence[Sample], folder: str | Path) -> Path:
    """`samples` by task, length and place as `folder/samples.parquet`, whole or not at all; the file's path.

    Raises RunError when the folder cannot be written.
    """
    import pyarrow
    import pyarrow.parquet

    folder = Path(folder)
    path = folder / SAMPLES
    ordered = sorted(samples, key=lambda sample: (sample.task, sample.length or 0, sample.doc_id))
    content = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(_table(ordered), content, compression="zstd", compression_level=9)
    draft: str | None = None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for left in folder.glob(f".{SAMPLES}.*"):  # of an attempt that was killed
            left.unlink(missing_ok=True)
        handle, draft = tempfile.mkstemp(dir=folder, prefix=f".{SAMPLES}.")
        with os.fdopen(handle, "wb") as file:
            file.write(content.getvalue())
            file.flush()
            os.fsync(file.fileno())
        os.chmod(draft, 0o644)
        os.replace(draft, path)
    except OSError as error:
        raise RunError(f"{path} cannot be written ({error.strerror}). Choose another --out.") from None
    finally:
        if draft is not None:
            Path(draft).unlink(missing_ok=True)
    return path


def read_samples(path: str | Path) -> list[Sample]:
    """The rows of a file that `write_samples` wrote. Raises DataError when it is none or cannot be read."""
    import pyarrow
    import pyarrow.parquet

    try:
        with open(path, "rb") as file:
            table = pyarrow.parquet.ParquetFile(file).read()  # read_table would import pandas
    except OSError as error:
        reason = error.strerror or str(error).splitlines()[0]
        raise DataError(f"{path} cannot be read ({reason}). Score the checkpoint again.") from None
    except pyarrow.ArrowException as error:
        raise DataError(
            f"{path} is no parquet file ({str(error).splitlines()[0].rstrip('.')}). Score the checkpoint again."
        ) from None
    if (table.schema.metadata or {}).get(b"refine_samples") != _FORMAT.encode():
        raise DataError(f"{path} holds no answers of ours in a format that this version reads. Score again.")
    columns = {field.name: table.column(field.name).to_pylist() for field in fields(Sample)}
    rows = zip(*columns.values(), strict=True)
    return [_sample(dict(zip(columns, row, strict=True))) for row in rows]


def checked(samples: Sequence[Sample], record: ScoreRecord, path: str | Path) -> list[Sample]:
    """Those of `samples` that `record` rests on. Raises DataError unless its hashes agree."""
    parts = by_part(samples)
    found: dict[tuple[str, int | None], list[Sample]] = {}
    for score in record.scores:
        rows = parts.get((score.task, score.length), [])
        if score.samples_sha256 != samples_sha256(rows):
            where = score.task if score.length is None else f"{score.task} at {score.length} tokens"
            raise DataError(
                f"{path} does not hold the answers that {record.file_name} was made from: those to {where} differ. "
                "Restore the file, or score the checkpoint again."
            )
        found[score.task, score.length] = rows
    return [row for rows in found.values() for row in rows]


def _table(samples: Sequence[Sample]) -> pyarrow.Table:
    import pyarrow as pa

    schema = pa.schema(
        [
            ("task", pa.string()),
            ("length", pa.int32()),
            ("doc_id", pa.int32()),
            ("prompt_sha256", pa.binary(32)),
            ("doc_sha256", pa.binary(32)),
            ("output_type", pa.string()),
            ("answers", pa.list_(pa.string())),
            ("reference", pa.string()),
            ("scores", pa.string()),
            ("prompt_tokens", pa.int32()),
            ("answer_tokens", pa.int32()),
            ("truncated", pa.bool_()),
        ],
        metadata={"refine_samples": _FORMAT},
    )
    rows = [
        {
            **vars(sample),
            "prompt_sha256": bytes.fromhex(sample.prompt_sha256),
            "doc_sha256": bytes.fromhex(sample.doc_sha256),
            "reference": canonical_json(sample.reference),
            "scores": json.dumps(sample.scores),
        }
        for sample in samples
    ]
    return pa.Table.from_pylist(rows, schema=schema)


def _sample(row: dict[str, Any]) -> Sample:
    row["prompt_sha256"] = row["prompt_sha256"].hex()
    row["doc_sha256"] = row["doc_sha256"].hex()
    row["answers"] = tuple(row["answers"])
    row["reference"] = json.loads(row["reference"])
    row["scores"] = json.loads(row["scores"])
    return Sample(**row)
