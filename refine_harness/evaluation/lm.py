"""Fast-weight models as lm-eval models: `refine`, and `refine-ttt`, which adapts before it answers.

How they differ from lm-eval's `hf`:

- A prompt has no longest length. `max_length` sets one (prompt plus answer, in tokens); longer prompts then
  lose their middle, as LongBench cuts them, and are counted: nothing is shortened silently.
- Prompts are read in pieces with constant memory, requests that share a context read it once, and answers are
  decoded from the state. Padding never enters a state.
- Rolling log-likelihoods stream the whole document through the state: there are no disjoint windows, so every
  token is predicted from everything before it, whatever `max_length` says.
- Several processes (accelerate launch, torchrun) share the requests among themselves and each knows all answers;
  to lm-eval they are one, because its own way hands out documents by turns, which parts tasks with several
  metrics (one per length, say) so that it cannot join them again. All must make the same calls.
- `cache_dir` keeps every answer as it comes, under a key made of the weights and settings; the same command
  goes on after an interruption. (lm-eval's own `use_cache` keys by the request alone: give each model its own.)

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
from refine_harness.evaluation.answers import Answerer, Decoding
from refine_harness.evaluation.cache import ResponseCache, request_key
from refine_harness.training.testtime import Adaptation, TestTimeTrainer

log = logging.getLogger(__name__)

Truncation = Literal["middle", "left", "error", "none"]
"""What happens to a prompt that leaves no room for its answer within max_length: its middle is left out
(LongBench's way), its start is left out (lm-eval's `hf`'s way), an error, or nothing (it is read whole)."""

Progress = Callable[[int, int], None]
"""Called with requests answered so far and requests in all."""

TASK_METADATA = ("data", "data_dir", "lengths", "max_seq_lengths", "samples", "limit", "essays")
"""Keys of `model_args` that lm-eval hands to tasks as well, which the model therefore lets pass."""


@dataclass(frozen=True)
class _Prompt:
    """One request whose answer is still to come."""

    index: int
    tokens: Sequence[int]
    """Compact (an array of C ints): thousands of long prompts wait at once."""
    shortened: bool
    continuation: Sequence[int] = ()
    decoding: Decoding | None = None


@dataclass(frozen=True)
class _Result:
    index: int
    value: Any
    shortened: bool
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
        batch_size: prompts read at once; a number, also as text. "auto" is 8. Scores do not depend on it.
        max_batch_size: accepted because lm-eval passes it; unused.
        max_length: longest prompt plus answer in tokens, the begin token not counted; None for no bound.
        truncation: see `Truncation`.
        add_bos: start every prompt with the tokenizer's beginning-of-text token. None: where the model and its
            tokenizer have one.
        piece: tokens of a prompt that are read at once; bounds memory.
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
        batch_size: int | str | None = 8,
        max_batch_size: int | str | None = None,
        max_length: int | None = None,
        truncation: Truncation = "middle",
        add_bos: bool | None = None,
        piece: int = 4096,
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
                known = ("pretrained", "dtype", "max_length", "truncation", "add_bos", "piece", "seed", "cache_dir")
                raise ConfigError(f"{key} is not an argument of this model.{suggest(key, (*known, *TASK_METADATA))}")
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
        self.batch_size = _batch_size(batch_size)
        self._max_length = None if max_length is None else int(max_length)
        self.truncation: Truncation = truncation
        has_bos = tokenizer.bos_token_id is not None
        self.add_bos = has_bos and (model.config.bos_token_id is not None if add_bos is None else bool(add_bos))
        self.seed = int(seed)
        self.answerer = Answerer(self.model, tokenizer, piece=int(piece))
        self.truncated: Counter[str] = Counter()
        """Examples of each task whose prompt was shortened."""
        self.shortened: set[tuple[str, int | None]] = set()
        """The same as (task, doc_id)."""
        self.adaptation: dict[str, float] = {}
        """What test-time training did, summed over all answers, kept ones included; empty without it."""
        self.seconds = 0.0
        """What all answers took, adaptation included; of kept ones, what they took when they were found. With
        several processes, the mean over them."""
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

        def prompt(index: int) -> _Prompt:
            text, task = requests[index].args[0], _task(requests[index])
            tokens = array("i", self.tok_encode(text) or [self.prefix_token_id])
            tokens, shortened = self._fit(tokens, decodings[index].max_tokens, task)
            return _Prompt(index, tokens, shortened, decoding=decodings[index])

        def answers(pending: Sequence[int]) -> Iterator[list[_Result]]:
            yield from self._generate([prompt(index) for index in pending])

        return self._answer("generate_until", requests, keys, answers, disable_tqdm)

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """(log-probability, is it the greedy answer) of every (context, continuation), in order."""
        keys = [request_key("loglikelihood", request.args) for request in requests]

        def answers(pending: Sequence[int]) -> Iterator[list[_Result]]:
            pairs = [self._encode(*requests[index].args) for index in pending]
            tasks = [_task(requests[index]) for index in pending]
            yield from self._score(self._pairs(pending, pairs, tasks))

        results = self._answer("loglikelihood", requests, keys, answers, disable_tqdm)
        return [(logprob, greedy) for logprob, greedy in results]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-probability of every (document,) after the beginning-of-text token, read as one stream, in order."""
        keys = [request_key("loglikelihood_rolling", request.args) for request in requests]

        def answers(pending: Sequence[int]) -> Iterator[list[_Result]]:
            prompts = []
            for index in pending:
                tokens = self.tok_encode(requests[index].args[0], add_special_tokens=False)
                prompts.append(_Prompt(index, array("i", [self.prefix_token_id]), False, array("i", tokens)))
            # All share one context, the begin token; in batches, so that answers come (and are kept) one by one.
            lengths = [len(prompt.continuation) for prompt in prompts]
            for batch in self._by_length(range(len(prompts)), lengths):
                for results in self._score([prompts[i] for i in batch]):
                    yield [replace(result, value=result.value[0]) for result in results]

        return self._answer("loglikelihood_rolling", requests, keys, answers, disable_tqdm)

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """As `loglikelihood`, of tokens, for callers of lm-eval's template."""
        pairs = [
            (array("i", context or [self.prefix_token_id]), array("i", continuation))
            for _, context, continuation in requests
        ]
        prompts = self._pairs(range(len(pairs)), pairs, ["?"] * len(pairs))
        values = {result.index: result.value for results in self._score(prompts) for result in results}
        return [values[index] for index in range(len(pairs))]

    # How they are answered ----------------------------------------------------------------------

    @property
    def cacheable(self) -> bool:
        """Whether an answer depends on its request alone, so that it may be kept."""
        return True

    def adapted(self, prompts: Sequence[Sequence[int]]) -> AbstractContextManager[Adaptation | None]:
        """The model as it answers these prompts; here, as it is."""
        return contextlib.nullcontext()

    def schedule(self, lengths: Sequence[int]) -> list[list[int]]:
        """Which prompts, by index, are answered by one `adapted` model, in what order.

        Here: similar lengths together, the longest first, so that what does not fit in memory fails at once.
        """
        return self._by_length(range(len(lengths)), lengths)

    def _by_length(self, indices: Sequence[int], lengths: Sequence[int]) -> list[list[int]]:
        order = sorted(indices, key=lambda i: (-lengths[i], i))
        return [order[start : start + self.batch_size] for start in range(0, len(order), self.batch_size)]

    def _generate(self, prompts: Sequence[_Prompt]) -> Iterator[list[_Result]]:
        lengths = [len(prompt.tokens) for prompt in prompts]
        for together in self.schedule(lengths):
            results: list[_Result] = []  # handed over when the weights are back, whatever becomes of them then
            with self.adapted([prompts[i].tokens for i in together]) as adaptation:
                for batch in self._by_length(together, lengths):
                    decodings = [d for i in batch if (d := prompts[i].decoding) is not None]
                    answers = self.answerer.generate([prompts[i].tokens for i in batch], decodings)
                    results += [
                        _Result(prompts[i].index, answer.text, prompts[i].shortened)
                        for i, answer in zip(batch, answers, strict=True)
                    ]
            yield _with_facts(results, adaptation)

    def _score(self, prompts: Sequence[_Prompt]) -> Iterator[list[_Result]]:
        """Requests with one context are answered together: it is read (and adapted on) once."""
        groups: dict[bytes, list[_Prompt]] = {}
        for prompt in prompts:
            groups.setdefault(bytes(prompt.tokens), []).append(prompt)
        members = list(groups.values())
        contexts = [group[0].tokens for group in members]
        lengths = [len(context) for context in contexts]
        for together in self.schedule(lengths):
            results: list[_Result] = []
            with self.adapted([contexts[i] for i in together]) as adaptation:
                for batch in self._by_length(together, lengths):
                    continuations = [[prompt.continuation for prompt in members[i]] for i in batch]
                    scores = self.answerer.score([contexts[i] for i in batch], continuations, rows=self.batch_size)
                    results += [
                        _Result(prompt.index, score, prompt.shortened)
                        for i, group in zip(batch, scores, strict=True)
                        for prompt, score in zip(members[i], group, strict=True)
                    ]
            yield _with_facts(results, adaptation)

    def _answer(
        self,
        method: str,
        requests: Sequence[Instance],
        keys: Sequence[str],
        answers: Callable[[Sequence[int]], Iterator[list[_Result]]],
        quiet: bool,
    ) -> list[Any]:
        """One value per request, in order: kept answers first, then `answers` of the requests that are left.

        Requests with equal keys are answered once, unless answers depend on their order.
        """
        if self.processes > 1 and self.cache_hook.dbdict is not None:
            raise ConfigError("lm-eval's use_cache does not work with several processes. Use cache_dir instead.")
        same: dict[int, list[int]] = {}
        first: dict[str, int] = {}
        for index, key in enumerate(keys):
            same.setdefault(first.setdefault(key, index) if self.cacheable else index, []).append(index)
        mine = self._share(requests, list(same))
        done: list[_Result] = []
        pending: list[int] = []
        with self._bar(method, sum(len(same[index]) for index in mine), quiet) as tick:
            for index in mine:
                kept = None if self._cache is None else self._cache.get(keys[index])
                if kept is None:
                    pending.append(index)
                else:
                    done.append(_Result(index, *kept))
            tick(sum(len(same[result.index]) for result in done))
            started = time.perf_counter()
            for results in answers(pending) if pending else ():
                results[0] = replace(results[0], seconds=time.perf_counter() - started)
                for result in results:
                    self._keep(method, requests[result.index], keys[result.index], result)
                done += results
                tick(sum(len(same[result.index]) for result in done))
                started = time.perf_counter()
        values: dict[int, Any] = {}
        before = self.truncated.copy()
        for part in self._everyones(done):
            self.seconds += sum(result.seconds for result in part) / self.processes
            for result in part:
                self._count(result, [requests[index] for index in same[result.index]])
                values.update(dict.fromkeys(same[result.index], result.value))
        self._warn(self.truncated - before)
        return [values[index] for index in range(len(requests))]

    def _share(self, requests: Sequence[Instance], indices: list[int]) -> list[int]:
        """Which of the requests this process answers: about as much text for each, a context's all together."""
        if self.processes == 1:
            return indices
        of_context: dict[str, list[int]] = {}
        for index in indices:
            of_context.setdefault(requests[index].args[0], []).append(index)
        loads = [0] * self.processes
        mine: list[int] = []
        for context in sorted(of_context, key=lambda context: -len(context)):
            process = loads.index(min(loads))
            loads[process] += len(context)
            if process == self.process:
                mine += of_context[context]
        return sorted(mine)

    def _everyones(self, results: list[_Result]) -> list[list[_Result]]:
        """The results of every process, in every process."""
        if self.processes == 1:
            return [results]
        parts: list[Any] = [None] * self.processes
        torch.distributed.all_gather_object(parts, results)
        return parts

    def _keep(self, method: str, request: Instance, key: str, result: _Result) -> None:
        if self._cache is not None:
            self._cache.put(key, [result.value, result.shortened, result.facts, result.seconds])
        if self.cacheable:
            self.cache_hook.add_partial(method, request.args, result.value)

    def _count(self, result: _Result, requests: Sequence[Instance]) -> None:
        for name, value in result.facts.items():
            self.adaptation[name] = self.adaptation.get(name, 0.0) + value
        for request in requests if result.shortened else ():
            example = (_task(request), request.doc_id)
            if example not in self.shortened:
                self.shortened.add(example)
                self.truncated[example[0]] += 1

    def _warn(self, shortened: Counter[str]) -> None:
        if shortened and not self.process:
            how = "their middle" if self.truncation == "middle" else "their start"
            what = ", ".join(f"{task} {count}" for task, count in sorted(shortened.items()))
            log.warning("prompts longer than max_length = %s tokens lost %s: %s", self.max_length, how, what)

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

                def tick(done: int) -> None:
                    bar.update(done - bar.n)

                yield tick

    # Tokens -------------------------------------------------------------------------------------

    def _encode(self, context: str, continuation: str) -> tuple[array[int], array[int]]:
        """Context and continuation tokens, as lm-eval's template splits them."""
        if context == "":
            before, after = [], self.tok_encode(continuation, add_special_tokens=False)
            if after[:1] == [self.prefix_token_id]:
                before, after = after[:1], after[1:]
        else:
            before, after = self._encode_pair(context, continuation)
        return array("i", before or [self.prefix_token_id]), array("i", after)

    def _pairs(
        self, indices: Sequence[int], pairs: Sequence[tuple[array[int], array[int]]], tasks: Sequence[str]
    ) -> list[_Prompt]:
        """Contexts cut so that the longest of their continuations fits: rivals are judged after the same words."""
        longest: dict[bytes, int] = {}
        for context, continuation in pairs:
            key = bytes(context)
            longest[key] = max(longest.get(key, 0), len(continuation))
        prompts = []
        for index, (context, continuation), task in zip(indices, pairs, tasks, strict=True):
            tokens, shortened = self._fit(context, longest[bytes(context)], task)
            prompts.append(_Prompt(index, tokens, shortened, continuation))
        return prompts

    def _fit(self, tokens: array[int], answer: int, task: str) -> tuple[array[int], bool]:
        """The prompt with room left for `answer` tokens within max_length, and whether it was shortened.

        The begin token is not counted, and stays: tasks fill prompts to a length without it.
        """
        begun = int(tokens[0] == self.tokenizer.bos_token_id)
        first, body = tokens[:begun], tokens[begun:]
        if self.max_length is None or self.truncation == "none" or len(body) + answer <= self.max_length:
            return tokens, False
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

    def schedule(self, lengths: Sequence[int]) -> list[list[int]]:
        size = 1 if self.test_time.restore == "prompt" else self.test_time.batch.sequences
        return [list(range(start, min(start + size, len(lengths)))) for start in range(0, len(lengths), size)]

    @contextlib.contextmanager
    def adapted(self, prompts: Sequence[Sequence[int]]) -> Iterator[Adaptation]:
        precision = self.test_time.autocast
        bf16 = precision == "bf16" or (precision == "auto" and self.device.type == "cuda")
        autocast = torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=bf16)
        with self._trainer.adapted(prompts) as adaptation, autocast:
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


def _batch_size(value: int | str | None) -> int:
    text = "8" if value is None or str(value).startswith("auto") else str(value)
    if not text.isdigit() or int(text) < 1:
        raise ConfigError(f"batch_size = {value}; expected a positive number or auto.")
    return int(text)


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
