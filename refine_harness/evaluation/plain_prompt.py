"""lm-eval tasks whose prompts stay as they are, whatever chat template the model is scored with.

LongBench gives trec, triviaqa, samsum, lsht, lcc and repobench-p to chat models without their template, because they
are texts to be continued. lm-eval applies a template to all tasks of a run or to none; a YAML with `class:
PlainPrompt` is left out, with any model and from any of lm-eval's doors.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lm_eval.api.task import ConfigurableTask


class PlainPrompt(ConfigurableTask):
    """A task made from its YAML alone, as all others are, but for the chat template and the system instruction."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__(config={key: value for key, value in config.items() if key != "class"})

    def fewshot_context(
        self,
        doc: dict,
        num_fewshot: int,
        system_instruction: str | None = None,
        apply_chat_template: bool = False,
        fewshot_as_multiturn: bool = False,
        chat_template: Callable[..., str] | None = None,
        gen_prefix: str | None = None,
    ) -> str | list[str]:
        return super().fewshot_context(doc, num_fewshot, gen_prefix=gen_prefix)
