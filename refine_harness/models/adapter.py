"""Any causal language model of flash-linear-attention under our contract: slower than the native models, and exact.

fla's models compute themselves; this file gives them `read` and a `State`, in one of two ways.

`ContinuingLM` goes on from fla's cache, whose tensors are the state (`recurrent_state`, `conv_state.0`, ...). It takes
the model types in `CONTINUED`: those whose kernels continue a text exactly and return gradients of the states they
start from. Where a native model needs one pass, it can need several:

- `states_at` reads the text again, in pieces that end at the positions, and keeps the cache after each piece.
- A padded batch is read in pieces that end where its rows end, so that padding enters no state.
- Layers that count tokens (rotary positions, attention) cannot continue rows of different ages together: rows that
  have seen different numbers of tokens are read in one pass per number.
- Model types in `ONE_TOKEN_STEPS` continue by one token a pass. Give them whole prompts, not pieces of prompts.

`RereadingLM` takes every other type. Its state is the text itself, which every reading reads again from its start.
It costs time, and a state grows with its text; in return a state's gradients are right whatever the kernels do.
`State.detach` does not cut them: a text has none.

Attention's keys and values are histories: their second dimension is time, aligned to the right (see `State`).

    B rows   T tokens   C positions of a row   D hidden size   S tokens of a history
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar, cast

import torch
from refine_kernels import fla_models
from refine_kernels.choose import ImplementationError
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel

from refine_harness.errors import ModelError
from refine_harness.models.base import FastWeightLM, Reading, Tape, uncompiled
from refine_harness.models.state import State

ONE_TOKEN_STEPS = frozenset({"mamba", "mamba2"})
"""Model types whose layers in fla start from a cache with a single token only."""

CONTINUED = ONE_TOKEN_STEPS | {
    "comba",
    "gla",
    "gsa",
    "hgrn2",
    "kda",
    "linear_attn",
    "precond_kda",
    "raven",
    "retnet",
    "rwkv7",
}
"""Model types of fla 0.6 that continue from their cache exactly, gradients included, found by comparing with reading
again. Not among them: what keeps no cache, drops a gradient (hgrn, rwkv6) or only nearly continues (abc, mesa_net)."""

_PARTS = ("recurrent_state", "attn_state", "conv_state", "ffn_state")
"""What fla's cache keeps of a layer."""

_HISTORY = "attn_state"
"""The part whose second dimension is time."""

_TEXT = "text"
"""What `RereadingLM` keeps: the tokens read so far, int64 [R, S], aligned to the right."""


def adapted_classes(kind: str) -> tuple[type[PretrainedConfig], type[AdaptedLM]]:
    """fla's config class for a model_type, and its model class with our `read`.

    Raises ModelError, the end of a sentence, when fla cannot be imported here or has no such model.
    """
    try:
        known = fla_models.causal_lms()
    except ImplementationError as error:
        raise ModelError(f"{error}. Install Triton, on a machine with a GPU.") from None
    if kind not in known:
        raise ModelError("flash-linear-attention has no such model either. Check its config.json.")
    config, model = known[kind]
    return config, adapted(model)


def check_device(kind: str, device: torch.device) -> None:
    """Raise ModelError when fla's models cannot compute on `device`."""
    if (reason := fla_models.why_not(device)) is not None:
        raise ModelError(
            f"a {kind} model is computed by flash-linear-attention and cannot run on {device}: {reason}. "
            "Use device=cuda, or one of the native models."
        )


@cache
def adapted(model_class: type[PreTrainedModel]) -> type[AdaptedLM]:
    """`model_class` of fla with our `read`: parameters, config and saved files stay fla's own, names included."""
    config = cast(type[PretrainedConfig], model_class.config_class)
    kind = config.model_type
    stepwise = kind in ONE_TOKEN_STEPS
    # The steps of mamba_ssm, which fla prefers where it is installed, pass no gradients.
    continued = kind in CONTINUED and not (stepwise and fla_models.has_mamba_kernels())
    body = {"__module__": __name__, "config_class": config, "one_token_steps": stepwise}
    base = ContinuingLM if continued else RereadingLM
    return cast(type[AdaptedLM], type(model_class.__name__, (base, model_class, GenerationMixin), body))


@dataclass(frozen=True)
class AdaptedReading(Reading):
    """A reading whose model forks it."""

    def states_at(self, positions_BC: Tensor, *, once: bool = False) -> State:
        if self.tapes is None:
            return super().states_at(positions_BC)  # which says what is missing
        return cast(AdaptedLM, self.model).fork(self.tapes[0], positions_BC)


class AdaptedLM(FastWeightLM):
    """What both ways share; `adapted` joins one of them to a model class of fla."""

    fixed_state = False
    base_model: Any
    model: Any

    @property
    def headless(self) -> Any:
        """fla's model without its head; some name no `base_model_prefix`, and theirs is `model`."""
        return self.model if self.base_model is self else self.base_model

    @property
    def head_weight(self) -> Tensor:
        return cast(Tensor, cast(Any, self.get_output_embeddings()).weight)

    def embed(self, tokens_BT: Tensor) -> Tensor:
        return cast(Any, self.get_input_embeddings())(tokens_BT)

    @uncompiled
    def read(
        self,
        tokens_BT: Tensor,
        state: State | None = None,
        lengths: Tensor | None = None,
        forkable: bool = True,
        in_place: bool = False,
    ) -> AdaptedReading:
        B, T = tokens_BT.shape
        ends = [(T,)] * B if lengths is None else [(end,) for end in lengths.tolist()]
        hidden_BTD, after = self._read(tokens_BT, state, ends)
        seen_B = torch.zeros_like(after.seen_R) if state is None else state.seen_R
        tape: Tape = {"tokens": tokens_BT, "start": state}
        return AdaptedReading(hidden_BTD, after, self, (tape,) if forkable else None, seen_B)

    def fork(self, tape: Tape, positions_BC: Tensor) -> State:
        """As `Reading.states_at`."""
        raise NotImplementedError

    def _read(self, tokens_BT: Tensor, start: State | None, ends: Sequence[Sequence[int]]) -> tuple[Tensor, State]:
        """Hidden states [B, T, D], and the state after the first `end` tokens of each row for each of its ends."""
        raise NotImplementedError


class ContinuingLM(AdaptedLM):
    """A state is fla's cache as named tensors."""

    supports_gradient_checkpointing = False  # under it fla's layers are given no cache
    one_token_steps: ClassVar[bool] = False
    """Whether a state is continued by one token a pass only."""

    _ages_matter: bool | None = None  # None until a pass has shown it

    def fork(self, tape: Tape, positions_BC: Tensor) -> State:
        ends = [[position + 1 for position in row] for row in positions_BC.tolist()]
        longest = max(1, *(end for row in ends for end in row))
        return self._read(tape["tokens"][:, :longest], tape["start"], ends)[1]

    def _read(self, tokens_BT: Tensor, start: State | None, ends: Sequence[Sequence[int]]) -> tuple[Tensor, State]:
        if start is None:
            return self._read_together(tokens_BT, None, ends)
        groups = self._groups(start)
        if len(groups) == 1:
            return self._read_together(tokens_BT, _of_one_age(start), ends)
        read = [
            self._read_together(tokens_BT[rows], _of_one_age(start.select(rows)), [ends[row] for row in rows])
            for rows in groups
        ]
        rows = [row for group in groups for row in group]
        forks = [(row, c) for row in rows for c in range(len(ends[row]))]
        hidden_BTD = torch.cat([hidden for hidden, _ in read])[_sorting(rows)]
        return hidden_BTD, State.cat([state for _, state in read]).select(_sorting(forks))

    def _groups(self, start: State) -> list[list[int]]:
        """Rows that can be continued in one pass; those that have read nothing start afresh, apart from the rest."""
        ages = start.seen if self._ages_matter is not False else [min(age, 1) for age in start.seen]
        return [[row for row, other in enumerate(ages) if other == age] for age in sorted(set(ages))]

    def _read_together(
        self, tokens_BT: Tensor, start: State | None, ends: Sequence[Sequence[int]]
    ) -> tuple[Tensor, State]:
        """As `_read`, for rows that can share a pass: the text is cut at the ends."""
        cuts = sorted({end for row in ends for end in row if end > 0} | {tokens_BT.shape[1]})
        states = {} if start is None else {0: start}
        pieces: list[Tensor] = []
        for before, cut in zip((0, *cuts), cuts, strict=False):
            if self.one_token_steps and start is None:  # one pass over the prefix is faster than a pass per token
                hidden, states[cut] = self._pass(tokens_BT[:, :cut], None)
                pieces.append(hidden[:, before:])
            else:
                hidden, states[cut] = self._continue(tokens_BT[:, before:cut], states.get(before))
                pieces.append(hidden)
        states.setdefault(0, _unread(states[cuts[0]]))
        picks = [(end, row) for row, several in enumerate(ends) for end in several]
        return torch.cat(pieces, 1), _picked(states, picks)

    def _continue(self, tokens_BT: Tensor, state: State | None) -> tuple[Tensor, State]:
        if state is None or not self.one_token_steps:
            return self._pass(tokens_BT, state)
        pieces: list[Tensor] = []
        for token_B1 in tokens_BT.split(1, 1):
            hidden, state = self._pass(token_B1, state)
            pieces.append(hidden)
        return torch.cat(pieces, 1), state

    def _pass(self, tokens_BT: Tensor, state: State | None) -> tuple[Tensor, State]:
        """One call of fla's model. Its layers may change the cache in place, so they are given copies."""
        B, T = tokens_BT.shape
        ages = (0,) * B if state is None else state.seen
        layers = [] if state is None else [_nested(layer) for layer in state.layers]
        cache = fla_models.new_cache(layers, ages[0])
        out = self.headless(input_ids=tokens_BT, past_key_values=cache, use_cache=True, return_dict=True)
        kept = tuple(dict(_named(layer)) for layer in cache)
        self._check(kept, B)
        histories = any(_is_history(name) for layer in kept for name in layer)
        self._ages_matter = bool(self._ages_matter) or cache.asked or histories
        after = State(kept, tokens_BT.new_full((B,), T) if state is None else state.seen_R + T)
        after.assume_seen(tuple(age + T for age in ages))
        return out.last_hidden_state, after

    def _check(self, kept: Sequence[dict[str, Any]], B: int) -> None:
        for i, layer in enumerate(kept):
            for name, x in layer.items():
                if not isinstance(x, Tensor) or x.shape[:1] != (B,):
                    raise ModelError(
                        f"flash-linear-attention's {self.config.model_type} keeps {name} of layer {i} in a form that "
                        "has no row per text. Use version 0.6 of flash-linear-attention."
                    )


class RereadingLM(AdaptedLM):
    """A state is the text read so far."""

    def fork(self, tape: Tape, positions_BC: Tensor) -> State:
        return _texts(tape["tokens"], tape["start"], (positions_BC + 1).tolist())

    def _read(self, tokens_BT: Tensor, start: State | None, ends: Sequence[Sequence[int]]) -> tuple[Tensor, State]:
        after = _texts(tokens_BT, start, ends)
        if start is None:
            return self._hidden(tokens_BT), after
        whole = [torch.cat(row) for row in zip(_pasts(start), tokens_BT, strict=True)]
        hidden_BSD = self._hidden(pad_sequence(whole, batch_first=True))  # what pads a row comes after it
        places_BT1 = (start.seen_R[:, None] + torch.arange(tokens_BT.shape[1], device=tokens_BT.device))[..., None]
        return hidden_BSD.gather(1, places_BT1.expand(-1, -1, hidden_BSD.shape[-1])), after

    def _hidden(self, tokens_BT: Tensor) -> Tensor:
        return self.headless(input_ids=tokens_BT, use_cache=False, return_dict=True).last_hidden_state


def _pasts(start: State) -> list[Tensor]:
    """Each row's text, without the zeros in front."""
    past_RS = start.layers[0][_TEXT]
    return [past_S[len(past_S) - age :] for past_S, age in zip(past_RS, start.seen, strict=True)]


def _texts(tokens_BT: Tensor, start: State | None, ends: Sequence[Sequence[int]]) -> State:
    """The state of each row after its first `end` tokens, for each of its ends."""
    pasts = [tokens_BT[0, :0]] * len(ends) if start is None else _pasts(start)
    texts = [
        torch.cat((past, row[:end]))
        for past, row, several in zip(pasts, tokens_BT, ends, strict=True)
        for end in several
    ]
    seen = tuple(len(text) for text in texts)
    after = State(
        ({_TEXT: pad_sequence(texts, batch_first=True, padding_side="left")},),
        torch.tensor(seen, device=tokens_BT.device),
    )
    after.assume_seen(seen)
    return after


def _named(part: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """The tensors in nested dictionaries and tuples, under names joined by dots; what is None is left out."""
    if isinstance(part, dict | tuple | list):
        for key, inner in part.items() if isinstance(part, dict) else enumerate(part):
            yield from _named(inner, f"{name}.{key}" if name else str(key))
    elif part is not None:
        yield name, part


def _nested(layer: dict[str, Tensor]) -> dict[str, Any] | None:
    """A layer's state as fla's cache keeps it, in memory of its own: the inverse of `_named`."""
    return {part: _rebuilt(layer, part) for part in _PARTS} if layer else None


def _rebuilt(layer: dict[str, Tensor], name: str) -> Any:
    if name in layer:
        return layer[name].clone()
    inner = {key.removeprefix(f"{name}.").split(".")[0] for key in layer if key.startswith(f"{name}.")}
    return tuple(_rebuilt(layer, f"{name}.{i}") for i in range(max(map(int, inner)) + 1)) if inner else None


def _is_history(name: str) -> bool:
    return name.split(".")[0] == _HISTORY


def _of_one_age(state: State) -> State | None:
    """Rows that have seen the same number of tokens, without the zeros in front of their histories; None for none."""
    age = state.seen[0]
    if age == 0:
        return None
    layers = ({n: x[:, -age:] if _is_history(n) else x for n, x in layer.items()} for layer in state.layers)
    return State(tuple(layers), state.seen_R)


def _unread(like: State) -> State:
    """A state that has read nothing, in the shape of another; `ContinuingLM` starts such rows afresh."""
    layers = ({name: torch.zeros_like(x) for name, x in layer.items()} for layer in like.layers)
    return State(tuple(layers), torch.zeros_like(like.seen_R))


def _picked(states: dict[int, State], picks: Sequence[tuple[int, int]]) -> State:
    """Rows of several states, as (which state, which row) in the order wanted."""
    wanted = sorted({key for key, _ in picks})
    rows = {key: [row for other, row in picks if other == key] for key in wanted}
    parts = [
        states[key] if rows[key] == [*range(len(states[key]))] else states[key].select(rows[key]) for key in wanted
    ]
    if len(parts) == 1:
        return parts[0]
    places = [i for key in wanted for i, pick in enumerate(picks) if pick[0] == key]
    return State.cat(parts).select(_sorting(places))


def _sorting(items: Sequence[Any]) -> list[int]:
    """The indices that put `items` in order."""
    return sorted(range(len(items)), key=lambda i: items[i])
