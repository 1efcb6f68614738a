"""What a ReFINE step costs beside a step of next-token prediction, and beside re-reading every prefix.

All three run in one process on the same model, documents and library. Before anything is timed, the gradients of the
forked step are compared in float64 with those of the re-reading step; the run stops if they differ.

    python benchmarks/step.py [--model refine-tiny] [--tokens 1024] [--documents 2] [--repeats 5]
"""

from __future__ import annotations

import argparse
import statistics

import torch
from refine_kernels.testing import assert_close
from report import Row, median_seconds, publish, time_row

from refine_harness.algorithm import collect, refine_step
from refine_harness.algorithm.rereading import refine_step_by_rereading
from refine_harness.config import Algorithm
from refine_harness.models import FastWeightLM, load_model
from refine_harness.types import Batch, Losses


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="refine-tiny")
    parser.add_argument("--tokens", type=int, default=1024, help="per document")
    parser.add_argument("--documents", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="auto")
    asked = parser.parse_args()

    refine = Algorithm(rollouts_from="step")
    ntp = Algorithm(lambda_rl=0.0)
    model, _ = load_model(asked.model, "cpu", "float64")
    batch = documents(model, min(asked.tokens, 300), 1)
    error = check(model, batch, refine)

    model, _ = load_model(asked.model, asked.device, "float32")
    batch = documents(model, asked.tokens, asked.documents).to(next(model.parameters()).device)
    rollouts = collect(model, batch, refine, rng(batch)).rollouts
    seconds = {
        "NTP step": median_seconds(lambda: learn(model, refine_step(model, batch, ntp, [])), repeats=asked.repeats),
        "ReFINE step": median_seconds(
            lambda: learn(model, refine_step(model, batch, refine, rng(batch))), repeats=asked.repeats
        ),
        "re-reading step (update only)": median_seconds(
            lambda: learn(model, refine_step_by_rereading(model, batch, refine, rollouts)), repeats=1
        ),
    }
    median = {name: statistics.median(values) for name, values in seconds.items()}
    rows = [time_row(name, values) for name, values in seconds.items()]
    rows += [
        Row("ReFINE step / NTP step", median["ReFINE step"] / median["NTP step"], "ratio", asked.repeats),
        Row(
            "re-reading step / ReFINE step",
            median["re-reading step (update only)"] / median["ReFINE step"],
            "ratio",
            1,
        ),
        Row("largest gradient error, float64", error, "relative", 1, "at most 1e-9", error <= 1e-9),
        Row("tokens per step", float(batch.tokens), "tokens", 1),
    ]
    print(publish("step", rows))


def documents(model: FastWeightLM, tokens: int, count: int) -> Batch:
    """Random tokens: the cost does not depend on what the text says."""
    generator = torch.Generator().manual_seed(0)
    text = torch.randint(3, model.config.vocab_size, (count, tokens), generator=generator)
    return Batch(text, torch.full((count,), tokens))


def rng(batch: Batch) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(row) for row in range(len(batch))]


def learn(model: FastWeightLM, losses: Losses) -> None:
    """Forward is done; the backward of both losses."""
    model.zero_grad()
    loss = losses.ntp_sum / losses.ntp_count
    if losses.policy_count:
        loss = loss + 0.2 * losses.policy_sum / losses.policy_count
    loss.backward()


def check(model: FastWeightLM, batch: Batch, algorithm: Algorithm) -> float:
    """The largest relative error of a parameter's gradient, forked against re-read."""
    learn(model, refine_step(model, batch, algorithm, rng(batch)))
    forked = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    rollouts = collect(model, batch, algorithm, rng(batch)).rollouts
    learn(model, refine_step_by_rereading(model, batch, algorithm, rollouts))
    worst = 0.0
    for name, p in model.named_parameters():
        assert p.grad is not None
        assert_close(forked[name], p.grad, name)
        worst = max(worst, float((forked[name] - p.grad).norm() / p.grad.norm()))
    return worst


if __name__ == "__main__":
    main()
