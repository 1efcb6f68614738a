"""What a ReFINE step costs beside a step of next-token prediction, and beside re-reading every prefix.

All run in one process on the same model, documents and library. Before anything is timed, the gradients of the forked
step are compared with those of the re-reading step: in float64 on a CPU, in bfloat16 within the table on a GPU. The run
stops if they differ.

    python benchmarks/step.py                                                the embedded model, on whatever is here
    python benchmarks/step.py --shape deltanet-1b --tokens 16384 --documents 2     on a GPU, with random weights
    python benchmarks/step.py --shape gated-deltanet-1b --tokens 16384 --documents 2
    python benchmarks/step.py --shape lact-760m --tokens 16384 --documents 2

With --autocast weights are float32 and the forward bfloat16, as `refine train` has them on a GPU; goals are of bfloat16
weights.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import anatomy
import torch
from ntp import beside_fla
from refine_kernels.testing import MODEL_TOLERANCE, TOLERANCE, relative_error
from report import Row, at_least, at_most, free, median_seconds, peak_bytes, publish, time_row
from shapes import SHAPES, build
from torch import Tensor

from refine_harness.algorithm import collect
from refine_harness.algorithm.loss import policy_loss
from refine_harness.algorithm.rereading import refine_step_by_rereading
from refine_harness.algorithm.step import next_token
from refine_harness.config import Algorithm
from refine_harness.models import FastWeightLM, load_model
from refine_harness.training.costs import peak_rate
from refine_harness.training.trainer import Objective
from refine_harness.types import Batch, Losses, Rollouts

NTP = Algorithm(lambda_rl=0.0)
REFINE = Algorithm(rollouts_from="step")
MANY = Algorithm(rollouts_from="step", rollouts=8)
GOALS = {
    "deltanet-1b": {"step": 1.15, "many": 1.4, "rereading": 10.0, "memory": 1.2, "share": 0.5, "longest": 131072},
    "gated-deltanet-1b": {"step": 1.15, "many": 1.4, "rereading": 10.0, "memory": 1.2, "share": 0.5},
    "lact-760m": {"step": 1.25, "many": 1.4, "rereading": 20.0, "memory": 1.2, "share": 0.5},
}
CHECKED = 2500
"""Tokens of a shape's documents whose gradients are compared: so many that not every state of them is kept."""
LONGEST = (65536, 131072, 196608)
"""Lengths of one document that are tried with activation checkpointing, in order."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="refine-tiny")
    parser.add_argument("--shape", choices=SHAPES, help="a published shape with random weights, instead of a model")
    parser.add_argument("--layers", type=int, help="of a shape, instead of its own number")
    parser.add_argument("--tokens", type=int, default=1024, help="per document")
    parser.add_argument("--documents", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--autocast", action="store_true", help="float32 weights and a bfloat16 forward")
    parser.add_argument("--profile", action="store_true", help="add where the time and memory of a step go")
    asked = parser.parse_args()
    if not asked.layers and asked.shape in SHAPES:
        asked.layers = SHAPES[asked.shape]["num_hidden_layers"]
    rows: list[Row] = []
    if asked.shape == "deltanet-1b" and not asked.autocast:  # the shape that ntp.py has
        rows += beside_fla(asked.tokens, asked.documents, asked.layers, asked.repeats)
    objective, exact, allowed = models(asked)
    error = check(exact, documents(exact.model, min(asked.tokens, CHECKED if asked.shape else 300)))
    print(f"gradients, forked from re-read: {error:.2e}", flush=True)
    if error > allowed:
        raise SystemExit(f"the forked step's gradients are off by {error:.2e}; allowed are {allowed:.0e}")
    del exact
    batch = documents(objective.model, *[asked.tokens] * asked.documents)
    goals = {} if asked.autocast else GOALS.get(asked.shape, {})
    rows += measure(objective, batch, goals, asked.repeats)
    rows.append(at_most("gradient error, forked from re-read", error, allowed, 1, "relative"))
    name = "-".join(filter(None, ("step", asked.shape, "autocast" if asked.autocast else None)))
    print(publish(name, rows))
    if asked.profile:
        rows += anatomy_of(objective, batch)
        print(publish(name, rows))
    if "longest" in goals:
        print(publish(name, rows + longest(objective, goals)))


def models(asked: argparse.Namespace) -> tuple[Objective, Objective, float]:
    """What is timed, what has its gradients compared, and by how much those may differ."""
    if asked.shape is None:
        exact, _ = load_model(asked.model, "cpu", "float64")
        model, _ = load_model(asked.model, asked.device, "float32")
        return Objective(model, bf16=asked.autocast), Objective(exact, bf16=False), TOLERANCE[torch.float64]
    shape, dtype = SHAPES[asked.shape], torch.float32 if asked.autocast else torch.bfloat16
    layers = (asked.layers, 2)
    model, small = (build({**shape, "num_hidden_layers": count}, dtype).train() for count in layers)
    table = "bfloat16, Muon" if shape.get("use_muon") else "bfloat16"
    allowed = MODEL_TOLERANCE[table]["gradient"]
    return Objective(model, bf16=asked.autocast), Objective(small, bf16=asked.autocast), allowed


def documents(model: FastWeightLM, *lengths: int) -> Batch:
    """Random tokens: the cost does not depend on what the texts say."""
    generator = torch.Generator().manual_seed(0)
    text = torch.randint(3, model.config.vocab_size, (len(lengths), max(lengths)), generator=generator)
    return Batch(text, torch.tensor(lengths)).to(next(model.parameters()).device)


def rng(batch: Batch) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(row) for row in range(len(batch))]


def learn(model: FastWeightLM, losses: Losses) -> None:
    """Forward is done; the backward of both losses, as the trainer does it."""
    loss = losses.ntp_sum / losses.ntp_count
    if losses.policy_count:
        loss = loss + REFINE.lambda_rl * losses.policy_sum / losses.policy_count
    model.zero_grad(set_to_none=True)
    loss.backward()


def step(objective: Objective, batch: Batch, algorithm: Algorithm) -> None:
    learn(objective.model, objective(batch, algorithm, rng(batch)))


def check(objective: Objective, batch: Batch) -> float:
    """The relative error of all gradients as one vector, forked against re-read; of the second step, which on a GPU
    replays what the first one recorded."""
    model = objective.model
    for _ in range(2):
        step(objective, batch, REFINE)
    forked = gradient(model)
    with objective.precision():
        rollouts = collect(model, batch, REFINE, rng(batch)).rollouts
        losses = refine_step_by_rereading(model, batch, REFINE, rollouts)
    learn(model, losses)
    return relative_error(forked, gradient(model))


def gradient(model: FastWeightLM) -> Tensor:
    grads = (torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters())
    return torch.cat([x.double().flatten().cpu() for x in grads])


def measure(objective: Objective, batch: Batch, goals: dict[str, float], repeats: int) -> list[Row]:
    """Times, their ratios, and memory."""
    model = objective.model
    steps: dict[str, Callable[[], object]] = {
        "NTP step": partial(step, objective, batch, NTP),
        "ReFINE step": partial(step, objective, batch, REFINE),
        "ReFINE step, 8 rollouts": partial(step, objective, batch, MANY),
    }
    peaks = {name: peak(model, run) for name, run in steps.items()} if torch.cuda.is_available() else {}
    unfit = [name for name, most in peaks.items() if most is None]
    print({name: most and most / 2**30 for name, most in peaks.items()}, flush=True)
    uneven = documents(model, batch.tokens_BT.shape[1], *[batch.tokens_BT.shape[1] // 4] * (len(batch) - 1))
    steps["ReFINE step, all documents but one a quarter as long"] = partial(step, objective, uneven, REFINE)
    seconds = interleaved({name: run for name, run in steps.items() if name not in unfit}, repeats)
    print(seconds, flush=True)
    with objective.precision():
        collected = collect(model, batch, REFINE, rng(batch))
    flows = {"the paper's flow, each prefix padded as released": True, "the paper's flow without its padding": False}
    for name, padded in flows.items():
        flow = partial(paper_flow, objective, batch, collected.rollouts, collected.advantages_BCN, padded=padded)
        free()
        seconds[name] = median_seconds(flow, repeats=1, warm_up=0)
        print(name, seconds[name], flush=True)
    median = {name: statistics.median(values) for name, values in seconds.items()}
    rows = [time_row(name, values) for name, values in seconds.items()]
    for name, goal in (("ReFINE step", "step"), ("ReFINE step, 8 rollouts", "many")):
        if name in unfit:
            rows.append(Row(f"{name}: does not fit", 0.0, "", 1, f"at most {goals.get(goal)} NTP steps", False))
        else:
            rows.append(at_most(f"{name} / NTP step", median[name] / median["NTP step"], goals.get(goal), repeats))
    refine = median.get("ReFINE step")
    if refine is not None:
        share = median["ReFINE step, all documents but one a quarter as long"] / refine / (uneven.tokens / batch.tokens)
        rows.append(Row("the same per token / ReFINE step per token", share, "ratio", repeats))
        padded, bare = (median[name] for name in flows)
        rows.append(at_least("the paper's flow / ReFINE step", padded / refine, goals.get("rereading"), 1))
        rows.append(Row("the paper's flow without its padding / ReFINE step", bare / refine, "ratio", 1))
    rows += [Row(f"peak memory, {name}", most / 2**30, "GiB", 1) for name, most in peaks.items() if most is not None]
    least, most = peaks.get("NTP step"), peaks.get("ReFINE step")
    if least is not None and most is not None:
        rows.append(at_most("peak memory, ReFINE step / NTP step", most / least, goals.get("memory"), 1))
    available = peak_rate(torch.device("cuda")) if peaks else None
    if available is not None and refine is not None:
        rate = 6 * sum(p.numel() for p in model.parameters()) * batch.tokens / refine
        name = "share of the bfloat16 matrix peak, ReFINE step"
        rows.append(at_least(name, rate / available, goals.get("share"), repeats))
    rows.append(Row("tokens per step", float(batch.tokens), "tokens", 1))
    return rows


def anatomy_of(objective: Objective, batch: Batch) -> list[Row]:
    """Where time and memory go, of steps whose recordings are made."""
    free()
    steps = {"NTP step": NTP, "ReFINE step": REFINE}
    rows = [row for name, of in steps.items() for row in anatomy.kernels(name, partial(step, objective, batch, of))]
    model = objective.model
    model.zero_grad(set_to_none=True)
    if torch.cuda.is_available():
        rows += anatomy.memory(lambda mark: learn(model, objective(batch, REFINE, rng(batch), mark=mark)))
    return rows


def peak(model: FastWeightLM, run: Callable[[], object]) -> float | None:
    """Bytes at most in use in a step, gradients and recordings included, weights not; None where it does not fit."""
    model.zero_grad(set_to_none=True)
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    try:
        run()  # makes what later steps find made, which counts: it stays
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        model.zero_grad(set_to_none=True)
        gone = before - torch.cuda.memory_allocated()
        return peak_bytes(run) + before - gone - weights
    except torch.OutOfMemoryError:
        free()
        return None


def interleaved(steps: dict[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """Seconds of each step, one after another in turns, so that a GPU's drifting clock touches all alike."""
    for run in steps.values():
        for _ in range(2):
            run()
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(repeats):
        for name, run in steps.items():
            seconds[name] += median_seconds(run, repeats=1, warm_up=0)
    return seconds


def paper_flow(objective: Objective, batch: Batch, rollouts: Rollouts, advantages_BCN: Tensor, *, padded: bool) -> None:
    """The work of the released flow, with our kernels: every truncated prefix is read again from its start.

    For its entropies the document is read once; to sample, every prefix is read, and then token by token (LaCT, whose
    published code cannot go on from a state, reads the prefix again for each token); then prefix and rollout are read
    for the old log-probabilities, and once more, with gradients, for the update, beside next-token prediction on the
    document. `padded` reads every prefix at the length of its document, as released; else each alone at its own. The
    positions and rollouts are those of our step, so that both learn the same.
    """
    model = objective.model
    model.zero_grad(set_to_none=True)
    T, K = batch.tokens_BT.shape[1], rollouts.tokens_BCNK.shape[-1]
    count = rollouts.tokens_BCNK.numel()
    for b, positions in enumerate(rollouts.positions_BC.tolist()):
        row = batch.rows(b, b + 1)
        with torch.no_grad(), objective.precision():
            next_token(model, model.read(row.tokens_BT, forkable=False), row)
        for c, position in enumerate(positions):
            tokens_1K = rollouts.tokens_BCNK[b, c]
            prefix_1P = row.tokens_BT[:, : position + 1]
            whole_1S = torch.cat((prefix_1P, tokens_1K), 1)
            read = partial(_reread, model, T=T + K if padded else None)
            with torch.no_grad(), objective.precision():
                state = read(prefix_1P).state
                for k in range(K - 1):
                    if model.host_rows:
                        read(torch.cat((prefix_1P, tokens_1K[:, : k + 1]), 1))
                    else:
                        state = model.read(tokens_1K[:, k : k + 1], state, forkable=False).state
                _rollout_logprobs(model, read(whole_1S).hidden, position, tokens_1K)
            with objective.precision():
                logprobs_1K = _rollout_logprobs(model, read(whole_1S).hidden, position, tokens_1K)
            shape = (1, 1, *logprobs_1K.shape)
            loss = policy_loss(
                logprobs_1K.view(shape),
                logprobs_1K.detach().view(shape),
                advantages_BCN[b : b + 1, c : c + 1],
                loss=REFINE.loss,
                clip_low=REFINE.clip_low,
                clip_high=REFINE.clip_high,
                dual_clip=REFINE.dual_clip,
            )
            (REFINE.lambda_rl * loss.sum() / count).backward()
        ntp = objective(row, NTP, [])
        (ntp.ntp_sum / batch.labels).backward()


def _reread(model: FastWeightLM, tokens_1S: Tensor, *, T: int | None) -> Any:
    S = tokens_1S.shape[1]
    if T is None or T == S:
        return model.read(tokens_1S, forkable=False)
    # Read as tokens like any other; told that they are padding, our model would leave them out.
    return model.read(torch.cat((tokens_1S, tokens_1S.new_zeros(1, T - S)), 1), forkable=False)


def _rollout_logprobs(model: FastWeightLM, hidden_1SD: Tensor, position: int, tokens_1K: Tensor) -> Tensor:
    K = tokens_1K.shape[1]
    before_KD = hidden_1SD[0, position : position + K]
    return model.label_logprobs(before_KD / REFINE.temperature, tokens_1K[0]).logprobs[None]


def longest(objective: Objective, goals: dict[str, float]) -> list[Row]:
    """How long a document may be for a ReFINE step with activation checkpointing, of the lengths tried."""
    model = objective.model
    model.gradient_checkpointing_enable({"use_reentrant": False})
    fits, rows = 0, []
    for tokens in LONGEST:
        model.zero_grad(set_to_none=True)
        batch = documents(model, tokens)
        started = time.perf_counter()
        try:
            most = peak_bytes(partial(step, objective, batch, REFINE))
        except torch.OutOfMemoryError:
            break
        rows.append(Row(f"peak memory, {tokens} tokens, activation checkpointing", most / 2**30, "GiB", 1))
        print(f"{tokens} tokens: {most / 2**30:.1f} GiB, {time.perf_counter() - started:.1f} s", flush=True)
        fits = tokens
    model.gradient_checkpointing_disable()
    gc.collect()
    name = "longest document tried that fits, activation checkpointing"
    return [*rows, at_least(name, float(fits), goals.get("longest"), 1, "tokens")]


if __name__ == "__main__":
    main()
