"""32 greedy tokens after a 16,384-token prompt: from the state, and the published way, which reads it all again.

LaCT-760M shapes in bfloat16; DeltaNet-1.3B beside it. Both ways use the same model and kernels in one process. Before
anything is timed, the hidden states of cached decoding are compared with those of re-reading, token by token.

    python benchmarks/decode.py [--prompt 16384] [--tokens 32] [--layers 24] [--repeats 5]
"""

from __future__ import annotations

import argparse
import statistics
from typing import Any

import torch
from refine_kernels.testing import relative_error
from report import Row, median_seconds, publish, time_row
from shapes import DELTANET_1B, LACT_760M
from torch import Tensor

from refine_harness.models.base import FastWeightLM
from refine_harness.models.decode import Decoder
from refine_harness.models.load import MODELS
from refine_harness.models.state import State

PIECE = 16384
"""Tokens that are read at once."""
HIDDEN = 3e-2
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
    model = build(shape)
    prompt = torch.randint(3, 32000, (1, asked.prompt), generator=torch.Generator().manual_seed(0)).cuda()
    tokens, error = check(model, prompt, asked.tokens)
    cached = median_seconds(lambda: from_state(model, prompt, asked.tokens), repeats=asked.repeats)
    reading = median_seconds(lambda: read(model, prompt), repeats=asked.repeats)
    again = median_seconds(lambda: by_rereading(model, prompt, tokens), repeats=1)
    ratio = again[0] / statistics.median(cached)
    small, large = (read(model, prompt.repeat(1, n)[:, : n * 1024])[0].nbytes for n in (1, 64))
    same = small == large
    peaks = [peak(model, prompt.repeat(1, 8)[:, :length]) for length in (16384, 131072)]
    return [
        Row(f"{name}: hidden states, cached against re-read", error, "relative", asked.tokens, f"at most {HIDDEN}", error <= HIDDEN),
        time_row(f"{name}: reading the prompt", reading),
        time_row(f"{name}: prompt and {asked.tokens} tokens, from the state", cached),
        Row(f"{name}: {asked.tokens} tokens by re-reading", again[0], "s", 1),
        Row(f"{name}: re-reading / from the state", ratio, "ratio", asked.repeats,
            None if goal is None else f"at least {goal:.0f}", None if goal is None else ratio >= goal),
        Row(f"{name}: a decoded token", (statistics.median(cached) - statistics.median(reading)) / asked.tokens * 1e3, "ms", asked.repeats),
        Row(f"{name}: state after 64K tokens / after 1K", large / small, "ratio", 1, "1", same),
        Row(f"{name}: state", large / 2**20, "MiB", 1),
        Row(f"{name}: peak memory reading 128K / 16K tokens", peaks[1] / peaks[0], "ratio", 1, "at most 1.1", peaks[1] <= 1.1 * peaks[0]),
    ]  # fmt: skip


def build(shape: dict[str, Any]) -> FastWeightLM:
    settings, family = MODELS[shape["model_type"]]
    torch.manual_seed(0)
    with torch.device("cuda"):
        model = family(settings(**{key: value for key, value in shape.items() if key != "model_type"}))
    return torch.nn.Module.to(model, torch.bfloat16).eval()


def read(model: FastWeightLM, prompt: Tensor) -> tuple[State, Tensor]:
    """The state after the prompt, and the hidden state of its last token, in pieces of constant size."""
    state = hidden_1D = None
    for start in range(0, prompt.shape[1], PIECE):
        reading = model.read(prompt[:, start : start + PIECE], state, forkable=False)
        state, hidden_1D = reading.state, reading.hidden[:, -1]
    assert state is not None and hidden_1D is not None
    return state, hidden_1D


def from_state(model: FastWeightLM, prompt: Tensor, count: int) -> Tensor:
    """Greedy tokens [count]: the prompt is read once."""
    state, hidden_1D = read(model, prompt)
    decoder = Decoder(model, state)
    tokens = []
    for _ in range(count):
        tokens.append(model.logits(hidden_1D).argmax(-1))
        hidden_1D = decoder.step(tokens[-1])
    return torch.cat(tokens)


def by_rereading(model: FastWeightLM, prompt: Tensor, tokens: Tensor) -> Tensor:
    """The hidden state before each token [count, D]: the prompt and all tokens so far are read for each."""
    hidden = []
    for n in range(len(tokens)):
        text = torch.cat((prompt, tokens[None, :n]), 1)
        hidden_1D = model.read(text, forkable=False).hidden[:, -1]
        model.logits(hidden_1D).argmax(-1)
        hidden.append(hidden_1D)
    return torch.cat(hidden)


def check(model: FastWeightLM, prompt: Tensor, count: int) -> tuple[Tensor, float]:
    """Greedy tokens, and how far the hidden states that they come from are from those of re-reading."""
    state, hidden_1D = read(model, prompt)
    decoder = Decoder(model, state)
    tokens, hidden = [], []
    for _ in range(count):
        hidden.append(hidden_1D.clone())
        tokens.append(model.logits(hidden_1D).argmax(-1))
        hidden_1D = decoder.step(tokens[-1])
    wanted_ND = by_rereading(model, prompt, torch.cat(tokens))
    return torch.cat(tokens), relative_error(torch.cat(hidden), wanted_ND)


def peak(model: FastWeightLM, text: Tensor) -> float:
    torch.cuda.reset_peak_memory_stats()
    read(model, text)
    return float(torch.cuda.max_memory_allocated())


if __name__ == "__main__":
    main()
