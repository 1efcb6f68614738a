"""Runs made up from scores, with their records and answers on disk, as scoring writes them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from refine_harness.evaluation import statistics
from refine_harness.evaluation.samples import Sample, by_part, samples_sha256, write_samples
from refine_harness.evaluation.statistics import Estimate
from refine_harness.records import (
    EvaluationFacts,
    GroupScore,
    Machine,
    ModelFacts,
    Provenance,
    ScoreRecord,
    TaskScore,
    write_record,
)


def sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def sample(task: str, length: int | None, doc_id: int, score: float, **changes: Any) -> Sample:
    """One of a needle task: right (1), wrong (0) or a share between."""
    fields: dict[str, Any] = {
        "task": task,
        "length": length,
        "doc_id": doc_id,
        "prompt_sha256": sha256(f"prompt {task} {length} {doc_id}"),
        "doc_sha256": sha256(f"doc {task} {length} {doc_id}"),
        "output_type": "generate_until",
        "answers": (f"The number is {doc_id}." if score else "Ünknown\n",),
        "reference": {"answers": [str(doc_id)], "index": doc_id, "length": length, "tokens": 500},
        "scores": {"string_match_all": score},
        "prompt_tokens": 480,
        "answer_tokens": 5,
        "truncated": False,
    }
    return Sample(**{**fields, **changes})


def make_run(
    out: Path,
    parts: Mapping[Any, Sequence[float]],
    *,
    weights: str | None = None,
    samples: Sequence[Sample] | None = None,
    group: str = "niah",
    by_size: bool = False,
    rehash: bool = False,
    **changes: Any,
) -> ScoreRecord:
    """A run folder as `refine eval --out` leaves it, with one group over all tasks of a length; its record.

    Args:
        parts: scores of the examples of each (task, length); or `samples` in their place.
        rehash: put the hashes of `samples` into `scores`, which then come ready-made.
        changes: other fields of the record.
    """
    if samples is None:
        samples = [
            sample(task, length, i, score) for (task, length), scores in parts.items() for i, score in enumerate(scores)
        ]
    hashes = {part: samples_sha256(rows) for part, rows in by_part(samples).items()}
    if rehash:
        given = changes.pop("scores")
        changes["scores"] = tuple(
            score.model_copy(update={"samples_sha256": hashes[score.task, score.length]}) for score in given
        )
    scores: list[TaskScore] = []
    for (task, length), rows in by_part(samples).items() if not rehash else ():
        value, stderr = statistics.percent([row.scores["string_match_all"] for row in rows])
        scores.append(
            TaskScore(
                task=task,
                group=group,
                metric="string_match_all",
                length=length,
                value=value,
                stderr=stderr,
                n=len(rows),
                samples_sha256=hashes[task, length],
            )
        )
    groups: list[GroupScore] = []
    for length in dict.fromkeys(score.length for score in scores):
        members = [score for score in scores if score.length == length]
        sizes = [score.n or 0 for score in members]
        value, stderr = statistics.combined(
            [Estimate(score.value, score.stderr) for score in members], sizes if by_size else None
        )
        n = sum(sizes)
        groups.append(
            GroupScore(
                group=group, length=length, value=value, stderr=stderr, n_tasks=len(members), n=n, by_size=by_size
            )
        )
    fields: dict[str, Any] = {
        "source": "measured",
        "name": out.name,
        "label": out.name,
        "stage": "base",
        "method": "none",
        "model": ModelFacts(name="tiny", model_type="delta_net", weights_sha256=sha256(weights or out.name)),
        "evaluation": EvaluationFacts(
            backend="refine", tasks=("niah",), lengths=(512,), seed=42, dtype="float32", device="cpu", batch_size=8
        ),
        "scores": tuple(scores),
        "groups": tuple(groups),
        "seconds": 1.0,
        "provenance": Provenance(
            versions={"python": "3.11.0"},
            machine=Machine(),
            command="refine eval",
            date="2026-01-02T03:04:05Z",
            seed=0,
        ),
    }
    record = ScoreRecord(**{**fields, **changes})
    folder = out / "scores" / record.id[:12]
    write_samples(samples, folder)
    write_record(record, folder)
    write_record(record, out / "records")
    return record
