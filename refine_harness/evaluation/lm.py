"""Fast-weight models as lm-eval models: `refine`, and `refine-ttt`, which adapts before it answers.

How they differ from lm-eval's `hf`:

- A prompt has no longest length. `max_length` sets one (prompt plus answer, in tokens); longer prompts then
  lose their middle, as LongBench cuts them, or meet another policy that is named, and are counted: nothing is
  shortened silently.
- Prompts are read in pieces with constant memory; what several begin with is read once, and so is a context for all
  its continuations; answers are decoded from the state. Padding never enters a state.
- Rolling log-likelihoods stream the whole document through the state: there are no disjoint windows, so every
  token is predicted from everything before it, whatever `max_length` says.
- Several processes (accelerate launch, torchrun) share the requests among themselves and each knows all answers;
  to lm-eval they are one, because its own way hands out documents by turns, which parts tasks with several
  metrics (one per length, say) so that it cannot join them again. All must make the same calls.
- `cache_dir` keeps every answer as it comes, under a key made of the weights and settings; the same command
  goes on after an interruption. (lm-eval's own `use_cache` keys by the request alone: give each model its own.)

Requests are answered in portions that depend on nothing but the requests and the settings (`plan.py`), each by one
process and kept as a whole: the same command gives the same scores, bit for bit, interrupted or not, with one process
or several of the same kind. On a GPU that takes kernels whose tuning is the same each time (`refine kernels tune`).

Registration under these names is elsewhere; this file registers nothing when imported.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import time
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM

from refine_harness.config import TestTimeConfig, load
from refine_harness.errors import ConfigError, ModelError, TaskError, suggest
from refine_harness.evaluation.answers import BUDGET, PIECE, Answerer, Decoding
from refine_harness.evaluation.cache import ResponseCache, request_key
from refine_harness.evaluation.plan import portions, shares
from refine_harness.evaluation.prefixes import as_tokens
from refine_harness.training.testtime import Adaptation, TestTimeTrainer

log = logging.getLogger(__name__)

Truncation = Literal["middle", "left", "error", "none"]
"""What happens to a prompt that leaves no room for its answer within max_length: its middle is left out
(LongBench's way), its start is left out (lm-eval's `hf`'s way), an error, or nothing (it is read whole)."""

Progress = Callable[[int, int], None]
"""Called with requests answered so far and requests in all."""

TASK_METADATA = ("data", "data_dir", "lengths", "max_seq_lengths", "samples", "limit", "essays")
"""Keys of `model_args` that lm-eval hands to tasks as well, which the model therefore lets pass."""

DECODED = 64
"""Prompts whose answers are decoded together where the batch size is auto."""
AUTO_TOKENS = {"cuda": 2**21, "cpu": 2**16}
"""Most tokens of a portion there: what an interruption can cost."""
_ENCODED = 256
"""Texts that the tokenizer is given at once."""


@dataclass(frozen=True)
class _Request:
    """One request whose answer is still to come."""

    index: int
    over: bool
    """Whether its prompt is longer than max_length allows."""
    continuation: Sequence[int] = ()
    decoding: Decoding | None = None


@dataclass(frozen=True)
class _Prompt:
    """What is read, and the requests that go on from there: a question, or all continuations of a context."""

    tokens: Sequence[int]
    """Compact (an array of C ints): thousands of long prompts wait at once."""
    requests: list[_Request]

    @property
    def cost(self) -> int:
        """Tokens to read for all of them."""
        return len(self.tokens) + sum(len(request.continuation) for request in self.requests)

    @property
    def kind(self) -> int:
        """Prompts of one portion have answers of the same greatest length, so that their rows end together."""
        decoding = self.requests[0].decoding
        return 0 if decoding is None else decoding.max_tokens


@dataclass(frozen=True)
class _Result:
    index: int
    value: Any
    over: bool
    facts: dict[str, float] = field(default_factory=dict)
    """Of the adaptation that came before this answer, if this is the first answer after it."""
    seconds: float = 0.0
    """What this answer took, and those that were found together with it, if this is the first of them."""


class RefineLM(TemplateLM):
    """A fast-weight model behind lm-eval's interface.

    Args:
        pretrained: a model folder, the name of an embedded model or a hub id; None when `model` is given.
        device: "auto", "cpu", "cuda" or "cuda:N". CUDA falls back to the CPU where there is none, with a
            warning, because lm-eval's command line asks for "cuda:0" unless told otherwise.
        dtype: "auto" (bfloat16 on CUDA, float32 on a CPU), "float32", "float64" or "bfloat16".
        batch_size: prompts answered at once; a number, also as text, or "auto": as many as keep the device busy,
            by their tokens. Scores do not depend on it, but for rounding.
        max_batch_size: accepted because lm-eval passes it; unused.
        max_length: longest prompt plus answer in tokens, the begin token not counted; None for no bound.
        truncation: see `Truncation`.
        add_bos: start every prompt with the tokenizer's beginning-of-text token. None: where the model and its
            tokenizer have one.
        piece: tokens of a prompt that are read at once.
        batch_tokens: tokens of all prompts that are read at once, whatever the batch size; bounds memory.
        seed: of sampled answers (tasks that ask for sampling); each has its own stream.
        cache_dir: folder in which answers are kept.
        progress: told how far it is; None shows tqdm's bar.
        model: a loaded model, used as it is, with its tokenizer; device and dtype are then the model's.
        tokenizer: that tokenizer; or, without `model`, where to load another one than the model's own from.
        metadata: keys of `TASK_METADATA`, which are for the tasks and pass unused.
    """

    backend = "causal"

    def __init__(
        self,
        pretrained: str | Path | None = None,
        *,
        device: str | None = "auto",
        dtype: str = "auto",
        batch_size: int | str | None = "auto",
        max_batch_size: int | str | None = None,
        max_length: int | None = None,
        truncation: Truncation = "middle",
        add_bos: bool | None = None,
        piece: int = PIECE,
        batch_tokens: int = BUDGET,
        seed: int = 0,
        cache_dir: str | Path | None = None,
        progress: Progress | None = None,
        model: Any = None,
        tokenizer: Any = None,
        **metadata: Any,
    ) -> None:
        super().__init__()
        del max_batch_size
        for key in metadata:
            if key not in TASK_METADATA:
                known = ("pretrained", "dtype", "max_length", "truncation", "add_bos", "seed", "cache_dir")
                known += ("piece", "batch_tokens", *TASK_METADATA)
                raise ConfigError(f"{key} is not an argument of this model.{suggest(key, known)}")
        if truncation not in get_args(Truncation):
            raise ConfigError(f"truncation = {truncation!r}; expected one of {', '.join(get_args(Truncation))}.")
        self.process, self.processes = _processes()
        if model is None:
            if pretrained is None:
                raise ModelError("No model is named. Pass pretrained=<folder, embedded name or hub id>.")
            from refine_harness.models import load_model

            target = resolve_device(device)
            model, own = load_model(str(pretrained), device=target, dtype=dtype)
            tokenizer = own if tokenizer is None else _tokenizer(str(tokenizer), model)
        elif tokenizer is None or isinstance(tokenizer, str):
            raise ModelError("A loaded model came without its tokenizer. Pass both.")
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.pretrained = None if pretrained is None else str(pretrained)
        self._device = next(model.parameters()).device
        self._max_length = None if max_length is None else int(max_length)
        self.truncation: Truncation = truncation
        has_bos = tokenizer.bos_token_id is not None
        self.add_bos = has_bos and (model.config.bos_token_id is not None if add_bos is None else bool(add_bos))
        self.seed = int(seed)
        self._asked_size = _batch_size(batch_size)
        self.answerer = Answerer(
            self.model,
            tokenizer,
            piece=_positive("piece", piece),
            budget=_positive("batch_tokens", batch_tokens),
            rows=self._asked_size,
        )
        self.over_long: Counter[str] = Counter()
        """Examples of each task whose prompt leaves no room for its answer within max_length."""
        self.truncated: Counter[str] = Counter()
        """Examples of each task whose prompt was shortened for that."""
        self.shortened: set[tuple[str, int | None]] = set()
        """The same as (task, doc_id)."""
        self._over: set[tuple[str, int | None]] = set()
        self.adaptation: dict[str, float] = {}
        """What test-time training did, summed over all answers, kept ones included; empty without it."""
        self.seconds = 0.0
        """What all answers took, adaptation included; of kept ones, what they took when they were found. With
        several processes, the mean over them."""
        self.prompt_tokens: dict[str, int] = {}
        """Tokens, without special ones, of the prompts that answers were generated to: of the whole text, whatever
        was cut. Those whose answers were all kept need not be here."""
        self._progress = progress
        self._cache = None
        if cache_dir is not None and self.cacheable:
            self._cache = ResponseCache(cache_dir, self._identity())

    # What lm-eval asks of a model ---------------------------------------------------------------

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """What an empty context becomes: the beginning-of-text token, else the end-of-text token."""
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else bos

    @property
    def max_length(self) -> int | None:
        """Longest prompt plus answer; None, because a recurrent state has no longest input."""
        return self._max_length

    @property
    def max_gen_toks(self) -> int:
        return Decoding.max_tokens

    @property
    def batch_size(self) -> int:
        """Prompts answered at once, at most."""
        return self._asked_size or min(DECODED, self.answerer.rows)

    @property
    def batch_sizes(self) -> dict[int, int]:
        return {0: self.batch_size}

    @property
    def config(self) -> Any:
        return self.model.config

    @property
    def device(self) -> torch.device:
        return self._device

    @property
    def tokenizer_name(self) -> str:
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Token ids; starts with the beginning-of-text token (once) if `add_bos`, unless told otherwise."""
        tokens = self.tokenizer.encode(string, add_special_tokens=False, verbose=False)
        wanted = self.add_bos if add_special_tokens is None else add_special_tokens and self.add_bos
        bos = self.tokenizer.bos_token_id
        return [bos, *tokens] if wanted and tokens[:1] != [bos] else tokens

    def tok_decode(self, tokens: Sequence[int], skip_special_tokens: bool = True) -> str:
        return self.tokenizer.decode(list(tokens), skip_special_tokens=skip_special_tokens)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The conversation in the tokenizer's template; a last assistant turn is left open to be continued."""
        if self.tokenizer.chat_template is None:
            raise ModelError("The tokenizer has no chat template. Score this model without --apply_chat_template.")
        return self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )

    def get_model_info(self) -> dict[str, Any]:
        """What lm-eval writes beside the results."""
        return {
            "model_num_parameters": sum(p.numel() for p in self.model.parameters()),
            "model_dtype": str(self._dtype),
            "model_max_length": self.max_length,
            "truncation": self.truncation,
            "over_long": dict(self.over_long),
            "truncated": dict(self.truncated),
            "add_bos": self.add_bos,
        }

    # The three kinds of request -----------------------------------------------------------------

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Answers to (prompt, generation settings), in order. Raises TaskError on settings we do not have."""
        decodings = self._decodings(requests)
        keys = [
            request_key("generate_until", (*request.args, decoding.seed))
            for request, decoding in zip(requests, decodings, strict=True)
        ]

        def prompts(chosen: Sequence[int]) -> list[_Prompt]:
            found = []
            texts = [requests[index].args[0] for index in chosen]
            for index, tokens in zip(chosen, self._encoded(texts, counts=self.prompt_tokens), strict=True):
                decoding = decodings[index]
                tokens = tokens or array("i", [self.prefix_token_id])
                tokens, over = self._fit(tokens, decoding.max_tokens, _task(requests[index]))
                found.append(_Prompt(tokens, [_Request(index, over, decoding=decoding)]))
            return found

        return self._answer("generate_until", requests, keys, prompts, self._generate, disable_tqdm)

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """(log-probability, is it the greedy answer) of every (context, continuation), in order."""
        keys = [request_key("loglikelihood", request.args) for request in requests]

        def prompts(chosen: Sequence[int]) -> list[_Prompt]:
            pairs: Any = [requests[index].args for index in chosen]
            return self._contexts(chosen, self._encoded_pairs(pairs), [_task(requests[index]) for index in chosen])

        results = self._answer("loglikelihood", requests, keys, prompts, self._score, disable_tqdm)
        return [(logprob, greedy) for logprob, greedy in results]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-probability of every (document,) after the beginning-of-text token, read as one stream, in order."""
        keys = [request_key("loglikelihood_rolling", request.args) for request in requests]

        def prompts(chosen: Sequence[int]) -> list[_Prompt]:
            begin = array("i", [self.prefix_token_id])
            texts = self._encoded([requests[index].args[0] for index in chosen], begun=False)
            return [_Prompt(begin, [_Request(index, False, text)]) for index, text in zip(chosen, texts, strict=True)]

        def answer(prompts: Sequence[_Prompt]) -> list[_Result]:
            return [replace(result, value=result.value[0]) for result in self._score(prompts)]

        return self._answer("loglikelihood_rolling", requests, keys, prompts, answer, disable_tqdm)

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """As `loglikelihood`, of tokens, for callers of lm-eval's template."""
        pairs = [
            (array("i", context or [self.prefix_token_id]), array("i", continuation))
            for _, context, continuation in requests
        ]
        prompts = self._contexts(range(len(pairs)), pairs, ["?"] * len(pairs))
        portions = ([prompts[i] for i in portion] for portion in self.plan(prompts))
        values = {result.index: result.value for portion in portions for result in self._score(portion)}
        return [values[index] for index in range(len(pairs))]

    # How they are answered ----------------------------------------------------------------------

    @property
    def cacheable(self) -> bool:
        """Whether an answer depends on its request alone, so that it may be kept."""
        return True

    def adapted(self, prompts: Sequence[Sequence[int]]) -> AbstractContextManager[Adaptation | None]:
        """The model as it answers these prompts; here, as it is."""
        return contextlib.nullcontext()

    def plan(self, prompts: Sequence[_Prompt]) -> list[list[int]]:
        """Which prompts, by index, are answered by one `adapted` model and kept together, in what order."""
        generating = any(request.decoding is not None for prompt in prompts for request in prompt.requests)
        automatic = self._asked_size is None
        return portions(
            [as_tokens(prompt.tokens) for prompt in prompts],
            [prompt.cost for prompt in prompts],
            [prompt.kind for prompt in prompts],
            rows=self.batch_size if generating or not automatic else self.answerer.rows,
            tokens=AUTO_TOKENS.get(self.device.type, AUTO_TOKENS["cpu"]) if automatic else None,
        )

    def _generate(self, prompts: Sequence[_Prompt]) -> list[_Result]:
        """The answers of one portion."""
        texts = [prompt.tokens for prompt in prompts]
        with self.adapted(texts) as adaptation:
            decodings = [decoding for prompt in prompts if (decoding := prompt.requests[0].decoding) is not None]
            answers = self.answerer.generate(texts, decodings)
        results = [
            _Result(prompt.requests[0].index, answer.text, prompt.requests[0].over)
            for prompt, answer in zip(prompts, answers, strict=True)
        ]
        return _with_facts(results, adaptation)

    def _score(self, prompts: Sequence[_Prompt]) -> list[_Result]:
        """The same for continuations of contexts."""
        texts = [prompt.tokens for prompt in prompts]
        with self.adapted(texts) as adaptation:
            continuations = [[request.continuation for request in prompt.requests] for prompt in prompts]
            scores = self.answerer.score(texts, continuations)
        results = [
            _Result(request.index, score, request.over)
            for prompt, group in zip(prompts, scores, strict=True)
            for request, score in zip(prompt.requests, group, strict=True)
        ]
        return _with_facts(results, adaptation)

    def _answer(
        self,
        method: str,
        requests: Sequence[Instance],
        keys: Sequence[str],
        prompts: Callable[[Sequence[int]], list[_Prompt]],
        answer: Callable[[Sequence[_Prompt]], list[_Result]],
        quiet: bool,
    ) -> list[Any]:
        """One value per request, in order: kept answers, and those of the portions of which one is missing.

        Requests with equal keys are answered once, unless answers depend on their order.
        """
        if self.processes > 1 and self.cache_hook.dbdict is not None:
            raise ConfigError("lm-eval's use_cache does not work with several processes. Use cache_dir instead.")
        same: dict[int, list[int]] = {}
        first: dict[str, int] = {}
        for index, key in enumerate(keys):
            same.setdefault(first.setdefault(key, index) if self.cacheable else index, []).append(index)
        kept = self._kept({index: keys[index] for index in same})
        mine = self._mine(prompts(list(same)), kept) if len(kept) < len(same) else []
        anew = {request.index for portion in mine for prompt in portion for request in prompt.requests}
        done: list[_Result] = []
        if not self.process:  # what others answer again, they tell
            done = [result for index, result in kept.items() if index not in anew]
        with self._bar(method, sum(len(same[i]) for i in {*anew, *(r.index for r in done)}), quiet) as tick:
            tick(sum(len(same[result.index]) for result in done))
            for portion in mine:
                started = time.perf_counter()
                results = answer(portion)
                results[0] = replace(results[0], seconds=time.perf_counter() - started)
                self._keep(method, requests, keys, results)
                done += results
                tick(sum(len(same[result.index]) for result in done))
        found: dict[int, _Result] = {}
        for part in self._everyones(done):  # the first process's first, so that new answers stand in for kept ones
            found.update((result.index, result) for result in part)
        before = self.over_long.copy()
        for result in found.values():
            self._count(result, [requests[index] for index in same[result.index]])
        self._warn(self.over_long - before)
        values: list[Any] = [None] * len(requests)
        for index, others in same.items():
            for other in others:
                values[other] = found[index].value
        return values

    def _kept(self, keys: dict[int, str]) -> dict[int, _Result]:
        """Answers that were kept, by request: every process knows what the first one sees."""
        kept = None
        if self._cache is not None and not self.process:
            cache = self._cache
            kept = {index: value for index, key in keys.items() if (value := cache.get(key)) is not None}
        if self.processes > 1:
            shared = [kept]
            torch.distributed.broadcast_object_list(shared)
            kept = shared[0]
        return {index: _Result(index, *value) for index, value in (kept or {}).items()}

    def _mine(self, prompts: list[_Prompt], kept: dict[int, _Result]) -> list[list[_Prompt]]:
        """The portions that this process answers: its share of those of which an answer is missing."""
        planned = [[prompts[i] for i in portion] for portion in self.plan(prompts)]
        missing = [
            portion
            for portion in planned
            if any(request.index not in kept for prompt in portion for request in prompt.requests)
        ]
        if len(missing) < self.processes and not self.process:
            log.warning(
                "%d portions of work for %d processes: some have nothing to do. A smaller batch size makes more.",
                len(missing),
                self.processes,
            )
        costs = [sum(prompt.cost for prompt in portion) for portion in missing]
        return [missing[i] for i in shares(costs, self.processes)[self.process]]

    def _everyones(self, results: list[_Result]) -> list[list[_Result]]:
        """The results of every process, in every process."""
        if self.processes == 1:
            return [results]
        parts: list[Any] = [None] * self.processes
        torch.distributed.all_gather_object(parts, results)
        return parts

    def _keep(self, method: str, requests: Sequence[Instance], keys: Sequence[str], results: list[_Result]) -> None:
        if self._cache is not None:
            self._cache.put({keys[r.index]: [r.value, r.over, r.facts, r.seconds] for r in results})
        if self.cacheable:
            for result in results:
                self.cache_hook.add_partial(method, requests[result.index].args, result.value)

    def _count(self, result: _Result, requests: Sequence[Instance]) -> None:
        self.seconds += result.seconds / self.processes
        for name, value in result.facts.items():
            self.adaptation[name] = self.adaptation.get(name, 0.0) + value
        for request in requests if result.over else ():
            example = (_task(request), request.doc_id)
            if example in self._over:
                continue
            self._over.add(example)
            self.over_long[example[0]] += 1
            if self.truncation != "none":
                self.shortened.add(example)
                self.truncated[example[0]] += 1

    def _warn(self, over: Counter[str]) -> None:
        if over and not self.process:
            became = {"middle": "lost their middle", "left": "lost their start"}.get(self.truncation, "were read whole")
            what = ", ".join(f"{task} {count}" for task, count in sorted(over.items()))
            log.warning("prompts longer than max_length = %s tokens %s: %s", self.max_length, became, what)

    @contextlib.contextmanager
    def _bar(self, method: str, total: int, quiet: bool) -> Iterator[Callable[[int], None]]:
        """A function to be told how many requests are answered."""
        if self.process or (quiet and self._progress is None):
            yield lambda done: None
        elif self._progress is not None:
            progress = self._progress
            yield lambda done: progress(done, total)
        else:
            from tqdm import tqdm

            with tqdm(total=total, desc=method) as bar:
                started = False

                def tick(done: int) -> None:
                    nonlocal started
                    if not started:  # kept answers took no time: the time left is not told from them
                        bar.initial, started = done, True
                    bar.update(done - bar.n)

                yield tick

    # Tokens -------------------------------------------------------------------------------------

    def _encoded(
        self, texts: Sequence[str], *, begun: bool = True, counts: dict[str, int] | None = None
    ) -> list[array[int]]:
        """The tokens of many texts, each as `tok_encode` has them; begun: with its begin token, if `add_bos`.

        `counts` is filled in: how many tokens each text has by itself.
        """
        different = list(dict.fromkeys(texts))
        of_text: dict[str, array[int]] = {}
        bos = self.tokenizer.bos_token_id
        for start in range(0, len(different), _ENCODED):
            part = different[start : start + _ENCODED]
            encoded = self.tokenizer(part, add_special_tokens=False, return_attention_mask=False, verbose=False)
            for text, tokens in zip(part, encoded["input_ids"], strict=True):
                begin = [bos] if begun and self.add_bos and tokens[:1] != [bos] else []
                of_text[text] = array("i", [*begin, *tokens])
                if counts is not None:
                    counts[text] = len(tokens)
        return [of_text[text] for text in texts]

    def _encoded_pairs(self, pairs: Sequence[tuple[str, str]]) -> list[tuple[array[int], array[int]]]:
        """The tokens of contexts and continuations, split as lm-eval's template splits them.

        Space at a context's end belongs to the continuation, and a continuation's tokens are those that the whole
        text has beyond its context's.
        """
        moved = [(context.rstrip(), context[len(context.rstrip()) :] + after) for context, after in pairs]
        contexts = self._encoded([before for before, _ in moved])
        wholes = self._encoded([before + after for before, after in moved])
        found = []
        for (context, after), before, whole in zip(pairs, contexts, wholes, strict=True):
            if context == "":
                [whole] = self._encoded([after], begun=False)
                before = whole[: int(whole[:1] == array("i", [self.prefix_token_id]))]
            found.append((before or array("i", [self.prefix_token_id]), whole[len(before) :]))
        return found

    def _contexts(
        self, indices: Sequence[int], pairs: Sequence[tuple[array[int], array[int]]], tasks: Sequence[str]
    ) -> list[_Prompt]:
        """A prompt for each context, with its continuations.

        It is cut so that the longest of them fits: rivals are judged after the same words.
        """
        members: dict[bytes, list[int]] = {}
        for i, (context, _) in enumerate(pairs):
            members.setdefault(bytes(context), []).append(i)
        prompts: dict[bytes, _Prompt] = {}
        for group in members.values():
            longest = max(len(pairs[i][1]) for i in group)
            tokens, over = self._fit(pairs[group[0]][0], longest, tasks[group[0]])
            prompt = prompts.setdefault(bytes(tokens), _Prompt(tokens, []))
            prompt.requests.extend(_Request(indices[i], over, pairs[i][1]) for i in group)
        return list(prompts.values())

    def _fit(self, tokens: array[int], answer: int, task: str) -> tuple[array[int], bool]:
        """The prompt with room left for `answer` tokens within max_length, and whether it had too little.

        The begin token is not counted, and stays: tasks fill prompts to a length without it.
        """
        begun = int(tokens[0] == self.tokenizer.bos_token_id)
        first, body = tokens[:begun], tokens[begun:]
        if self.max_length is None or len(body) + answer <= self.max_length:
            return tokens, False
        if self.truncation == "none":
            return tokens, True
        room = self.max_length - answer
        if room < 2:
            raise TaskError(
                f"max_length = {self.max_length} leaves no room for a prompt of {task}, whose answers take {answer} "
                f"tokens. Raise max_length."
            )
        if self.truncation == "error":
            raise TaskError(
                f"a prompt of {task} has {len(body)} tokens and its answer takes {answer}, more than max_length = "
                f"{self.max_length}. Raise max_length, or let prompts be cut with truncation=middle."
            )
        if self.truncation == "left":
            return first + body[-room:], True
        head = room // 2
        return first + body[:head] + body[head - room :], True

    def _decodings(self, requests: Sequence[Instance]) -> list[Decoding]:
        """How each answer is decoded; repeated requests for samples get samples of their own."""
        seen: Counter[str] = Counter()
        decodings = []
        for request in requests:
            arguments: Any = request.args
            decoding = parse_generation(arguments[1], _task(request))
            if decoding.temperature:
                key = request_key("sample", (self.seed, *request.args, _task(request), request.doc_id))
                decoding = _seeded(decoding, f"{key}{seen[key]}")
                seen[key] += 1
            decodings.append(decoding)
        return decodings

    # Identity -----------------------------------------------------------------------------------

    @property
    def _dtype(self) -> torch.dtype:
        return next(self.model.parameters()).dtype

    def _identity(self) -> dict[str, Any]:
        """What all answers of this model depend on, besides the request."""
        from refine_harness.checkpoint import weights_sha256

        return {
            "weights": weights_sha256(self.model),
            "tokenizer": tokenizer_sha256(self.tokenizer),
            "dtype": str(self._dtype),
            "max_length": self.max_length,
            "truncation": self.truncation,
            "add_bos": self.add_bos,
        }


class RefineTTTLM(RefineLM):
    """`RefineLM` that trains on each prompt before it answers (test-time training).

    `restore: prompt` adapts on one prompt at a time and puts the weights and optimizer back after its answer;
    the continuations of one context share its adaptation. `restore: never` adapts on `batch.sequences` prompts
    at a time, in the order of the requests, and keeps what was learned: its answers depend on that order, so
    they are never kept for a later run, and one process answers them all.

    Rolling log-likelihoods have no prompt to adapt on and are refused.

    Args:
        config: settings of test-time training: a TestTimeConfig or the path of a YAML file.
        dtype: "auto" is the settings' (float32): small steps vanish in bfloat16 weights.
        settings: further `RefineLM` arguments, and settings such as `steps=4` or `optim.lr=1e-5`, which win
            over the file's.
    """

    def __init__(
        self,
        pretrained: str | Path | None = None,
        *,
        config: TestTimeConfig | str | Path | None = None,
        dtype: str = "auto",
        **settings: Any,
    ) -> None:
        # `device` is the model's alone, though the settings have one too.
        names = [key for key in settings if key != "device" and key.split(".")[0] in TestTimeConfig.model_fields]
        overrides = [f"{name}={json.dumps(settings.pop(name))}" for name in names]
        if not isinstance(config, TestTimeConfig):
            self.test_time = load(TestTimeConfig, config, overrides)
        elif overrides:
            raise ConfigError(f"{overrides[0]} is given beside a TestTimeConfig object. Set it in the object.")
        else:
            self.test_time = config
        dtype = self.test_time.dtype if dtype == "auto" else dtype
        super().__init__(pretrained, dtype=dtype, seed=self.test_time.seed, **settings)
        if self.test_time.restore == "never" and self.processes > 1:
            raise ConfigError("restore: never carries weights from prompt to prompt, so it runs in one process only.")
        self._trainer = TestTimeTrainer(self.model, self.test_time)

    @property
    def cacheable(self) -> bool:
        return self.test_time.restore == "prompt"

    def plan(self, prompts: Sequence[_Prompt]) -> list[list[int]]:
        size = 1 if self.test_time.restore == "prompt" else self.test_time.batch.sequences
        return [list(range(start, min(start + size, len(prompts)))) for start in range(0, len(prompts), size)]

    @contextlib.contextmanager
    def adapted(self, prompts: Sequence[Sequence[int]]) -> Iterator[Adaptation]:
        with self._trainer.adapted(prompts) as adaptation, self._trainer.precision():
            yield adaptation

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        raise TaskError(
            f"{_task(requests[0])} asks for the likelihood of whole documents: there is no prompt to adapt on. "
            f"Score it with the model refine."
        )

    def get_model_info(self) -> dict[str, Any]:
        return {
            **super().get_model_info(),
            "test_time": self.test_time.model_dump(mode="json"),
            "adaptation": dict(self.adaptation),
        }

    def _identity(self) -> dict[str, Any]:
        return {**super()._identity(), "test_time": self.test_time.model_dump(mode="json")}


def parse_generation(settings: dict[str, Any], task: str) -> Decoding:
    """lm-eval's generation settings as ours; greedy unless sampling is asked for.

    `temperature` counts only with `do_sample` true or absent, as elsewhere in lm-eval. Raises TaskError on a
    setting we do not have, because an ignored one would change scores silently.
    """
    rest = dict(settings)
    until = rest.pop("until", None) or []
    lengths = [rest.pop(name, None) for name in ("max_gen_toks", "max_new_tokens", "max_tokens")]
    max_tokens = next((int(value) for value in lengths if value is not None), Decoding.max_tokens)
    min_tokens = int(rest.pop("min_new_tokens", None) or 0)
    temperature = float(rest.pop("temperature", None) or 0.0)
    do_sample = rest.pop("do_sample", None)
    top_p, top_k = float(rest.pop("top_p", None) or 1.0), int(rest.pop("top_k", None) or 0)
    if rest.pop("num_beams", 1) not in (1, None):
        raise TaskError(f"{task} asks for beam search, which this model does not have. Score it greedily.")
    if rest:
        raise TaskError(f"{task} asks for {', '.join(sorted(rest))} in generation, which this model does not have.")
    if max_tokens < 1:
        raise TaskError(f"{task} asks for answers of {max_tokens} tokens; expected at least 1.")
    if do_sample is True and temperature == 0.0:
        temperature = 1.0
    if do_sample is False:
        temperature = 0.0
    stops = (until,) if isinstance(until, str) else tuple(until)
    return Decoding(max_tokens, min_tokens, stops, temperature, top_p, top_k)


def resolve_device(device: str | torch.device | None) -> torch.device:
    """ "auto", None or a device's name to a device that is there; each local process takes a GPU of its own."""
    wanted = "auto" if device is None else str(device)
    if wanted == "auto":
        wanted = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        found = torch.device(wanted)
    except RuntimeError:
        raise ConfigError(f"{wanted} is not a device; expected auto, cpu, cuda or cuda:N.") from None
    if found.type == "cuda":
        if not torch.cuda.is_available():
            log.warning("there is no CUDA device for %s; using the CPU", wanted)
            return torch.device("cpu")
        if int(os.environ.get("WORLD_SIZE", "1")) > 1 or found.index is None:
            return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return found


def tokenizer_sha256(tokenizer: Any) -> str:
    """A hash of how a tokenizer cuts text, the same wherever it lies."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    words = backend.to_str() if backend is not None else json.dumps(sorted(tokenizer.get_vocab().items()))
    return hashlib.sha256(words.encode()).hexdigest()


def _tokenizer(name: str, model: Any) -> Any:
    from refine_harness.models.load import load_tokenizer

    tokenizer: Any = load_tokenizer(name)
    if len(tokenizer) > model.config.vocab_size:
        raise ModelError(
            f"the tokenizer {name} has {len(tokenizer)} tokens and the model {model.config.vocab_size} embeddings. "
            f"Leave tokenizer out to use the model's own."
        )
    return tokenizer


def _batch_size(value: int | str | None) -> int | None:
    """A number; None for auto."""
    return None if value is None or str(value).startswith("auto") else _positive("batch_size", value, " or auto")


def _positive(name: str, value: int | str, other: str = "") -> int:
    if not str(value).isdigit() or int(value) < 1:
        raise ConfigError(f"{name} = {value}; expected a positive number{other}.")
    return int(value)


def _processes() -> tuple[int, int]:
    """This process's rank and their number; joins the others if a launcher started several."""
    distributed = torch.distributed
    if not distributed.is_available():
        return 0, 1
    if not distributed.is_initialized() and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        from accelerate import PartialState

        PartialState(cpu=not torch.cuda.is_available())
    if not distributed.is_initialized():
        return 0, 1
    return distributed.get_rank(), distributed.get_world_size()


def _task(request: Instance) -> str:
    return request.task_name or "?"


def _seeded(decoding: Decoding, text: str) -> Decoding:
    """`decoding` with a seed made of `text`."""
    return replace(decoding, seed=int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big"))


def _with_facts(results: list[_Result], adaptation: Adaptation | None) -> list[_Result]:
    if adaptation is None or not results:
        return results
    return [replace(results[0], facts=adaptation.facts), *results[1:]]
