"""What a ReFINE step costs beside a step of next-token prediction, and beside re-reading every prefix.

All run in one process on the same model, documents and library. Before anything is timed, the gradients of the forked
step are compared with those of the re-reading step: in float64 on a CPU, in bfloat16 within the table on a GPU. The run
stops if they differ.

    python benchmarks/step.py                                                the embedded model, on whatever is here
    python benchmarks/step.py --shape deltanet-1b --tokens 16384 --documents 2     on a GPU, with random weights
    python benchmarks/step.py --shape lact-760m --tokens 16384 --documents 2
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from typing import Any

import torch
from refine_kernels.testing import MODEL_TOLERANCE, TOLERANCE, relative_error
from report import Row, median_seconds, publish, time_row
from shapes import DELTANET_1B, LACT_760M

from refine_harness.algorithm import collect, refine_step
from refine_harness.algorithm.rereading import refine_step_by_rereading
from refine_harness.config import Algorithm
from refine_harness.models import FastWeightLM, load_model
from refine_harness.models.load import MODELS
from refine_harness.types import Batch, Losses

NTP = Algorithm(lambda_rl=0.0)
REFINE = Algorithm(rollouts_from="step")
MANY = Algorithm(rollouts_from="step", rollouts=8)
PEAK = {"NVIDIA H200": 790e12, "NVIDIA H100": 790e12}
"""Measured rate of large bfloat16 matrix products, in FLOP/s, by the start of a GPU's name."""
SHAPES: dict[str, dict[str, Any]] = {"deltanet-1b": DELTANET_1B, "lact-760m": LACT_760M}
GOALS = {
    "deltanet-1b": {"step": 1.15, "many": 1.4, "rereading": 10.0},
    "lact-760m": {"step": 1.25, "many": 1.4, "rereading": 20.0},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="refine-tiny")
    parser.add_argument("--shape", choices=SHAPES, help="a published shape with random weights, instead of a model")
    parser.add_argument("--layers", type=int, default=24, help="of a shape")
    parser.add_argument("--tokens", type=int, default=1024, help="per document")
    parser.add_argument("--documents", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="auto")
    asked = parser.parse_args()
    model, exact, allowed = models(asked)
    error = check(exact, documents(exact, min(asked.tokens, 300), 1))
    print(f"gradients, forked from re-read: {error:.2e}", flush=True)
    if error > allowed:
        raise SystemExit(f"the forked step's gradients are off by {error:.2e}; allowed are {allowed:.0e}")
    del exact
    batch = documents(model, asked.tokens, asked.documents)
    rows = measure(model, batch, GOALS.get(asked.shape, {}), asked.repeats)
    rows.append(Row("gradient error, forked from re-read", error, "relative", 1, f"at most {allowed:.0e}", True))
    print(publish("step" if asked.shape is None else f"step-{asked.shape}", rows))


def models(asked: argparse.Namespace) -> tuple[FastWeightLM, FastWeightLM, float]:
    """The model to time, the one whose gradients are compared, and by how much those may differ."""
    if asked.shape is None:
        exact, _ = load_model(asked.model, "cpu", "float64")
        model, _ = load_model(asked.model, asked.device, "float32")
        return model, exact, TOLERANCE[torch.float64]
    shape = {**SHAPES[asked.shape], "num_hidden_layers": asked.layers}
    settings, family = MODELS[shape.pop("model_type")]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    with torch.device(device):
        model, small = (family(settings(**{**shape, "num_hidden_layers": n})) for n in (asked.layers, 2))
    for each in (model, small):
        torch.nn.Module.to(each, torch.bfloat16)
    table = "bfloat16, Muon" if shape.get("use_muon") else "bfloat16"
    return model, small, MODEL_TOLERANCE[table]["gradient"]


def documents(model: FastWeightLM, tokens: int, count: int) -> Batch:
    """Random tokens: the cost does not depend on what the text says."""
    generator = torch.Generator().manual_seed(0)
    text = torch.randint(3, model.config.vocab_size, (count, tokens), generator=generator)
    return Batch(text, torch.full((count,), tokens)).to(next(model.parameters()).device)


def rng(batch: Batch) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(row) for row in range(len(batch))]


def learn(model: FastWeightLM, losses: Losses) -> None:
    """Forward is done; the backward of both losses, into gradients that are there."""
    loss = losses.ntp_sum / losses.ntp_count
    if losses.policy_count:
        loss = loss + 0.2 * losses.policy_sum / losses.policy_count
    model.zero_grad(set_to_none=False)
    loss.backward()


def check(model: FastWeightLM, batch: Batch) -> float:
    """The relative error of all gradients as one vector, forked against re-read."""
    learn(model, refine_step(model, batch, REFINE, rng(batch)))
    forked = gradient(model)
    rollouts = collect(model, batch, REFINE, rng(batch)).rollouts
    learn(model, refine_step_by_rereading(model, batch, REFINE, rollouts))
    return relative_error(forked, gradient(model))


def gradient(model: FastWeightLM) -> torch.Tensor:
    grads = (torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters())
    return torch.cat([x.double().flatten().cpu() for x in grads])


def measure(model: FastWeightLM, batch: Batch, goals: dict[str, float], repeats: int) -> list[Row]:
    """Times, their ratios, and memory."""
    rollouts = collect(model, batch, REFINE, rng(batch)).rollouts
    steps: dict[str, Callable[[], object]] = {
        "NTP step": lambda: learn(model, refine_step(model, batch, NTP, [])),
        "ReFINE step": lambda: learn(model, refine_step(model, batch, REFINE, rng(batch))),
        "ReFINE step, 8 rollouts": lambda: learn(model, refine_step(model, batch, MANY, rng(batch))),
    }
    seconds = {name: median_seconds(step, repeats=repeats, warm_up=2) for name, step in steps.items()}
    peaks = {name: peak(step) for name, step in steps.items()} if torch.cuda.is_available() else {}
    again = "re-reading step (update only)"
    seconds[again] = median_seconds(
        lambda: learn(model, refine_step_by_rereading(model, batch, REFINE, rollouts)), repeats=1
    )
    median = {name: statistics.median(values) for name, values in seconds.items()}
    ntp, refine, many = (median[name] for name in steps)
    rows = [time_row(name, values) for name, values in seconds.items()]
    rows += [
        judged("ReFINE step / NTP step", refine / ntp, repeats, goals.get("step"), most=True),
        judged("ReFINE step with 8 rollouts / NTP step", many / ntp, repeats, goals.get("many"), most=True),
        judged(f"{again} / ReFINE step", median[again] / refine, 1, goals.get("rereading"), most=False),
    ]
    for name, most in peaks.items():
        rows.append(Row(f"peak memory, {name}", most / 2**30, "GiB", 1))
    if peaks:
        ratio = peaks["ReFINE step"] / peaks["NTP step"]
        rows.append(judged("peak memory, ReFINE step / NTP step", ratio, 1, 1.2 if goals else None, most=True))
        rate = 6 * sum(p.numel() for p in model.parameters()) * batch.tokens / refine
        known = [value for start, value in PEAK.items() if torch.cuda.get_device_name().startswith(start)]
        if known:
            goal = 0.5 if goals else None
            rows.append(
                judged("share of the bfloat16 matrix peak, ReFINE step", rate / known[0], repeats, goal, most=False)
            )
    rows.append(Row("tokens per step", float(batch.tokens), "tokens", 1))
    return rows


def judged(name: str, value: float, n: int, goal: float | None, *, most: bool) -> Row:
    if goal is None:
        return Row(name, value, "ratio", n)
    return Row(
        name, value, "ratio", n, f"at {'most' if most else 'least'} {goal:g}", value <= goal if most else value >= goal
    )


def peak(step: Callable[[], object]) -> float:
    """Bytes at most in use during a step, over what was in use before it: weights and gradients stay."""
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step()
    return float(torch.cuda.max_memory_allocated() - before)


if __name__ == "__main__":
    main()
