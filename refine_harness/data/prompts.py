"""Test-time training: evaluation prompts as documents of their own.

A prompt is what the model is about to answer: its token ids, with whatever first token the evaluation put
there. Nothing is added and nothing is cut here, so what is learned from is exactly what is read before answering.
"""

from __future__ import annotations

from collections.abc import Sequence

from refine_harness.data.batches import right_padded
from refine_harness.errors import DataError
from refine_harness.types import Batch


def prompt_batch(prompts: Sequence[Sequence[int]], pad: int = 0) -> Batch:
    """One row for each prompt, in order, right-padded with `pad`. Raises DataError for no prompt or an empty one."""
    if not prompts:
        raise DataError("there is no prompt to adapt on. Give at least one.")
    for place, prompt in enumerate(prompts):
        if len(prompt) == 0:
            raise DataError(f"prompt {place} has no token to adapt on. Leave it out, or give it a first token.")
    return right_padded(prompts, pad)
