"""Token ids in, answers out: what scoring asks of a fast-weight model, without lm-eval.

A prompt is read once, in pieces, with constant memory; its state is forked for each continuation;
answers are decoded from the state, one token a step for all rows together. Rows of a batch are
padded on the right and carry their lengths, so padding never enters a state, and a batch answers as
each row alone does, up to rounding.

Left out: where requests come from, the order in which they are answered, caching.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from refine_harness.models.decode import Decoder

_HEAD_ROWS = 1024
"""Positions whose logits are in memory at once while continuations are scored."""


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


class Answerer:
    """Reads prompts with `model` and answers them.

    Args:
        model: a fast-weight language model (`read`, `logits`).
        tokenizer: its tokenizer.
        piece: tokens of a row that are read at once; bounds memory, changes results by rounding only.
    """

    def __init__(self, model: Any, tokenizer: Any, *, piece: int = 4096) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.piece = piece
        self.end_ids = frozenset(_ids(tokenizer.eos_token_id) | _ids(getattr(model.config, "eos_token_id", None)))
        self.reads = 0
        """Rows that were read as prompts so far."""

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @torch.no_grad()
    def generate(self, prompts: Sequence[Sequence[int]], decodings: Sequence[Decoding]) -> list[Answer]:
        """An answer per prompt (at least one token each), in the order given."""
        order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
        answers: list[list[int]] = [[] for _ in prompts]
        texts: list[str | None] = [None] * len(prompts)
        stops = [_Stops(self.tokenizer, self.end_ids, decoding) for decoding in decodings]
        samplers = [_Sampler(decoding, self.device) for decoding in decodings]
        state, logits_BV = self._read([prompts[i] for i in order])
        decoder = Decoder(self.model, state)
        alive: list[int | None] = list(order)
        while True:
            tokens = logits_BV.argmax(-1).tolist()
            going: list[int] = []
            for row, i in enumerate(alive):
                if i is None:
                    continue
                forbidden = stops[i].token_ids if len(answers[i]) < decodings[i].min_tokens else ()
                if forbidden or decodings[i].temperature:
                    tokens[row] = samplers[i].pick(logits_BV[row], forbidden)
                texts[i] = stops[i].text_if_ended(answers[i], tokens[row])
                if texts[i] is None:
                    going.append(row)
                else:
                    alive[row] = None
            if not going:
                break
            if len(going) <= len(alive) // 2:  # rows that ended read on unheard until it pays to leave them behind
                decoder = Decoder(self.model, decoder.state.select(going))
                alive, tokens = [alive[row] for row in going], [tokens[row] for row in going]
            logits_BV = self._logits(decoder.step(torch.tensor(tokens, device=self.device)))
        return [Answer(text or "", tuple(tokens)) for text, tokens in zip(texts, answers, strict=True)]

    @torch.no_grad()
    def score(
        self, contexts: Sequence[Sequence[int]], continuations: Sequence[Sequence[Sequence[int]]], *, rows: int = 8
    ) -> list[list[tuple[float, bool]]]:
        """For every context, (log-probability in nats, is it the greedy answer) of each of its continuations.

        Every context is read once; its state is forked for each continuation of two tokens or more, `rows` of
        them at a time. An empty continuation has log-probability 0 and is greedy.
        """
        order = sorted(range(len(contexts)), key=lambda i: -len(contexts[i]))
        state, logits_GV = self._read([contexts[i] for i in order])
        row_of = {i: row for row, i in enumerate(order)}
        pairs = [(i, j) for i, group in enumerate(continuations) for j in range(len(group)) if continuations[i][j]]
        out = [[(0.0, True)] * len(group) for group in continuations]
        if not pairs:
            return out
        pairs.sort(key=lambda pair: -len(continuations[pair[0]][pair[1]]))
        for start in range(0, len(pairs), rows):
            chunk = pairs[start : start + rows]
            sources = torch.tensor([row_of[i] for i, _ in chunk], device=self.device)
            scores = self._continue([continuations[i][j] for i, j in chunk], sources, state, logits_GV)
            for (i, j), result in zip(chunk, scores, strict=True):
                out[i][j] = result
        return out

    def _continue(
        self, continuations: Sequence[Sequence[int]], sources_B: Tensor, state: Any, logits_GV: Tensor
    ) -> list[tuple[float, bool]]:
        """Continuations (longest first, none empty) of the contexts whose rows in `state` are `sources_B`."""
        sums = torch.zeros(len(continuations), dtype=torch.float64)
        greedy = torch.ones(len(continuations), dtype=torch.bool)
        first_B = torch.tensor([tokens[0] for tokens in continuations], device=self.device)
        _add(sums, greedy, torch.arange(len(continuations)), *_rate(logits_GV[sources_B], first_B))
        longer = sum(len(tokens) > 1 for tokens in continuations)
        if not longer:
            return _pairs(sums, greedy)
        inputs = [tokens[:-1] for tokens in continuations[:longer]]
        for start, lengths, reading in self._pieces(inputs, state.select(sources_B[:longer])):
            width = reading.hidden.shape[1]
            real_BT = torch.arange(width)[None] < torch.tensor(lengths)[:, None]
            rows_N, steps_N = real_BT.nonzero(as_tuple=True)
            labels = [label for b, n in enumerate(lengths) for label in continuations[b][start + 1 : start + 1 + n]]
            labels_N = torch.tensor(labels, device=self.device)
            hidden_ND = reading.hidden[rows_N.to(self.device), steps_N.to(self.device)]
            for a in range(0, len(labels), _HEAD_ROWS):
                part = slice(a, a + _HEAD_ROWS)
                _add(sums, greedy, rows_N[part], *_rate(self._logits(hidden_ND[part]), labels_N[part]))
        return _pairs(sums, greedy)

    def _read(self, prompts: Sequence[Sequence[int]]) -> tuple[Any, Tensor]:
        """The state after each prompt (longest first, none empty) and the logits [B, V] of what comes next."""
        self.reads += len(prompts)
        states: list[Any] = []
        logits: list[Tensor] = []
        for start, lengths, reading in self._pieces(prompts):
            ended = [b for b, n in enumerate(lengths) if start + n == len(prompts[b])]
            if not ended:
                continue
            rows_E = torch.tensor(ended, device=self.device)
            last_E = torch.tensor([lengths[b] - 1 for b in ended], device=self.device)
            everything = len(ended) == len(lengths)
            states.append(reading.state if everything else reading.state.select(rows_E))
            logits.append(self._logits(reading.hidden[rows_E, last_E]))
        # The shortest prompts ended first and lie last.
        state = states[0] if len(states) == 1 else type(states[0]).cat(states[::-1])
        return state, torch.cat(logits[::-1])

    def _pieces(self, rows: Sequence[Sequence[int]], state: Any = None) -> Iterator[tuple[int, list[int], Any]]:
        """Read rows (longest first) piece by piece; rows that ended are dropped, so no row of a piece is empty.

        Yields the piece's first position, the real tokens of each row still there, and the reading.
        """
        before = len(rows)
        for start in range(0, len(rows[0]), self.piece):
            alive = [row[start : start + self.piece] for row in rows if len(row) > start]
            lengths = [len(row) for row in alive]
            if len(alive) < before:
                state = state.select(torch.arange(len(alive), device=self.device))
                before = len(alive)
            tokens_BT = torch.zeros(len(alive), lengths[0], dtype=torch.int64)
            for b, row in enumerate(alive):
                tokens_BT[b, : len(row)] = torch.tensor(list(row))
            lengths_B = torch.tensor(lengths, device=self.device)
            reading = self.model.read(tokens_BT.to(self.device), state=state, lengths=lengths_B, forkable=False)
            state = reading.state
            yield start, lengths, reading

    def _logits(self, hidden_ND: Tensor) -> Tensor:
        """Logits in float32, or float64 for a float64 model."""
        logits_NV = self.model.logits(hidden_ND)
        return logits_NV if logits_NV.dtype == torch.float64 else logits_NV.float()


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


def _rate(logits_NV: Tensor, labels_N: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probability of each label (float64) and whether it is the greedy one, both on the CPU."""
    label_N = logits_NV.gather(-1, labels_N[:, None])[:, 0]
    logprob_N = label_N - logits_NV.logsumexp(-1)
    return logprob_N.cpu().double(), (logits_NV.argmax(-1) == labels_N).cpu()


def _add(sums_B: Tensor, greedy_B: Tensor, rows_N: Tensor, logprobs_N: Tensor, greedy_N: Tensor) -> None:
    """Add each position's result to its row's, in place."""
    sums_B.index_add_(0, rows_N, logprobs_N)
    greedy_B[rows_N[~greedy_N]] = False


def _pairs(sums_B: Tensor, greedy_B: Tensor) -> list[tuple[float, bool]]:
    return list(zip(sums_B.tolist(), greedy_B.tolist(), strict=True))
