"""A next-token step of DeltaNet-1.3B at 16,384 tokens, ours beside stock flash-linear-attention: time and memory.

Both run in one process on the same GPU with the same weights, dtype (bfloat16) and text, fla with its fused
cross-entropy, turn and turn about. Before anything is timed, the gradients of both are compared, on two layers: in a
deep stack of random ones rounding decides (`parity.py` compares trained weights).

    python benchmarks/ntp.py [--tokens 16384] [--documents 1] [--layers 24] [--repeats 7]
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from refine_kernels.testing import MODEL_TOLERANCE, relative_error
from report import Row, peak_bytes, publish
from shapes import DELTANET_1B

from refine_harness.algorithm import refine_step
from refine_harness.config import Algorithm
from refine_harness.models import DeltaNetConfig, DeltaNetForCausalLM
from refine_harness.types import Batch

NTP = Algorithm(lambda_rl=0.0)
GRADIENTS = MODEL_TOLERANCE["bfloat16"]["gradient"]
"""Largest relative difference of all gradients as one vector; `parity.py` compares every parameter with float64."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--documents", type=int, default=1)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--repeats", type=int, default=7)
    asked = parser.parse_args()
    print(publish("ntp", beside_fla(asked.tokens, asked.documents, asked.layers, asked.repeats)))


def beside_fla(tokens: int, documents: int, layers: int, repeats: int) -> list[Row]:
    """The table: differences of gradients and loss, then times and memory and their ratios, with goals."""
    from fla.models import DeltaNetConfig as StockConfig
    from fla.models import DeltaNetForCausalLM as StockModel
    from refine_kernels.fla import load_tuned

    load_tuned()  # stock fla profits from the tuned choices too
    text = torch.randint(3, 32000, (documents, tokens), generator=torch.Generator().manual_seed(0)).cuda()
    batch = Batch(text, torch.full((documents,), tokens, device="cuda"))

    def pair(layers: int) -> tuple[Any, Any, dict[str, Callable[[], Any]]]:
        shape = {**DELTANET_1B, "num_hidden_layers": layers}
        shape.pop("model_type")
        torch.manual_seed(0)
        with torch.device("cuda"):
            ours, stock = DeltaNetForCausalLM(DeltaNetConfig(**shape)), StockModel(StockConfig(**shape))
        for model in (ours, stock):
            torch.nn.Module.to(model.train(), "cuda", torch.bfloat16)
        stock.load_state_dict(ours.state_dict())
        return ours, stock, {"ours": lambda: our_step(ours, batch), "stock": lambda: stock_step(stock, text)}

    worst, loss_error = compare(*pair(2))
    ours, stock, steps = pair(layers)
    for step in steps.values():
        step()
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    peaks = {name: peak_bytes(fresh(steps[name], model)) for name, model in (("ours", ours), ("stock", stock))}
    for _ in range(repeats):
        for name, model in (("ours", ours), ("stock", stock)):
            seconds[name].append(timed(steps[name], model))
    median = {name: statistics.median(values) for name, values in seconds.items()}
    ratio, memory = median["ours"] / median["stock"], peaks["ours"] / peaks["stock"]
    parameters = sum(p.numel() for p in ours.parameters())
    return [
        Row("gradient difference", worst, "relative", 1, f"at most {GRADIENTS}", worst <= GRADIENTS),
        Row("loss difference", loss_error, "relative", 1, "at most 0.001", loss_error <= 1e-3),
        Row("NTP step, ours", median["ours"], "s", repeats),
        Row("NTP step, stock fla", median["stock"], "s", repeats),
        Row("NTP step, ours / stock fla", ratio, "ratio", repeats, "at most 1.0", ratio <= 1.0),
        Row("peak memory, ours", peaks["ours"] / 2**30, "GiB", 1),
        Row("peak memory, stock fla", peaks["stock"] / 2**30, "GiB", 1),
        Row("peak memory, ours / stock fla", memory, "ratio", 1, "at most 1.0", memory <= 1.0),
        Row(
            "achieved, ours (6 · parameters · tokens)",
            6 * parameters * text.numel() / median["ours"] / 1e12,
            "TFLOP/s",
            1,
        ),
    ]


def our_step(model: DeltaNetForCausalLM, batch: Batch) -> torch.Tensor:
    losses = refine_step(model, batch, NTP, [])
    loss = losses.ntp_sum / losses.ntp_count
    loss.backward()
    return loss.detach()


def stock_step(model: Any, text: torch.Tensor) -> torch.Tensor:
    loss = model(text, labels=text).loss
    loss.backward()
    return loss.detach()


def compare(ours: Any, stock: Any, steps: dict[str, Callable[[], torch.Tensor]]) -> tuple[float, float]:
    """Relative differences of all gradients as one vector, and of the loss; compiles all kernels."""
    losses = {name: step() for name, step in steps.items()}
    theirs = dict(stock.named_parameters())
    pairs = [(p.grad, theirs[name].grad) for name, p in ours.named_parameters()]
    off = sum((a.double() - b.double()).square().sum() for a, b in pairs) ** 0.5
    scale = sum(b.double().square().sum() for _, b in pairs) ** 0.5
    return float(off / scale), relative_error(losses["ours"], losses["stock"])


def timed(step: Callable[[], Any], model: Any) -> float:
    """Seconds of a forward and a backward, gradients into memory that is there."""
    for p in model.parameters():
        p.grad.zero_()
    torch.cuda.synchronize()
    started = time.perf_counter()
    step()
    torch.cuda.synchronize()
    return time.perf_counter() - started


def fresh(step: Callable[[], Any], model: Any) -> Callable[[], Any]:
    """The step with gradients that are not there yet, which it then makes."""

    def run() -> None:
        for p in model.parameters():
            p.grad = None
        step()

    return run


if __name__ == "__main__":
    main()
