"""What every fast-weight language model can do here: read text into a state, and fork that state anywhere.

A model is a stack of layers; a layer turns hidden states into hidden states and has a state of its own. `read`
is the whole interface to training and evaluation. `forward` gives the same to transformers (`generate`, PEFT,
`Trainer`): it is `read` with Hugging Face's names.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import pairwise
from typing import Any, ClassVar, TypeVar, cast

import torch
import torch.nn.functional as F
from refine_kernels import Known, Packing, linear_head
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from refine_harness.models.recorded import recorded
from refine_harness.models.state import State
from refine_harness.types import upload

Method = TypeVar("Method", bound=Callable[..., Any])

Tape = dict[str, Any]
"""What a layer keeps of a reading to rebuild its state at any position."""


@dataclass(frozen=True)
class Rows:
    """Where the tokens of a reading stand: how many of each row are real, and how many were read before them.

    Where rows differ in length, layers get the real tokens alone, packed into one row; `spread` makes rows of them.
    """

    T: int
    """Tokens per row, padding included."""
    lengths_B: Tensor | None
    """int64, real tokens of each row; None when no row is padded."""
    seen_B: Tensor
    """int64, tokens that each row's state has read."""
    seen: tuple[int, ...] | None = None
    """`seen_B` on the host, for models that ask for it with `host_rows`."""
    lengths: tuple[int, ...] = ()
    """Real tokens of each row on the host."""
    packing: Packing | None = None
    """How the real tokens are packed; None when no row is padded."""
    memo: dict[str, Any] = field(default_factory=dict, compare=False)
    """What layers of one kind work out once for all of them."""
    in_place: bool = False
    """Whether a layer may write into the state that it was given, and return its tensors."""

    @cached_property
    def positions_BT(self) -> Tensor:
        """int64 [B, T], each token's place in its whole text, from 0."""
        return self.seen_B[:, None] + torch.arange(self.T, device=self.seen_B.device)

    def packed(self, x_BTX: Tensor) -> Tensor:
        """The real tokens of rows as layers get them, [1, M, X]; rows without padding stay what they are."""
        return x_BTX if self.packing is None else self.packing.pack(x_BTX)

    def spread(self, x_1MX: Tensor) -> Tensor:
        """The inverse of `packed`, [B, T, X]; padding is zeros."""
        return x_1MX if self.packing is None else self.packing.spread(x_1MX)

    @cached_property
    def ends_B1(self) -> Tensor:
        """int64 [B, 1], index of each row's last real token."""
        if self.lengths_B is None:
            return torch.full_like(self.seen_B[:, None], self.T - 1)
        return self.lengths_B[:, None] - 1


class FastWeightLayer(nn.Module):
    """One layer: B rows of T hidden states in, the same out, and its state after each row's last real token.

    Where `Rows.packing` is there, the rows come and go as one of M, the real tokens alone: [1, M, D] for [B, T, D].
    """

    def forward(
        self, x_BTD: Tensor, state: dict[str, Tensor] | None, rows: Rows, forkable: bool
    ) -> tuple[Tensor, dict[str, Tensor], Tape | None]:
        """Outputs [B, T, D], the state after each row's real tokens, and the tape if `forkable`."""
        raise NotImplementedError

    def fork(self, tape: Tape, positions_BC: Tensor) -> dict[str, Tensor]:
        """The state after token positions_BC[b, c] of row b, for B·C rows in row-major order; differentiable."""
        raise NotImplementedError

    def branch(self, tape: Tape, positions_BC: Tensor) -> Branch:
        """Reading a few tokens after those positions from the tape; of layers whose model `reads_branches`."""
        raise NotImplementedError


class Branch(ABC):
    """How a layer reads a few tokens after F positions of a reading."""

    @abstractmethod
    def __call__(self, x_RKD: Tensor, rows: Rows) -> Tensor:
        """The layer's outputs [R, K, D]; R = F·N, every position's N rows side by side. Differentiable."""

    @abstractmethod
    def stand_in(self) -> Branch:
        """The same with what it reads in memory of its own, so that it can be recorded; without gradients."""

    @abstractmethod
    def load(self, other: Branch) -> None:
        """Make a stand-in read what another branch does, of a text that may be longer or shorter."""


@dataclass(frozen=True)
class Reading:
    """One pass over B texts."""

    hidden: Tensor
    """[B, T, D], after the final norm. What stands for padding has no meaning."""
    state: State
    """After each row's last real token."""
    model: FastWeightLM
    tapes: tuple[Tape, ...] | None
    """Of each layer; None where the reading cannot be forked."""
    seen_B: Tensor
    """int64, tokens that each text had before this pass."""

    def states_at(self, positions_BC: Tensor, *, once: bool = False) -> State:
        """The state after `tokens[b, : p + 1]` for every p in row b of positions; B·C rows, row-major.

        positions_BC: int64 in [-1, length of the row); -1 is the state that the reading started from.
        once: the state may lie in memory that is used again after its backward, which makes repeated calls fast on a
            GPU (see `recorded`).
        Exact, and differentiable: what is learned from a fork flows into the reading as if the prefix had been read
        again. Raises RuntimeError when the reading was made with forkable=False.
        """
        if self.tapes is None:
            raise RuntimeError("this reading kept no tape: call read(..., forkable=True) to fork it")
        forks = self.model.fork_layers(self.tapes, positions_BC, once=once)
        return State(forks, (self.seen_B[:, None] + positions_BC + 1).reshape(-1))

    def at(self, positions_BC: Tensor) -> Tensor:
        """Hidden states at those positions, [B, C, D]."""
        return self.hidden.gather(1, positions_BC[..., None].expand(-1, -1, self.hidden.shape[-1]))


class StateCache:
    """A `State` under the name and the few methods that transformers' generation asks of a cache."""

    is_compileable = False

    def __init__(self, state: State):
        self.state = state

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Most tokens read by any row."""
        return int(self.state.seen_R.max())

    def get_max_cache_shape(self, layer_idx: int = 0) -> int:
        """-1: a fast-weight state has no longest text."""
        return -1

    def reorder_cache(self, rows: Tensor) -> None:
        """Follow beam search's choice of rows."""
        self.state = self.state.select(rows)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row several times, for several continuations of one prompt."""
        self.state = self.state.repeat(repeats)

    def batch_select_indices(self, rows: Tensor) -> None:
        """Some rows."""
        self.state = self.state.select(rows)


def uncompiled(method: Method) -> Method:
    """Leave a method as it is under torch.compile.

    Operations choose their kernels as they run, which would break its graph into dozens of pieces, made again for
    every length; and they are fused already.
    """
    return cast(Any, torch.compiler.disable)(method)


class FastWeightLM(PreTrainedModel):
    """A causal language model whose memory of a prefix is a `State`."""

    supports_gradient_checkpointing = True
    _is_stateful = True
    host_rows: ClassVar[bool] = False
    """Whether the layers need `Rows.seen`, which costs a wait for the device where its state has not said it yet."""

    recordable: bool = False
    """Whether reading does the same operations whatever was read before, and waits for the device nowhere."""

    fixed_state: bool = True
    """Whether a state's shapes are the same after any text; a subclass or a model of which that is not true says so."""

    alike_every: int = 1
    """Rows that have read different multiples of so many tokens are read on together as fast as rows that began."""

    gradient_checkpointing = False
    _gradient_checkpointing_func: Callable[..., Any]

    @property
    def layers(self) -> Sequence[FastWeightLayer]:
        """The stack, in order."""
        raise NotImplementedError

    def embed(self, tokens_BT: Tensor) -> Tensor:
        """Input embeddings [B, T, D]."""
        raise NotImplementedError

    def final_norm(self, x_BTD: Tensor) -> Tensor:
        """The norm before the head."""
        raise NotImplementedError

    @property
    def head_weight(self) -> Tensor:
        """The output embedding [V, D]."""
        raise NotImplementedError

    @uncompiled
    def read(
        self,
        tokens_BT: Tensor,
        state: State | None = None,
        lengths: Tensor | None = None,
        forkable: bool = True,
        in_place: bool = False,
    ) -> Reading:
        """Read B texts, going on from `state`.

        Args:
            tokens_BT: int64; rows shorter than T are padded on the right.
            state: one row per row of tokens; None for texts that begin here.
            lengths: int64 [B], real tokens per row, at least 1; None when no row is padded. Padding is not computed and
                enters no state. From the host: those on a device are fetched, which waits for it.
            forkable: keep what `Reading.states_at` needs. False saves memory when only the last state is wanted.
            in_place: layers that can save a copy by it write into the tensors of `state`, which then has no meaning any
                more; only the reading's own does. Without gradients and forks.
        """
        assert not (in_place and (forkable or torch.is_grad_enabled()))
        rows = replace(self._rows(tokens_BT, state, lengths), in_place=in_place)
        x_BTD = self.embed(rows.packed(tokens_BT))
        states: list[dict[str, Tensor]] = []
        tapes: list[Tape] = []
        for i, layer in enumerate(self.layers):
            run = self._checkpointed(layer) if self.gradient_checkpointing and torch.is_grad_enabled() else layer
            x_BTD, after, tape = run(x_BTD, None if state is None else state.layers[i], rows, forkable)
            states.append(after)
            if tape is not None:
                tapes.append(tape)
        after = State(tuple(states), rows.seen_B + (rows.T if rows.lengths_B is None else rows.lengths_B))
        if rows.seen is not None:
            after.assume_seen(tuple(a + b for a, b in zip(rows.seen, rows.lengths, strict=True)))
        hidden_BTD = rows.spread(self.final_norm(x_BTD))
        return Reading(hidden_BTD, after, self, tuple(tapes) if forkable else None, rows.seen_B)

    def fork_layers(self, tapes: Sequence[Tape], positions_BC: Tensor, *, once: bool) -> tuple[dict[str, Tensor], ...]:
        """Every layer's state at the positions; see `Reading.states_at`."""
        return tuple(layer.fork(tape, positions_BC) for layer, tape in zip(self.layers, tapes, strict=True))

    def reads_branches(self, tapes: Sequence[Tape], positions_BC: Tensor, length: int) -> Tensor | None:
        """bool [B, C], after which positions layers can read `length` tokens from the tape, without a state.

        None: after none, ever. Layers read after the others, too, but what they say is wrong. See
        `refine_harness.models.branches`.
        """
        return None

    def continued(self, tokens_RK: Tensor, states: State) -> Tensor:
        """Hidden states [R, K, D] of tokens read from states and read no further: on a GPU without time for launches.

        They lie in memory that is used again after their backward.

        states: of F rows, each for the next R / F rows of tokens.
        """
        rollouts = len(tokens_RK) // len(states)
        if not self.recordable:
            return self.read(tokens_RK, states.repeat(rollouts), forkable=False).hidden
        names = tuple(tuple(layer) for layer in states.layers)

        def piece(tokens_RK: Tensor, seen_F: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
            supply = iter(tensors)
            layers = tuple({name: next(supply) for name in layer} for layer in names)
            return (self.read(tokens_RK, State(layers, seen_F).repeat(rollouts), forkable=False).hidden,)

        tensors = [layer[name] for layer, of in zip(states.layers, names, strict=True) for name in of]
        checkpointing, self.gradient_checkpointing = self.gradient_checkpointing, False  # of so few tokens, none
        try:
            return recorded(self, "rollouts", piece, [tokens_RK, states.seen_R, *tensors])[0]
        finally:
            self.gradient_checkpointing = checkpointing

    def _rows(self, tokens_BT: Tensor, state: State | None, given_B: Tensor | None) -> Rows:
        B, T = tokens_BT.shape
        seen_B = torch.zeros(B, dtype=torch.int64, device=tokens_BT.device) if state is None else state.seen_R
        seen = None if not self.host_rows else (0,) * B if state is None else state.seen
        lengths = (T,) * B if given_B is None else tuple(given_B.tolist())
        if given_B is None or min(lengths) == T:
            return Rows(T, None, seen_B, seen, lengths)
        lengths_B = upload(given_B, tokens_BT.device)
        return Rows(T, lengths_B, seen_B, seen, lengths, Packing(lengths, lengths_B, T))

    def _checkpointed(self, layer: FastWeightLayer) -> Callable[..., Any]:
        """The layer, its activations made again in the backward pass instead of stored."""
        return lambda *arguments: self._gradient_checkpointing_func(layer.__call__, *arguments)

    def step_kind(self, seen: Sequence[int]) -> Hashable | None:
        """Steps of one kind are the same sequence of operations; None is a kind of its own each time.

        seen: tokens that each row has read, before it reads one more. LaCT's step is another where rows' chunks are
        full, and their fast weights are updated.
        """
        return 0

    def place_of(self, kind: Hashable, rows: int) -> tuple[int, ...]:
        """Tokens read by each of so many rows such that the next step is of that kind."""
        return (1,) * rows

    def logits(self, hidden: Tensor) -> Tensor:
        """Next-token logits [..., V] of hidden states [..., D] after the final norm."""
        return F.linear(hidden, self.head_weight)

    def label_logprobs(
        self, hidden_MD: Tensor, labels_M: Tensor, known: Known | None = None, ahead_M: Tensor | None = None
    ) -> Known:
        """Log-probability of each row's label, entropy and log-normaliser of its distribution, without M × V logits.

        known: what a call without gradients returned, to be attached now (see `refine_kernels.linear_head`).
        ahead_M: what the gradient of the log-probabilities will be, up to one factor, where that is known.
        """
        return linear_head(hidden_MD, self.head_weight, labels_M, known=known, ahead_M=ahead_M)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: StateCache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        return_dict: bool | None = None,
        cu_seqlens: Tensor | None = None,
        **_: Any,
    ) -> CausalLMOutputWithPast | tuple:
        """`read` with transformers' names. A mask may pad on either side; padding never enters the state.

        Args:
            labels: int64 [B, T], shifted here; -100 is left out.
            logits_to_keep: as in transformers.
            cu_seqlens: int [N + 1], where each of N texts starts in the one row of `input_ids`, and its end, as in fla.
                Each text is read alone; the cache then has a row for each.
        """
        if cu_seqlens is not None:
            return self._forward_packed(input_ids, cu_seqlens, labels, logits_to_keep, use_cache, return_dict)
        T = input_ids.shape[1]
        lengths_B, shift_B = _padding(attention_mask, T)
        tokens_BT = input_ids if shift_B is None else _rolled(input_ids, shift_B)
        reading = self.read(
            tokens_BT,
            None if past_key_values is None else past_key_values.state,
            lengths_B,
            forkable=False,
        )
        hidden_BTD = reading.hidden if shift_B is None else _rolled(reading.hidden, -shift_B)
        return self._output(hidden_BTD, reading.state, labels, logits_to_keep, use_cache, return_dict)

    def _forward_packed(
        self, tokens_1M: Tensor, cu_seqlens: Tensor, labels_1M: Tensor | None, *options: Any
    ) -> CausalLMOutputWithPast | tuple:
        """Every text as a row of its own, and their outputs packed again."""
        starts = cu_seqlens.tolist()
        lengths = [stop - start for start, stop in pairwise(starts)]
        if tokens_1M.shape[0] != 1 or min(lengths, default=0) < 1 or [starts[0], starts[-1]] != [0, tokens_1M.shape[1]]:
            raise ValueError(
                f"cu_seqlens {starts} do not cut one row of {tokens_1M.shape[1]} tokens into texts (input_ids have "
                f"{tokens_1M.shape[0]} rows); give 0, the end of each text in order, and the number of tokens."
            )
        rows = pad_sequence(list(tokens_1M[0].split(lengths)), batch_first=True)
        reading = self.read(rows, lengths=torch.tensor(lengths), forkable=False)
        hidden_1MD = torch.cat([x[:n] for x, n in zip(reading.hidden, lengths, strict=True)])[None]
        if labels_1M is not None:  # the first token of a text follows nothing
            labels_1M = labels_1M.clone()
            labels_1M[0, starts[1:-1]] = -100
        return self._output(hidden_1MD, reading.state, labels_1M, *options)

    def _output(
        self,
        hidden_BTD: Tensor,
        state: State,
        labels: Tensor | None,
        logits_to_keep: int | Tensor,
        use_cache: bool | None,
        return_dict: bool | None,
    ) -> CausalLMOutputWithPast | tuple:
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) and logits_to_keep else slice(None)
        logits = self.logits(hidden_BTD[:, logits_to_keep if isinstance(logits_to_keep, Tensor) else keep])
        loss = None
        if labels is not None:
            wide = logits.dtype if logits.dtype == torch.float64 else torch.float32
            loss = F.cross_entropy(logits[:, :-1].reshape(-1, logits.shape[-1]).to(wide), labels[:, 1:].reshape(-1))
        if use_cache is None:
            use_cache = bool(self.config.use_cache) and not self.training
        cache = StateCache(state) if use_cache else None
        if return_dict is False:
            return tuple(part for part in (loss, logits, cache) if part is not None)
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=cache)  # pyright: ignore[reportArgumentType]

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False  # generate() then takes the cache that forward returns

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        past_key_values: StateCache | None = None,
        attention_mask: Tensor | None = None,
        use_cache: bool | None = None,
        **_: Any,
    ) -> dict[str, Any]:
        """The whole prompt first, then only the token that the state has not read."""
        if past_key_values is not None:
            input_ids, attention_mask = input_ids[:, -1:], None
        return {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "past_key_values": past_key_values,
            "use_cache": use_cache,
            "logits_to_keep": 1,
        }


def _padding(mask: Tensor | None, T: int) -> tuple[Tensor | None, Tensor | None]:
    """Lengths, and how far each row must move left for its padding to be on the right; None where nothing is padded."""
    if mask is None or mask.shape[1] < T:
        return None, None
    mask = mask[:, -T:].to(torch.int64)
    lengths_B = mask.sum(1)
    if bool((lengths_B == T).all()):
        return None, None
    first_B = mask.argmax(1)
    return lengths_B, first_B if bool((first_B > 0).any()) else None


def _rolled(x: Tensor, shift_B: Tensor) -> Tensor:
    """Row b of x rolled left by shift_B[b] along the second dimension."""
    T = x.shape[1]
    index = (torch.arange(T, device=x.device)[None] + shift_B[:, None]) % T
    return x.gather(1, index.view(*index.shape, *[1] * (x.dim() - 2)).expand_as(x))
