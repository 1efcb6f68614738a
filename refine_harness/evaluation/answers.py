"""Token ids in, answers out: what scoring asks of a fast-weight model, without lm-eval.

Prompts are read in pieces, with constant memory; what several of them share is read once (`prefixes.py`), and so is
a context for all its continuations. Rows of a batch are of similar length, padded on the right, and carry their
lengths: padding never enters a state, and a batch answers as each row alone does, up to rounding. Answers are decoded
from the states, one token a step for all rows together; the head is applied where a token is scored or picked.

Left out: where requests come from, the order in which they are answered, caching.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from refine_harness.evaluation.prefixes import Place, Stretch, Tokens, as_tokens, share
from refine_harness.models.base import FastWeightLM, Reading
from refine_harness.models.decode import Decoder
from refine_harness.models.state import State
from refine_harness.types import Download, upload

PIECE = 8192
"""Fewest tokens of a long row that are read at once; so many rows are read together that the budget holds these."""
BUDGET = 32768
"""Tokens of all rows that are read at once: enough to keep a large GPU busy."""
ROWS = 256
"""Most rows that are read at once."""
STATE_SHARE = 16
"""The states of such rows may take one part in so many of the device's memory: several copies live at once."""
CPU_STATE_BYTES = 2**30
"""What they may take on a CPU."""
FORKABLE = 4
"""A reading that is forked keeps every layer's inputs: it is given one part in so many of the budget."""
FREE = 2048
"""So many tokens are read about as fast as one: up to there padding costs nothing."""
FILLED = 0.75
"""Beyond that, the least share of a batch that must be tokens, not padding."""
HEAD_ELEMENTS = 2**26
"""Logits in memory at once while continuations are scored."""


@dataclass(frozen=True)
class Decoding:
    """How one answer is decoded, and where it ends."""

    max_tokens: int = 256
    min_tokens: int = 0
    """Stop tokens are forbidden before this many tokens (stop strings only where they are one token)."""
    stops: tuple[str, ...] = ()
    """The answer ends before the first of these strings."""
    temperature: float = 0.0
    """0 is greedy."""
    top_p: float = 1.0
    top_k: int = 0
    """0 keeps the whole vocabulary."""
    seed: int = 0
    """Of this answer's samples; unused when greedy."""


@dataclass(frozen=True)
class Answer:
    text: str
    tokens: tuple[int, ...]
    """What was generated, without the end token."""


@dataclass
class Counts:
    """Tokens of prompts and continuations so far; decoded ones are not counted."""

    asked: int = 0
    """If every request were read alone, from its first token."""
    read: int = 0
    """That were read."""
    padded: int = 0
    """The same and the padding beside them."""


@dataclass
class _Scores:
    """Sums over positions of many continuations, fetched from the device in one piece."""

    rows: list[Tensor] = field(default_factory=list)
    logprobs: list[Tensor] = field(default_factory=list)
    hits: list[Tensor] = field(default_factory=list)

    def add(self, rows_N: Tensor, logits_NV: Tensor, labels_N: Tensor) -> None:
        """Positions of continuations `rows_N` (on the CPU) whose next token is `labels_N`."""
        self.rows.append(rows_N)
        label_N = logits_NV.gather(-1, labels_N[:, None])[:, 0]
        self.logprobs.append((label_N - logits_NV.logsumexp(-1)).double())
        self.hits.append(logits_NV.argmax(-1) == labels_N)

    def sums(self, count: int) -> list[tuple[float, bool]]:
        """(log-probability, all greedy) of each continuation; positions are added in the order they came."""
        totals_R, greedy_R = np.zeros(count), np.ones(count, dtype=bool)
        if self.rows:
            rows_N = torch.cat(self.rows).numpy()
            np.add.at(totals_R, rows_N, torch.cat(self.logprobs).cpu().numpy())
            np.logical_and.at(greedy_R, rows_N, torch.cat(self.hits).cpu().numpy())
        return list(zip(totals_R.tolist(), greedy_R.tolist(), strict=True))


class Answerer:
    """Reads prompts with `model` and answers them.

    Args:
        model: a fast-weight language model.
        tokenizer: its tokenizer.
        piece: fewest tokens of a long row that are read at once; a few rows get more, within the budget.
        budget: tokens of all rows that are read at once, padding included; bounds memory.
        rows: most rows that are read at once; None for as many as their states' memory allows, up to `ROWS`.

    The last three change results by rounding only.
    """

    def __init__(
        self, model: FastWeightLM, tokenizer: Any, *, piece: int = PIECE, budget: int = BUDGET, rows: int | None = None
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.piece = min(piece, budget)
        self.budget = budget
        self._rows = rows
        self.end_ids = frozenset(_ids(tokenizer.eos_token_id) | _ids(getattr(model.config, "eos_token_id", None)))
        self.reads = 0
        """Different prompts that were read so far."""
        self.tokens = Counts()

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def rows(self) -> int:
        """Most rows that are read at once."""
        if self._rows is None:
            self._rows = self._affordable_rows()
        return self._rows

    @torch.no_grad()
    def _affordable_rows(self) -> int:
        if not self.model.fixed_state:  # who knows how large it will get
            return 8
        token_11 = torch.zeros(1, 1, dtype=torch.int64, device=self.device)
        size = self.model.read(token_11, forkable=False).state.nbytes
        memory = CPU_STATE_BYTES
        if self.device.type == "cuda":
            memory = torch.cuda.get_device_properties(self.device).total_memory // STATE_SHARE
        return max(1, min(ROWS, memory // size))

    @torch.no_grad()
    def generate(self, prompts: Sequence[Sequence[int]], decodings: Sequence[Decoding]) -> list[Answer]:
        """An answer per prompt (at least one token each), in the order given."""
        answers: list[list[int]] = [[] for _ in prompts]
        texts: list[str | None] = [None] * len(prompts)
        stops = [_Stops(self.tokenizer, self.end_ids, decoding) for decoding in decodings]
        samplers = [_Sampler(decoding, self.device) for decoding in decodings]
        read = self._read(prompts)
        self.tokens.asked += sum(map(len, prompts))
        decoder, logits_RV = Decoder(self.model, read.state_of_prompts), read.logits_RV[read.rows]
        del read  # a decoder has memory of its own
        alive: list[int | None] = list(range(len(prompts)))
        while True:
            picks_R = logits_RV.argmax(-1)
            for row, i in enumerate(alive):
                if i is not None:
                    forbidden = stops[i].token_ids if len(answers[i]) < decodings[i].min_tokens else ()
                    if forbidden or decodings[i].temperature:
                        picks_R[row] = samplers[i].pick(logits_RV[row], forbidden)
            heard = Download(picks_R)
            last = all(i is None or len(answers[i]) + 1 >= decodings[i].max_tokens for i in alive)
            # A GPU reads on while this process looks at what was picked; if every answer ends here, for nothing.
            ahead = self._logits(decoder.step(picks_R)) if heard.later and not last else None
            going: list[int] = []
            for row, token in enumerate(heard.tolist()):
                i = alive[row]
                if i is None:
                    continue
                texts[i] = stops[i].text_if_ended(answers[i], token)
                if texts[i] is None:
                    going.append(row)
                else:
                    alive[row] = None
            if not going:
                break
            logits_RV = self._logits(decoder.step(picks_R)) if ahead is None else ahead
            if len(going) <= len(alive) // 2:  # rows that ended read on unheard until it pays to leave them behind
                decoder = Decoder(self.model, decoder.state.select(going))
                alive, logits_RV = [alive[row] for row in going], logits_RV[going]
        return [Answer(text or "", tuple(tokens)) for text, tokens in zip(texts, answers, strict=True)]

    @torch.no_grad()
    def score(
        self, contexts: Sequence[Sequence[int]], continuations: Sequence[Sequence[Sequence[int]]]
    ) -> list[list[tuple[float, bool]]]:
        """For every context, (log-probability in nats, is it the greedy answer) of each of its continuations.

        Every context is read once; its state is forked for each continuation of two tokens or more. An empty
        continuation has log-probability 0 and is greedy.
        """
        read = self._read(contexts)
        texts = [as_tokens(tokens) for group in continuations for tokens in group]
        sources = [row for row, group in zip(read.rows, continuations, strict=True) for _ in group]
        for context, group in zip(contexts, continuations, strict=True):
            self.tokens.asked += sum(len(context) + max(0, len(tokens) - 1) for tokens in group)
        scores = _Scores()
        some = [i for i, tokens in enumerate(texts) if len(tokens)]
        for a in range(0, len(some), self._head_rows):
            part = some[a : a + self._head_rows]
            first_N = self._index([int(texts[i][0]) for i in part])
            scores.add(torch.tensor(part), read.logits_RV[self._index([sources[i] for i in part])], first_N)
        longer = [i for i in some if len(texts[i]) > 1]
        for batch in self._batches([len(texts[i]) - 1 for i in longer]):
            chosen = [longer[b] for b in batch]
            state = read.state.select(self._index([sources[i] for i in chosen]))
            self._continue([texts[i] for i in chosen], chosen, state, scores)
        flat = iter(scores.sums(len(texts)))
        return [[next(flat) for _ in group] for group in continuations]

    def _continue(self, texts: Sequence[Tokens], names: Sequence[int], state: State, scores: _Scores) -> None:
        """Score all but the first token of texts (longest first) that go on from the rows of `state`."""
        for start, lengths, reading in self._pieces([tokens[:-1] for tokens in texts], state):
            columns = torch.arange(reading.hidden.shape[1])
            rows_N, steps_N = (columns < torch.tensor(lengths)[:, None]).nonzero(as_tuple=True)
            labels = [texts[b][start + 1 : start + 1 + n] for b, n in enumerate(lengths)]
            labels_N = upload(torch.from_numpy(np.concatenate(labels).astype(np.int64)), self.device)
            hidden_ND = reading.hidden[upload(rows_N, self.device), upload(steps_N, self.device)]
            names_N = torch.tensor(names)[rows_N]
            for a in range(0, len(labels_N), self._head_rows):
                part = slice(a, a + self._head_rows)
                scores.add(names_N[part], self._logits(hidden_ND[part]), labels_N[part])

    # Reading ------------------------------------------------------------------------------------

    def _read(self, prompts: Sequence[Sequence[int]]) -> _Read:
        """The state after each prompt and the logits of what comes next. Equal prompts have the same row."""
        texts = [as_tokens(prompt) for prompt in prompts]
        tree = share(texts, forks=self.model.fixed_state, every=self.model.alike_every)
        wanted = set(tree.ends)
        self.reads += len(wanted)
        ended: list[tuple[State, Tensor]] = []
        row_of_end: dict[Place, int] = {}
        state: State | None = None
        rows: dict[Place, int] = {}
        for wave in tree.waves:
            state, hidden_RD, rows = self._read_wave(wave, tree.stretches, state, rows)
            here = [place for place in rows if place in wanted]
            if not here:
                continue
            at = [rows[place] for place in here]
            for place in here:
                row_of_end[place] = len(row_of_end)
            if at != list(range(len(state))):
                at_E = self._index(at)
                ended.append((state.select(at_E), hidden_RD[at_E]))
            else:
                ended.append((state, hidden_RD))
        after = ended[0][0] if len(ended) == 1 else State.cat([part for part, _ in ended])
        logits_RV = self._logits(torch.cat([hidden_RD for _, hidden_RD in ended]))
        return _Read(after, logits_RV, [row_of_end[place] for place in tree.ends])

    def _read_wave(
        self, wave: Sequence[int], stretches: Sequence[Stretch], before: State | None, rows: dict[Place, int]
    ) -> tuple[State, Tensor, dict[Place, int]]:
        """States and hidden states at the marks of some stretches, and which row is which."""
        states: list[State] = []
        hidden: list[Tensor] = []
        found: dict[Place, int] = {}
        plain = [i for i in wave if len(stretches[i].marks) == 1]
        batches = [[plain[b] for b in batch] for batch in self._batches([len(stretches[i].tokens) for i in plain])]
        batches += [[i] for i in wave if len(stretches[i].marks) > 1]
        for batch in batches:
            sources = [source for i in batch if (source := stretches[i].source) is not None]
            state = None if before is None else before.select(self._index([rows[source] for source in sources]))
            for b, marks, after, hidden_RD in self._marked([stretches[i] for i in batch], state):
                for row, mark in zip(b, marks, strict=True):
                    found[batch[row], mark] = len(found)
                states.append(after)
                hidden.append(hidden_RD)
        return states[0] if len(states) == 1 else State.cat(states), torch.cat(hidden), found

    def _marked(
        self, stretches: Sequence[Stretch], state: State | None
    ) -> Iterator[tuple[list[int], list[int], State, Tensor]]:
        """Read stretches (longest first; one alone if it has several marks): rows, marks, states, hidden states."""
        forking = len(stretches[0].marks) > 1
        for start, lengths, reading in self._pieces([s.tokens for s in stretches], state, forking):
            if forking:
                marks = [mark for mark in stretches[0].marks if start < mark <= start + lengths[0]]
                if not marks:
                    continue
                at_1C = self._index([mark - 1 - start for mark in marks])[None]
                yield [0] * len(marks), marks, reading.states_at(at_1C), reading.at(at_1C)[0]
                continue
            done = [b for b, n in enumerate(lengths) if start + n == len(stretches[b].tokens)]
            if not done:
                continue
            done_E, last_E = self._index(done), self._index([lengths[b] - 1 for b in done])
            after = reading.state if len(done) == len(lengths) else reading.state.select(done_E)
            yield done, [len(stretches[b].tokens) for b in done], after, reading.hidden[done_E, last_E]

    def _pieces(
        self, rows: Sequence[Tokens], state: State | None, forkable: bool = False
    ) -> Iterator[tuple[int, list[int], Reading]]:
        """Read rows (longest first) piece by piece; rows that ended are dropped, so no row of a piece is empty.

        Yields the piece's first position, the real tokens of each row still there, and the reading.
        """
        before = len(rows)
        size = max(1, self.budget // FORKABLE) if forkable else max(self.piece, self.budget // len(rows))
        for start in range(0, len(rows[0]), size):
            alive = [row[start : start + size] for row in rows if len(row) > start]
            lengths = [len(row) for row in alive]
            if len(alive) < before and state is not None:
                state = state.select(slice(len(alive)))
                before = len(alive)
            tokens_BT = np.zeros((len(alive), lengths[0]), dtype=np.int64)
            for b, row in enumerate(alive):
                tokens_BT[b, : len(row)] = row
            self.tokens.read += sum(lengths)
            self.tokens.padded += tokens_BT.size
            full = lengths[-1] == lengths[0]
            reading = self.model.read(
                upload(torch.from_numpy(tokens_BT), self.device),
                state=state,
                lengths=None if full else torch.tensor(lengths),
                forkable=forkable,
            )
            state = reading.state
            yield start, lengths, reading

    def _batches(self, lengths: Sequence[int]) -> list[list[int]]:
        """Rows, by index, that are read together, the longest first: of similar length, within the budget."""
        batches: list[list[int]] = []
        filled = 0
        for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
            rows = len(batches[-1]) + 1 if batches else 0
            longest = lengths[batches[-1][0]] if batches else 0
            fits = 0 < rows <= self.rows and rows * min(longest, self.piece) <= self.budget
            if fits and (rows * longest <= FREE or filled + lengths[i] >= FILLED * rows * longest):
                batches[-1].append(i)
                filled += lengths[i]
            else:
                batches.append([i])
                filled = lengths[i]
        return batches

    def _index(self, numbers: Sequence[int]) -> Tensor:
        """On the device, without waiting for it."""
        return upload(torch.tensor(numbers, dtype=torch.int64), self.device)

    @property
    def _head_rows(self) -> int:
        return max(1, HEAD_ELEMENTS // self.model.head_weight.shape[0])

    def _logits(self, hidden_ND: Tensor) -> Tensor:
        """Logits in float32, or float64 for a float64 model."""
        logits_NV = self.model.logits(hidden_ND)
        return logits_NV if logits_NV.dtype == torch.float64 else logits_NV.float()


@dataclass(frozen=True)
class _Read:
    """Prompts that were read."""

    state: State
    logits_RV: Tensor
    """Of what comes after each row's last token."""
    rows: list[int]
    """The row of each prompt."""

    @property
    def state_of_prompts(self) -> State:
        """A row for each prompt, in order."""
        return self.state if self.rows == list(range(len(self.state))) else self.state.select(self.rows)


class _Stops:
    """Where one answer ends."""

    def __init__(self, tokenizer: Any, end_ids: frozenset[int], decoding: Decoding) -> None:
        self._tokenizer = tokenizer
        self._max_tokens = decoding.max_tokens
        self._stops = tuple(stop for stop in decoding.stops if stop)
        special = set(tokenizer.all_special_ids) | set(getattr(tokenizer, "added_tokens_decoder", {}))
        singles: dict[str, int] = {}
        for stop in self._stops:
            ids = tokenizer.encode(stop, add_special_tokens=False)
            if len(ids) == 1:
                singles[stop] = ids[0]
        # A special token is dropped from decoded text, so as a stop string it can only be seen as an id.
        self._end_ids = end_ids | {i for i in singles.values() if i in special}
        self.token_ids = tuple(sorted(self._end_ids | set(singles.values())))
        # A match ends in the newest token and spans at most one token per byte of the stop string; the rest
        # is slack for tokens that decode to nothing and for characters split over several tokens.
        self._window = max((len(stop.encode()) for stop in self._stops), default=0) + 8

    def text_if_ended(self, answer: list[int], token: int) -> str | None:
        """Append `token` to `answer` unless it is an end token; the final text if the answer ends here."""
        if token in self._end_ids:
            return self._cut(self._decode(answer))
        answer.append(token)
        if len(answer) >= self._max_tokens:
            return self._cut(self._decode(answer))
        if self._stops and self._has_stop(self._decode(answer[-self._window :])):
            text = self._decode(answer)  # the tail alone may decode differently at its start
            if self._has_stop(text):
                return self._cut(text)
        return None

    def _decode(self, tokens: list[int]) -> str:
        return self._tokenizer.decode(tokens, skip_special_tokens=True)

    def _has_stop(self, text: str) -> bool:
        return any(stop in text for stop in self._stops)

    def _cut(self, text: str) -> str:
        for stop in self._stops:
            text = text.partition(stop)[0]
        return text


class _Sampler:
    """Picks one answer's tokens; its samples depend on the decoding's seed alone."""

    def __init__(self, decoding: Decoding, device: torch.device) -> None:
        self._decoding = decoding
        self._generator = torch.Generator(device=device).manual_seed(decoding.seed) if decoding.temperature else None

    def pick(self, logits_V: Tensor, forbidden: Sequence[int]) -> int:
        if forbidden:
            logits_V = logits_V.clone()
            logits_V[list(forbidden)] = float("-inf")
        if self._generator is None:
            return int(logits_V.argmax())
        logits_V = logits_V / self._decoding.temperature
        if 0 < self._decoding.top_k < len(logits_V):
            smallest = logits_V.topk(self._decoding.top_k).values[-1]
            logits_V = logits_V.masked_fill(logits_V < smallest, float("-inf"))
        if self._decoding.top_p < 1:
            sorted_V, order_V = logits_V.softmax(-1).sort(descending=True)
            beyond_V = sorted_V.cumsum(-1) - sorted_V >= self._decoding.top_p
            logits_V = logits_V.index_fill(0, order_V[beyond_V], float("-inf"))
        return int(torch.multinomial(logits_V.softmax(-1), 1, generator=self._generator))


def _ids(value: int | Sequence[int] | None) -> set[int]:
    if value is None:
        return set()
    return {value} if isinstance(value, int) else set(value)
