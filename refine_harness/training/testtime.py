"""Test-time training: adapt the weights on a prompt, answer it, put everything back (or, by name, keep it).

    with trainer.adapted([prompt]) as adaptation:   # weights have learned from the prompt, eval mode, no gradients
        answer = generate(prompt)
    # weights and optimizer are bit for bit what they were, whatever happened inside

Reads only prompts, never answers. Which prompts, and what is done with the adapted model, is the evaluation's.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby, pairwise

import torch
from torch import Tensor, nn

from refine_harness.config import Algorithm, TestTimeConfig
from refine_harness.data.prompts import prompt_batch
from refine_harness.models import FastWeightLM
from refine_harness.training.trainer import Piece, Trainer, TrainState
from refine_harness.types import StepReport


@dataclass(frozen=True)
class Adaptation:
    """What was done to the weights before an answer."""

    steps: tuple[StepReport, ...] = ()
    prompts: int = 0
    """Prompts given."""
    tokens: int = 0
    """Tokens read by optimizer steps."""
    seconds: float = 0.0
    fewer_chunks: int = 0
    """Prompts too short for all c chunks: learned with as many as fit."""
    without_rollouts: int = 0
    """Prompts too short for two rollouts to compare: learned by next-token prediction alone."""
    skipped: int = 0
    """Prompts of fewer than two tokens: nothing to learn from."""

    @property
    def facts(self) -> dict[str, float]:
        """The counts, for a record; sums of them over prompts mean something."""
        return {
            "optimizer_steps": float(len(self.steps)),
            "prompts": float(self.prompts),
            "tokens": float(self.tokens),
            "seconds": self.seconds,
            "fewer_chunks": float(self.fewer_chunks),
            "without_rollouts": float(self.without_rollouts),
            "skipped": float(self.skipped),
        }


class TestTimeTrainer:
    """Adapts `model` in place; one process by itself, also where others evaluate beside it.

    Trains the parameters that take gradients, or all of them when none does (a model loaded for evaluation).
    With `restore: prompt` it holds one more copy of those.
    """

    __test__ = False  # not a test, whatever pytest makes of the name

    def __init__(self, model: FastWeightLM, config: TestTimeConfig) -> None:
        self.model = model
        self.config = config
        flags = _Flags(model)
        if not any(parameter.requires_grad for parameter in model.parameters()):
            model.requires_grad_(True)
        self._trainer = Trainer(model, config, alone=True)
        self._initial: TrainState = self._trainer.state()
        self._copies: list[Tensor] = []
        self.totals = dict.fromkeys(Adaptation().facts, 0.0)
        """`Adaptation.facts` summed over everything adapted so far."""
        flags.put_back()

    @property
    def state(self) -> TrainState:
        """Counters and optimizer as they are now: with `restore: prompt` always the initial ones outside `adapted`."""
        return self._trainer.state()

    def precision(self) -> torch.autocast:
        """What it learns under; answers belong under the same."""
        return self._trainer.objective.precision()

    @contextmanager
    def adapted(self, prompts: Sequence[Sequence[int]]) -> Iterator[Adaptation]:
        """The model after learning from `prompts` (token ids), in eval mode and without gradients.

        restore: prompt takes one prompt: `config.steps` optimizer steps on it. restore: never takes up to
        `batch.sequences`, cut into `batch.steps` optimizer steps; what they teach stays.
        Modes and `requires_grad` flags are put back either way.
        """
        limit = 1 if self.config.restore == "prompt" else self.config.batch.sequences
        if not 1 <= len(prompts) <= limit:
            raise ValueError(f"{len(prompts)} prompts; restore: {self.config.restore} adapts on 1 to {limit} at once")
        flags = _Flags(self.model)
        restoring = self.config.restore == "prompt"
        if restoring:
            self._keep_weights()
        try:
            with torch.inference_mode(False), torch.enable_grad():
                adaptation = self._adapt(prompts)
            self.totals = {name: total + adaptation.facts[name] for name, total in self.totals.items()}
            self.model.eval()
            with torch.no_grad():
                yield adaptation
        finally:
            if restoring:
                self._put_weights_back()
            flags.put_back()

    def _adapt(self, prompts: Sequence[Sequence[int]]) -> Adaptation:
        started = time.perf_counter()
        config, trainer = self.config, self._trainer
        for parameter in trainer.parameters.values():
            parameter.requires_grad_(True)
        usable = [prompt for prompt in prompts if len(prompt) >= 2]
        reports: list[StepReport] = []
        if usable:
            reports = self._on_one(usable) if config.restore == "prompt" else self._on_several(usable)
        trainer.close_batch()
        fitted = [fit(config.algorithm, len(prompt)) for prompt in usable]
        without = sum(config.algorithm.lambda_rl > 0 and algorithm.lambda_rl == 0 for algorithm in fitted)
        return Adaptation(
            steps=tuple(reports),
            prompts=len(prompts),
            tokens=sum(report.tokens for report in reports),
            seconds=time.perf_counter() - started,
            fewer_chunks=sum(algorithm != config.algorithm for algorithm in fitted) - without,
            without_rollouts=without,
            skipped=len(prompts) - len(usable),
        )

    def _on_one(self, prompts: Sequence[Sequence[int]]) -> list[StepReport]:
        """`steps` optimizer steps on the same prompt; the first samples the rollouts, which the others may keep."""
        pieces, reports = self._pieces(prompts), []
        for _ in range(self.config.steps):
            reports.append(self._trainer.optimizer_step(pieces))
            if self.config.algorithm.rollouts_from == "batch":
                pieces = self._trainer.learned
        return reports

    def _on_several(self, prompts: Sequence[Sequence[int]]) -> list[StepReport]:
        """An optimizer step for each part of the prompts."""
        steps = [self._pieces(part) for part in _parts(prompts, self.config.batch.steps)]
        return [self._trainer.optimizer_step(pieces) for pieces in self._trainer.with_rollouts(steps)]

    def _pieces(self, prompts: Sequence[Sequence[int]]) -> list[Piece]:
        """Micro-batches of prompts that take the same number of chunks."""
        pieces: list[Piece] = []
        for algorithm, group in groupby(prompts, key=lambda prompt: fit(self.config.algorithm, len(prompt))):
            same = list(group)
            pieces += self._trainer.pieces(prompt_batch(same), [_document(prompt) for prompt in same], algorithm)
        return pieces

    def _keep_weights(self) -> None:
        weights = [parameter.detach() for parameter in self._trainer.parameters.values()]
        with torch.inference_mode(False), torch.no_grad():
            if not self._copies:
                self._copies = [torch.empty_like(weight) for weight in weights]
            for copy, weight in zip(self._copies, weights, strict=True):
                copy.copy_(weight)

    def _put_weights_back(self) -> None:
        with torch.inference_mode(False), torch.no_grad():
            for parameter, copy in zip(self._trainer.parameters.values(), self._copies, strict=True):
                parameter.copy_(copy)
                parameter.grad = None
        self._trainer.load(self._initial)


class _Flags:
    """The train/eval mode of every module and the requires_grad of every parameter."""

    def __init__(self, model: nn.Module) -> None:
        self._modes = [(module, module.training) for module in model.modules()]
        self._grads = [(parameter, parameter.requires_grad) for parameter in model.parameters()]

    def put_back(self) -> None:
        for module, training in self._modes:
            module.training = training
        for parameter, requires_grad in self._grads:
            parameter.requires_grad_(requires_grad)


def fit(algorithm: Algorithm, tokens: int) -> Algorithm:
    """`algorithm` for a document of `tokens` tokens: fewer chunks where c of them do not fit.

    A chunk needs a position with k tokens after it (`algorithm.positions`). A prompt with room for less than two
    rollouts in a group has nothing to compare, and is left to next-token prediction.
    """
    if algorithm.lambda_rl == 0:
        return algorithm
    chunks = min(algorithm.chunks, tokens - algorithm.rollout_length)
    if chunks == algorithm.chunks:
        return algorithm
    group = algorithm.rollouts * (chunks if algorithm.group == "document" else 1)
    if chunks < 1 or group < 2:
        return algorithm.model_copy(update={"lambda_rl": 0.0})
    return algorithm.model_copy(update={"chunks": chunks})


def _document(prompt: Sequence[int]) -> int:
    """A number of the prompt itself, so that its rollouts do not depend on when it is asked or by which process."""
    data = ",".join(map(str, prompt)).encode()
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "big")


def _parts(prompts: Sequence[Sequence[int]], count: int) -> list[Sequence[Sequence[int]]]:
    """At most `count` runs of neighbours, as equal as they come, none of them empty."""
    count = min(count, len(prompts))
    edges = [round(part * len(prompts) / count) for part in range(count + 1)]
    return [prompts[first:last] for first, last in pairwise(edges)]
