"""What each training stage is: where its batches come from and which loop eats them.

    data = open_data(config, tokenizer)      # reads and checks everything; data.facts is what to record of it
    for report in train(trainer, data): ...

Loss weights, reward and batch sizes are the stage's settings. Test-time training is not here: its documents are
an evaluation's prompts, and it is a context manager (`testtime`).
"""

from __future__ import annotations

from collections.abc import Iterator

from transformers import PreTrainedTokenizerBase

from refine_harness.config import MidConfig, PostConfig, TrainConfig
from refine_harness.data.corpus import Corpus
from refine_harness.data.qa import Examples
from refine_harness.training.trainer import Trainer
from refine_harness.types import StepReport


def open_data(config: TrainConfig, tokenizer: PreTrainedTokenizerBase) -> Corpus | Examples:
    """The data of a stage. Raises DataError or ConfigError for all that can be wrong with it, before any training."""
    if isinstance(config, MidConfig):
        return Corpus(config, tokenizer)
    if isinstance(config, PostConfig):
        return Examples(config, tokenizer)
    raise TypeError(f"{type(config).__name__} names no stage that has data of its own")


def train(trainer: Trainer, data: Corpus | Examples) -> Iterator[StepReport]:
    """Every step from where `trainer` stands to the last one; a report each."""
    return midtrain(trainer, data) if isinstance(data, Corpus) else posttrain(trainer, data)


def midtrain(trainer: Trainer, corpus: Corpus) -> Iterator[StepReport]:
    """Long documents."""
    return trainer.run(corpus.batches(**_share(trainer), workers=corpus.config.data.workers))


def posttrain(trainer: Trainer, examples: Examples) -> Iterator[StepReport]:
    """Nested: each batch's prompts as documents, then one cross-entropy step on its answers."""
    return trainer.run_nested(examples.batches(**_share(trainer)))


def _share(trainer: Trainer) -> dict[str, int]:
    return {"rank": trainer.rank, "world_size": trainer.world_size, "start_batch": trainer.done.batches}
