"""32 greedy tokens after a 16,384-token prompt: from the state, and the published way, which reads it all again.

LaCT-760M shapes in bfloat16; DeltaNet-1.3B beside it. Both ways use the same model and kernels in one process. Before
anything is timed, the hidden states of cached decoding are compared with those of re-reading, token by token.

    python benchmarks/decode.py [--prompt 16384] [--tokens 32] [--layers 24] [--repeats 5]
"""

from __future__ import annotations

import argparse
import statistics
import time
from functools import partial
from typing import Any

import torch
from refine_kernels.testing import MODEL_TOLERANCE, relative_error
from report import Row, median_seconds, publish
from shapes import DELTANET_1B, LACT_760M, build
from torch import Tensor

from refine_harness.models.base import FastWeightLM
from refine_harness.models.decode import Decoder
from refine_harness.models.state import State

PIECE = 16384
"""Tokens that are read at once."""
HIDDEN = MODEL_TOLERANCE["bfloat16"]["hidden"]
"""Largest relative difference of hidden states between the two ways, in bfloat16."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompt", type=int, default=16384)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--repeats", type=int, default=5)
    asked = parser.parse_args()
    rows = []
    for name, shape, goal in (("LaCT-760M", LACT_760M, 20.0), ("DeltaNet-1.3B", DELTANET_1B, None)):
        rows += measure(name, {**shape, "num_hidden_layers": asked.layers}, goal, asked)
        torch.cuda.empty_cache()
    print(publish("decode", rows))


@torch.no_grad()
def measure(name: str, shape: dict[str, Any], goal: float | None, asked: Any) -> list[Row]:
    model = build(shape).eval()
    prompt = torch.randint(3, 32000, (1, asked.prompt), generator=torch.Generator().manual_seed(0)).cuda()
    rows: list[Row] = []

    def add(what: str, value: float, unit: str, goal: str | None = None, passed: bool | None = None) -> None:
        print(f"{name}: {what}: {value:.4g} {unit}", flush=True)
        rows.append(Row(f"{name}: {what}", value, unit, asked.repeats, goal, passed))

    tokens, hidden_ND = greedy(model, prompt, asked.tokens)
    by_rereading(model, prompt, tokens[:2])  # lengths of either kind are compiled: multiples of 16 and others
    torch.cuda.synchronize()
    started = time.perf_counter()
    again_ND = by_rereading(model, prompt, tokens)
    torch.cuda.synchronize()
    again = time.perf_counter() - started
    error = relative_error(hidden_ND, again_ND)
    add("hidden states, cached from re-read", error, "relative", f"at most {HIDDEN}", error <= HIDDEN)
    reading = statistics.median(median_seconds(lambda: read(model, prompt), repeats=asked.repeats))
    # The second time records steps that the first one met, and the third finds the memory that recording gave back.
    answer = partial(greedy, model, prompt, asked.tokens)
    cached = statistics.median(median_seconds(answer, repeats=asked.repeats, warm_up=2))
    add("reading the prompt", reading, "s")
    add(f"prompt and {asked.tokens} tokens, from the state", cached, "s")
    add(f"{asked.tokens} tokens by re-reading", again, "s")
    wanted, reached = (None, None) if goal is None else (f"at least {goal:.0f}", again / cached >= goal)
    add("re-reading / from the state", again / cached, "ratio", wanted, reached)
    add("a decoded token", (cached - reading) / asked.tokens * 1e3, "ms")
    small, large = (read(model, prompt.repeat(1, 4)[:, : n * 1024])[0].nbytes for n in (1, 64))
    add("state", large / 2**20, "MiB")
    add("state after 64K tokens / after 1K", large / small, "ratio", "1", small == large)
    # Both lengths go on from a state; what reading starts with, before there is one, is another, smaller peak.
    peaks = [peak(model, prompt.repeat(1, 8)[:, :length]) for length in (2 * PIECE, 8 * PIECE)]
    growth = peaks[1] / peaks[0]
    add("peak memory, reading 128K / 32K tokens", growth, "ratio", "at most 1.1", growth <= 1.1)
    return rows


def read(model: FastWeightLM, prompt: Tensor) -> tuple[State, Tensor]:
    """The state after the prompt, and the hidden state of its last token, in pieces of constant size."""
    state = hidden_1D = None
    for start in range(0, prompt.shape[1], PIECE):
        reading = model.read(prompt[:, start : start + PIECE], state, forkable=False)
        state, hidden_1D = reading.state, reading.hidden[:, -1]
    assert state is not None and hidden_1D is not None
    return state, hidden_1D


def greedy(model: FastWeightLM, prompt: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Greedy tokens [count], and the hidden state before each [count, D]: the prompt is read once."""
    state, hidden_1D = read(model, prompt)
    decoder = Decoder(model, state)
    tokens, hidden = [], []
    for _ in range(count):
        hidden.append(hidden_1D.clone())
        tokens.append(model.logits(hidden_1D).argmax(-1))
        hidden_1D = decoder.step(tokens[-1])
    return torch.cat(tokens), torch.cat(hidden)


def by_rereading(model: FastWeightLM, prompt: Tensor, tokens: Tensor) -> Tensor:
    """The hidden state before each token [count, D]: the prompt and all tokens so far are read for each."""
    hidden = []
    for n in range(len(tokens)):
        text = torch.cat((prompt, tokens[None, :n]), 1)
        hidden_1D = model.read(text, forkable=False).hidden[:, -1]
        model.logits(hidden_1D).argmax(-1)
        hidden.append(hidden_1D)
    return torch.cat(hidden)


def peak(model: FastWeightLM, text: Tensor) -> float:
    """Bytes at most in use while the text is read, weights included."""
    torch.cuda.reset_peak_memory_stats()
    read(model, text)
    return float(torch.cuda.max_memory_allocated())


if __name__ == "__main__":
    main()
