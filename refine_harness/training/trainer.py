"""The loop: batches of documents in, one report per optimizer step out.

    batch ─► optimizer steps ─► micro-batches ─► refine_step ─► sums ─► one gradient ─► AdamW

Each objective is divided by its own token count over the whole optimizer step, all micro-batches and all
processes, so neither the micro-batch size nor the number of processes changes what is learned. Every draw
belongs to a document (see `row_generators`), for the same reason. `accelerate` carries the process group,
the wrapping for DDP, backward and clipping. Weights that are cut between processes (FSDP, DeepSpeed) are refused: no
checkpoint would be whole.

The trainer knows nothing of disks, logs or scores: whoever consumes the reports does those between two of
them, when everything that `state()` returns is settled. Where batches come from is `stages`.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, TypeVar, cast

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.utils import DistributedType
from torch import Tensor, nn

from refine_harness.algorithm import collect, refine_step
from refine_harness.algorithm.reward import find_reward
from refine_harness.config import Algorithm, PostConfig, TestTimeConfig, TrainConfig
from refine_harness.data.stream import rank_positions
from refine_harness.errors import ConfigError, DataError, RunError
from refine_harness.models import FastWeightLM
from refine_harness.models.load import pick_device
from refine_harness.training.costs import Stopwatch
from refine_harness.training.optim import (
    load_optimizer_tensors,
    lr_at,
    make_optimizer,
    optimizer_tensors,
    set_rate,
    trained_parameters,
)
from refine_harness.types import Batch, Experience, Losses, StepReport

T = TypeVar("T")

CUT = (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM)
"""Ways to work together in which no process has all weights."""


class PromptsAndAnswers(Protocol):
    """A batch of nested post-training: the same examples as bare prompts and as prompts with answers."""

    @property
    def prompts(self) -> Batch: ...
    @property
    def answers(self) -> Batch: ...


@dataclass(frozen=True)
class TrainState:
    """Everything besides the weights that a run needs to go on as if it had never stopped.

    Draws need no state: they are a function of seed, step and document. Data order needs `batches`.
    """

    steps: int = 0
    """Optimizer steps on documents."""
    answer_steps: int = 0
    """Optimizer steps on answers (post-training)."""
    batches: int = 0
    """Whole batches done: the batch that the data must start from."""
    tokens: int = 0
    """Real tokens read by optimizer steps."""
    seconds: float = 0.0
    optimizer: dict[str, Tensor] = field(default_factory=dict)
    """`<parameter name>:<state name>`, on the CPU; with a KL term also `<parameter name>:reference`, the weights that
    training started from."""

    @property
    def optimizer_steps(self) -> int:
        """Of both kinds: the clock of the learning rate, of draws and of checkpoints."""
        return self.steps + self.answer_steps


@dataclass(frozen=True)
class Piece:
    """A micro-batch: documents that go through the model together, and what is theirs."""

    batch: Batch
    documents: Sequence[int]
    """A number for each row that is the same in whatever company the document is read; seeds its draws."""
    algorithm: Algorithm
    experience: Experience | None = None
    """Rollouts sampled earlier; None samples them in the step itself."""

    @property
    def labels(self) -> int:
        """Tokens that next-token prediction is normalised by."""
        return self.batch.labels

    @property
    def actions(self) -> int:
        """Rollout tokens that the policy loss is normalised by."""
        algorithm = self.algorithm
        if algorithm.lambda_rl == 0:
            return 0
        return len(self.batch) * algorithm.chunks * algorithm.rollouts * algorithm.rollout_length


class Objective(nn.Module):
    """`refine_step` and `collect` as one module's forward, so that DDP sees every use of the weights."""

    def __init__(self, model: FastWeightLM, *, bf16: bool, reference: FastWeightLM | None = None) -> None:
        super().__init__()
        self.model = model
        self.bf16 = bf16
        self._unregistered = (reference,)  # in a tuple it is no submodule: never trained or wrapped

    def forward(
        self,
        batch: Batch,
        algorithm: Algorithm,
        rng: list[torch.Generator],
        experience: Experience | None = None,
        collecting: bool = False,
        mark: Callable[[str], None] = lambda part: None,
    ) -> Losses | Experience:
        (reference,) = self._unregistered
        with self.precision():
            if collecting:
                return collect(self.model, batch, algorithm, rng, reference)
            return refine_step(self.model, batch, algorithm, rng, experience, reference, mark)

    def precision(self) -> torch.autocast:
        """What the forward runs under, and whatever is to be computed as it is."""
        return torch.autocast(next(self.model.parameters()).device.type, torch.bfloat16, self.bf16)


class Trainer:
    """Trains `model` in place, on the device it is on.

    `alone`: this process learns by itself even when others run beside it (test-time training).
    With a KL term every process also holds a whole frozen copy of the model as it is now.
    Raises ConfigError when the processes cannot share an optimizer step's documents evenly or were told to cut the
    weights between them, or when there is no such reward.
    """

    def __init__(self, model: FastWeightLM, config: TrainConfig, *, alone: bool = False) -> None:
        self.model = model
        self.config = config
        self.device = next(model.parameters()).device
        # Precision is the config's alone, whatever the launcher was told, so accelerate's own stays off.
        on_cpus = self.device.type == "cpu" and int(os.environ.get("WORLD_SIZE", "1")) > 1
        # Under DDP gradients lie where they are summed over processes, not there as well.
        views = DistributedDataParallelKwargs(gradient_as_bucket_view=True)
        self.accelerator = Accelerator(
            cpu=on_cpus, device_placement=False, mixed_precision="no", kwargs_handlers=[views]
        )
        way = self.accelerator.distributed_type
        if not alone and way in CUT:
            raise ConfigError(
                f"accelerate was told to cut the weights between processes ({way.value}); each must have all of them, "
                "or no checkpoint would be whole. Launch with torchrun, or with accelerate and --multi_gpu alone."
            )
        bf16 = config.autocast == "bf16" or (config.autocast == "auto" and self.device.type == "cuda")
        find_reward(config.algorithm.reward)  # a wrong path is said now
        if config.activation_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        self.reference = _frozen_copy(model) if _has_kl(config.algorithm) else None
        objective = Objective(model, bf16=bf16, reference=self.reference)
        optimizer = make_optimizer(trained_parameters(model).values(), config.optim)
        self.objective: Any
        self.optimizer: Any
        if alone:
            self.world_size, self.rank = 1, 0
            self.objective, self.optimizer = objective, optimizer
        else:
            self.world_size, self.rank = self.accelerator.num_processes, self.accelerator.process_index
            self.objective, self.optimizer = self.accelerator.prepare(objective, optimizer)
        self.parameters = trained_parameters(model)
        self.learned: list[Piece] = []
        """Those of the last optimizer step, with what they learned from."""
        self._done = TrainState()
        self._at_boundary = True
        self._boundaries = (0, 0)  # optimizer steps at the boundary before the last, and at the last
        if not alone:
            self._documents()

    # What there is to do, and how much of it is done.

    @property
    def planned_batches(self) -> int:
        """Batches of the whole run; the last one may be cut short by `steps`."""
        return math.ceil(self.config.steps / self.config.batch.steps)

    @property
    def planned_steps(self) -> int | None:
        """Optimizer steps of the whole run, answer steps included; None where nobody knows (carry-over)."""
        config = self.config
        if isinstance(config, PostConfig):
            return (config.steps if config.nested else 0) + self.planned_batches
        if isinstance(config, TestTimeConfig) and config.restore == "never":
            return None
        return config.steps

    @property
    def done(self) -> TrainState:
        """The counters now (without the optimizer's tensors)."""
        return self._done

    @property
    def finished(self) -> bool:
        """Whether every step of the run is taken."""
        return self._done.batches >= self.planned_batches

    @property
    def at_boundary(self) -> bool:
        """Whether no batch is half done. A run resumes exactly from these points, and only from these."""
        return self._at_boundary

    @property
    def checkpoint_due(self) -> bool:
        """Whether this is the first boundary at or past a multiple of `checkpoint_every`, or the last of the run."""
        if not self._at_boundary:
            return False
        before, now = self._boundaries
        every = self.config.checkpoint_every
        return self.finished or (every > 0 and now // every > before // every)

    def state(self) -> TrainState:
        """A copy of everything besides the weights. Only at a boundary."""
        if not self._at_boundary:
            raise RuntimeError("a batch is half done: its rollouts are part of no TrainState; wait for at_boundary")
        tensors = optimizer_tensors(self.optimizer, self.parameters)
        if self.reference is not None and self._done.optimizer_steps:
            tensors |= _reference_tensors(self.reference, self.parameters)
        return replace(self._done, optimizer=tensors)

    def load(self, state: TrainState) -> None:
        """Go on from `state`; the weights must be those saved with it. Raises RunError when they cannot be."""
        tensors = dict(state.optimizer)
        started_from = {name: tensors.pop(name) for name in state.optimizer if name.endswith(_REFERENCE)}
        load_optimizer_tensors(self.optimizer, self.parameters, tensors)
        if self.reference is not None and state.optimizer_steps:
            _load_reference(self.reference, started_from, self.parameters)
        self._done = replace(state, optimizer={})
        self._at_boundary = True
        self._boundaries = (state.optimizer_steps, state.optimizer_steps)

    # The two loops.

    def run(self, batches: Iterable[Batch]) -> Iterator[StepReport]:
        """Every remaining step, one report each. `batches` starts at batch `done.batches` and holds this
        process's documents of each (`data.stream.rank_positions`). Raises DataError when it ends too soon."""
        for batch in self._remaining(batches):
            yield from self._document_steps(batch, closes_batch=True)

    def run_nested(self, batches: Iterable[PromptsAndAnswers]) -> Iterator[StepReport]:
        """As `run`; each batch is first learned as bare prompts, then its answers are in one cross-entropy step."""
        nested = not isinstance(self.config, PostConfig) or self.config.nested
        plain = self.config.algorithm.model_copy(update={"lambda_rl": 0.0, "lambda_ntp": 1.0})
        for batch in self._remaining(batches):
            if nested:
                yield from self._document_steps(batch.prompts, closes_batch=False)
            pieces = self.pieces(batch.answers, self._documents(), plain)
            report = self.optimizer_step(pieces, answers=True)
            self.close_batch()
            yield report

    def _remaining(self, batches: Iterable[T]) -> Iterator[T]:
        if self.finished:
            return
        for batch in batches:
            yield batch
            if self.finished:
                return
        raise DataError(
            f"the data ended after {self._done.batches} batches of {self.config.batch.sequences} documents; "
            f"the run needs {self.planned_batches}. Lower steps, or give more data."
        )

    def _document_steps(self, batch: Batch, *, closes_batch: bool) -> Iterator[StepReport]:
        config = self.config
        started = time.perf_counter()
        share = config.batch.per_step // self.world_size
        count = min(config.batch.steps, config.steps - self._done.batches * config.batch.steps)
        documents = self._documents()
        if len(batch) != len(documents):
            raise ValueError(f"a batch of {len(batch)} documents where {len(documents)} were expected")
        steps = [
            self.pieces(batch.rows(first, first + share), documents[first : first + share], config.algorithm)
            for first in range(0, count * share, share)
        ]
        for number, pieces in enumerate(self.with_rollouts(steps), start=1):
            report = self.optimizer_step(pieces, started=started)
            if closes_batch and number == count:
                self.close_batch()
            yield report
            started = time.perf_counter()

    def _documents(self) -> list[int]:
        """The run-wide numbers of this process's documents of the present batch."""
        return rank_positions(
            self._done.batches,
            sequences=self.config.batch.sequences,
            steps=self.config.batch.steps,
            rank=self.rank,
            world_size=self.world_size,
        )

    def close_batch(self) -> None:
        """The present batch is done: this is a boundary."""
        self._done = replace(self._done, batches=self._done.batches + 1)
        self._at_boundary = True
        self._boundaries = (self._boundaries[1], self._done.optimizer_steps)

    # What the loops are made of; test-time training uses these, and `close_batch`, directly.

    def pieces(self, batch: Batch, documents: Sequence[int], algorithm: Algorithm) -> list[Piece]:
        """`batch` in micro-batches."""
        micro = self.config.batch.micro
        return [
            Piece(batch.rows(first, first + micro), documents[first : first + micro], algorithm)
            for first in range(0, len(batch), micro)
        ]

    def with_rollouts(self, steps: list[list[Piece]]) -> list[list[Piece]]:
        """The optimizer steps of a batch, with rollouts from the weights as they are now where the config wants that.

        The first step meets these very weights: it samples its own as it reads, which takes no forward of their own.
        """
        if self.config.algorithm.rollouts_from == "step":
            return steps
        return [*steps[:1], *(self.collect(pieces) for pieces in steps[1:])]

    def collect(self, pieces: list[Piece]) -> list[Piece]:
        """The pieces with rollouts sampled from the weights as they are now; unchanged where none are wanted."""
        self.objective.train()
        with torch.no_grad():
            return [
                replace(piece, experience=self._forward(piece, collecting=True))
                if piece.algorithm.lambda_rl > 0
                else piece
                for piece in pieces
            ]

    def optimizer_step(self, pieces: list[Piece], *, answers: bool = False, started: float | None = None) -> StepReport:
        """One gradient over all pieces of all processes, one AdamW step, one report.

        Raises RunError, before the weights change, when the loss or the gradient is not finite.
        """
        started = time.perf_counter() if started is None else started
        config, number = self.config, self._done.optimizer_steps + 1
        labels, actions, tokens = self._over_processes(
            [
                sum(piece.labels for piece in pieces),
                sum(piece.actions for piece in pieces),
                sum(piece.batch.tokens for piece in pieces),
            ]
        )
        rate = lr_at(number - 1, config.optim, self.planned_steps)
        set_rate(self.optimizer, rate)
        self.objective.train()
        self.optimizer.zero_grad(set_to_none=True)
        watch = Stopwatch(self.device)
        told: list[tuple[Tensor, Losses, int]] = []  # free of graphs
        for index, piece in enumerate(pieces):
            synced = index == len(pieces) - 1
            with contextlib.nullcontext() if synced else self.accelerator.no_sync(self.objective):
                losses = self._forward(piece, mark=watch.mark)
                ntp = piece.algorithm.lambda_ntp * losses.ntp_sum / max(labels, 1.0)
                policy = piece.algorithm.lambda_rl * losses.policy_sum / max(actions, 1.0)
                loss = ntp + policy if piece.algorithm.lambda_rl > 0 else ntp
                # DDP averages the processes' gradients; the counts above are already over all of them.
                self.accelerator.backward(loss * self.world_size if self.world_size > 1 else loss)
                watch.mark("backward")
            parts_3 = torch.stack((loss, losses.ntp_sum / max(labels, 1.0), losses.policy_sum / max(actions, 1.0)))
            told.append((parts_3.detach(), losses.detach(), len(piece.batch)))
            del loss, ntp, policy, losses
        self.learned = [
            replace(piece, experience=losses.experience) for piece, (_, losses, _) in zip(pieces, told, strict=True)
        ]
        sums, facts = [0.0, 0.0, 0.0], _Facts()
        for parts_3, losses, documents in told:  # only now: asking for a number waits for the device
            sums = [total + part for total, part in zip(sums, parts_3.tolist(), strict=True)]
            facts.add(losses.facts, documents)
        loss_sum, ntp_loss, policy_loss = self._over_processes(sums)
        self._require_finite("loss", loss_sum, number, rate)
        norm = float(cast(Tensor, self.accelerator.clip_grad_norm_(self.parameters.values(), config.optim.grad_norm)))
        self._require_finite("gradient norm", norm, number, rate)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        watch.mark("optimizer")
        parameters = sum(p.numel() for p in self.parameters.values())
        costs = watch.costs(sum(piece.batch.tokens for piece in pieces), parameters)

        seconds = time.perf_counter() - started
        self._at_boundary = False
        self._done = replace(
            self._done,
            steps=self._done.steps + (not answers),
            answer_steps=self._done.answer_steps + answers,
            tokens=self._done.tokens + int(tokens),
            seconds=self._done.seconds + seconds,
        )
        means = facts.means(self._gathered)
        return StepReport(
            step=number,
            steps=self.planned_steps or 0,
            tokens=int(tokens),
            seconds=seconds,
            loss=loss_sum,
            ntp_loss=ntp_loss,
            policy_loss=policy_loss,
            gradient_norm=norm,
            learning_rate=rate,
            facts={**means, "answer_step": 1.0} if answers else means,
            costs=costs,
        )

    def _forward(self, piece: Piece, *, collecting: bool = False, mark: Callable[[str], None] | None = None) -> Any:
        rng = row_generators(self.config.seed, self._done.optimizer_steps, piece.documents)
        given = (piece.batch.to(self.device), piece.algorithm, rng, piece.experience, collecting)
        return self.objective(*given) if mark is None else self.objective(*given, mark)

    def _over_processes(self, values: list[float]) -> list[float]:
        """Each value summed over the processes."""
        return [sum(column) for column in zip(*self._gathered(values), strict=True)]

    def _gathered(self, values: list[float]) -> list[list[float]]:
        """The values of every process, in order of rank."""
        if self.world_size == 1:
            return [values]
        rows = self.accelerator.gather(torch.tensor([values], dtype=torch.float64, device=self.device))
        return cast(Tensor, rows).tolist()

    def _require_finite(self, what: str, value: float, number: int, rate: float) -> None:
        if math.isfinite(value):
            return
        self.optimizer.zero_grad(set_to_none=True)
        raise RunError(
            f"the {what} of optimizer step {number} is {value}; the step was not taken and the last checkpoint is "
            f"intact. Lower optim.lr (now {rate:g}) or optim.grad_norm, or use a wider dtype, and start again."
        )


def row_generators(seed: int, step: int, documents: Sequence[int]) -> list[torch.Generator]:
    """One CPU generator per document, a function of nothing but these three numbers.

    So a document draws the same positions and rollouts in any micro-batch, on any process, and after a restart.
    """
    generators = []
    for document in documents:
        digest = hashlib.blake2b(f"{seed}/{step}/{document}".encode(), digest_size=8).digest()
        # The CPU generator looks at 32 bits of its seed.
        generators.append(torch.Generator().manual_seed(int.from_bytes(digest[:4], "big")))
    return generators


def training_device(name: str) -> torch.device:
    """Where this process's model belongs: as `models.pick_device`, but each of several processes has its own GPU."""
    device = pick_device(name)
    if device.type == "cuda" and device.index is None and "LOCAL_RANK" in os.environ:
        return torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    return device


_REFERENCE = ":reference"


def _has_kl(algorithm: Algorithm) -> bool:
    return algorithm.lambda_rl > 0 and algorithm.kl_weight > 0


def _frozen_copy(model: FastWeightLM) -> FastWeightLM:
    return copy.deepcopy(model).requires_grad_(False).eval()


def _reference_tensors(reference: FastWeightLM, trained: Iterable[str]) -> dict[str, Tensor]:
    """The reference's weights where they can differ from the model's: copies on the CPU, whole on every process."""
    weights = dict(reference.named_parameters())
    return {f"{name}{_REFERENCE}": weights[name].to("cpu", copy=True) for name in trained}


def _load_reference(reference: FastWeightLM, tensors: dict[str, Tensor], trained: Iterable[str]) -> None:
    """Raises RunError when the tensors are not those of this model."""
    weights = dict(reference.named_parameters())
    for name in trained:
        tensor = tensors.get(f"{name}{_REFERENCE}")
        if tensor is None or tensor.shape != weights[name].shape:
            raise RunError(
                f"the saved state has no weights of {name} to measure the KL from: it was saved with kl_weight = 0 or "
                "of another model. Set algorithm.kl_weight=0, or start in another folder."
            )
        with torch.no_grad():
            weights[name].copy_(tensor)


_EXTREMES = ("_max", "_gap")


class _Facts:
    """What the micro-batches said of themselves, each weighed by its documents; `*_max` and `*_gap` keep the
    largest."""

    def __init__(self) -> None:
        self._sums: dict[str, float] = {}
        self._weights: dict[str, float] = {}

    def add(self, facts: dict[str, float], documents: int) -> None:
        for name, value in facts.items():
            if name.endswith(_EXTREMES):
                self._sums[name] = max(value, self._sums.get(name, -math.inf))
            else:
                self._sums[name] = self._sums.get(name, 0.0) + value * documents
                self._weights[name] = self._weights.get(name, 0.0) + documents

    def means(self, gathered: Callable[[list[float]], list[list[float]]]) -> dict[str, float]:
        """Over all processes; `gathered` gives every process's values."""
        names = sorted(self._sums)
        sums = gathered([self._sums[name] for name in names])
        weights = gathered([self._weights.get(name, 0.0) for name in names])
        return {
            name: max(column) if name.endswith(_EXTREMES) else sum(column) / sum(weight)
            for name, column, weight in zip(names, zip(*sums, strict=True), zip(*weights, strict=True), strict=True)
        }
