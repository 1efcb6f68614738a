"""Do our models compute on a GPU what other code and exact arithmetic compute? One table; fails outside the tolerances.

1. The same weights and real text in bfloat16 through our model and stock flash-linear-attention's (DeltaNet, Gated
   DeltaNet), both beside our plain operations in float64: hidden states, logits, loss, every parameter's gradient.
2. LaCT, which fla does not have, on the GPU beside our float64 reference on the CPU: in float32, and in bfloat16 with
   and without Muon (which, in bfloat16, has gradients that rounding decides: those are shown and not judged).
3. The contract of a reading in bfloat16: forked = re-read, cached = full, padded = alone, pieces = whole.

    python benchmarks/parity.py [--delta-net refine-tiny] [--lact FOLDER] [--tokens 2000]
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from refine_kernels.fla import load_tuned
from refine_kernels.testing import MODEL_TOLERANCE, relative_error
from refine_kernels.tune import compiled_together
from report import Row, publish
from torch import Tensor

from refine_harness.models import load_model, load_tokenizer
from refine_harness.models.base import FastWeightLM
from refine_harness.models.load import MODELS

TEXT = Path(__file__).resolve().parent.parent / "configs" / "quickstart" / "data" / "mid" / "books.parquet"
GATED: dict[str, Any] = {
    "hidden_size": 512, "num_hidden_layers": 4, "num_heads": 4, "head_dim": 128, "expand_v": 1.0, "vocab_size": 4096,
}  # fmt: skip
LACT: dict[str, Any] = {
    "hidden_size": 512, "num_hidden_layers": 4, "num_attn_heads": 8, "num_lact_heads": 4, "lact_chunk_size": 512,
    "window_size": 512, "use_muon": True, "w0_w2_low_rank": 32, "rope_theta": 1e6, "vocab_size": 4096,
    "initializer_range": 0.02,
}  # fmt: skip


SHORT = 1100
"""Tokens of each text that the CPU reads too."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--delta-net", default="refine-tiny", help="a DeltaNet checkpoint")
    parser.add_argument("--lact", help="a LaCT checkpoint; without one, random weights")
    parser.add_argument("--tokens", type=int, default=2000)
    asked = parser.parse_args()
    # A process each, since nearly all of the time goes into compiling, for shapes for which no choices are shipped.
    with ProcessPoolExecutor(mp_context=get_context("spawn")) as pool:
        parts = [pool.submit(part, asked) for part in (delta_net, gated_deltanet, lact)]
        rows = [row for part in parts for row in part.result()]
    print(publish("parity", rows))
    sys.exit(any(row.passed is False for row in rows))


def delta_net(asked: argparse.Namespace) -> list[Row]:
    text = real_text(asked.delta_net, asked.tokens)
    model, _ = load_model(asked.delta_net, "cuda", "bfloat16")
    with compiled_together():
        return beside_fla("DeltaNet", model, text) + contract("DeltaNet", model, text)


def gated_deltanet(asked: argparse.Namespace) -> list[Row]:
    text, model = real_text(asked.delta_net, asked.tokens), random_model("gated_deltanet", GATED)
    with compiled_together():
        return beside_fla("Gated DeltaNet", model, text) + contract("Gated DeltaNet", model, text)


def lact(asked: argparse.Namespace) -> list[Row]:
    text = real_text(asked.lact or asked.delta_net, asked.tokens)
    if asked.lact:
        model, _ = load_model(asked.lact, "cuda", "bfloat16")
    else:
        model = random_model("lact_swiglu", LACT)
    plain = random_model("lact_swiglu", {**LACT, "use_muon": False})
    short = text[:, :SHORT]
    wide = copy.deepcopy(model)
    torch.nn.Module.to(wide, torch.float32)
    return [
        *beside_exact("LaCT", wide, short, "float32"),
        *beside_exact("LaCT without Muon", plain, short, "bfloat16"),
        *beside_exact("LaCT", model, short, "bfloat16, Muon"),
        *contract("LaCT without Muon", plain, text),
        *contract("LaCT", model, text, "bfloat16, Muon"),
    ]


def real_text(tokenizer: str, tokens: int) -> Tensor:
    """Two passages of real books, [2, tokens]."""
    import pyarrow.parquet as parquet

    words = load_tokenizer(tokenizer)
    books = " ".join(parquet.read_table(TEXT)["text"].to_pylist())
    ids = words(books[: tokens * 16], add_special_tokens=False)["input_ids"]
    return torch.tensor(ids[: 2 * tokens]).view(2, tokens).cuda()


def random_model(kind: str, settings: dict[str, Any]) -> FastWeightLM:
    config, family = MODELS[kind]
    torch.manual_seed(0)
    model = family(config(**settings))
    torch.nn.Module.to(model, "cuda", torch.bfloat16)
    return model


def quantities(
    model: Any, text: Tensor, hidden: Callable[[Tensor], Tensor], logits: Callable[[Tensor], Tensor]
) -> dict:
    """Hidden states, logits, loss and gradients of the mean next-token loss."""
    model.zero_grad()
    hidden_BTD = hidden(text)
    logits_BTV = logits(hidden_BTD)
    wide = logits_BTV.double() if logits_BTV.dtype == torch.float64 else logits_BTV.float()
    loss = torch.nn.functional.cross_entropy(wide[:, :-1].flatten(0, 1), text[:, 1:].flatten())
    loss.backward()
    gradients = {name: p.grad.detach().double().cpu() for name, p in model.named_parameters() if p.grad is not None}
    return {"hidden": hidden_BTD.detach(), "logits": logits_BTV.detach(), "loss": loss.detach(), "gradients": gradients}


def ours(model: FastWeightLM, text: Tensor) -> dict:
    return quantities(model, text, lambda x: model.read(x, forkable=False).hidden, model.logits)


def in_float64(model: FastWeightLM, device: str = "cuda") -> FastWeightLM:
    """The same weights in float64, where only plain operations run."""
    twin = type(model)(model.config)
    torch.nn.Module.to(twin, device, torch.float64)
    twin.load_state_dict(model.state_dict())
    return twin


def differences(got: dict, want: dict) -> Iterator[tuple[str, float]]:
    """(name, relative difference) of each quantity; gradients as one vector, and the worst parameter."""
    for name in ("hidden", "logits", "loss"):
        yield name, relative_error(got[name], want[name])
    names = sorted(want["gradients"])
    assert names == sorted(got["gradients"])
    a, b = (torch.cat([x["gradients"][name].flatten() for name in names]) for x in (got, want))
    yield "gradient", relative_error(a, b)
    each = {name: relative_error(got["gradients"][name], want["gradients"][name]) for name in names}
    worst = max(each, key=lambda name: each[name])
    print(f"    worst gradient: {worst} {each[worst]:.2e}")
    yield "worst gradient", each[worst]


def beside_fla(name: str, model: FastWeightLM, text: Tensor) -> list[Row]:
    """Ours against stock fla, and both against float64. Ours passes within the table, or where fla is farther off."""
    import importlib

    theirs = importlib.import_module("fla.models")
    kind = type(model).__name__
    load_tuned()  # for stock's kernels too
    stock = getattr(theirs, kind)(getattr(theirs, type(model.config).__name__).from_dict(model.config.to_dict()))
    stock = stock.to("cuda", torch.bfloat16)
    stock.load_state_dict(model.state_dict())
    exact = ours(in_float64(model), text)
    got = ours(model, text)
    rows = []
    try:
        fla = quantities(stock, text, lambda x: stock.model(x, use_cache=False).last_hidden_state, stock.lm_head)
    except RuntimeError as error:  # a Triton that fla refuses to train with
        print(f"    stock fla: {error}")
        fla = None
    theirs_off = dict(differences(fla, exact)) if fla else {}
    between = dict(differences(got, fla)) if fla else {}
    for what, off in differences(got, exact):
        allowed = max(MODEL_TOLERANCE["bfloat16"][what], theirs_off.get(what, 0.0))
        rows.append(
            Row(f"{name}, {what}: ours from float64", off, "relative", 1, f"at most {allowed:.2g}", off <= allowed)
        )
        if fla:
            rows.append(Row(f"{name}, {what}: stock fla from float64", theirs_off[what], "relative", 1))
            rows.append(Row(f"{name}, {what}: ours from stock fla", between[what], "relative", 1))
    return rows


def beside_exact(name: str, model: FastWeightLM, text: Tensor, table: str) -> list[Row]:
    """Ours on the GPU against the float64 reference on the CPU."""
    exact = ours(in_float64(model, "cpu"), text.cpu())
    rows = []
    for what, off in differences(ours(model, text), exact):
        allowed = None if table == "bfloat16, Muon" and "gradient" in what else MODEL_TOLERANCE[table][what]
        goal = None if allowed is None else f"at most {allowed:.2g}"
        passed = None if allowed is None else off <= allowed
        title = f"{name}, {what}: GPU in {table.split(',')[0]} from float64 on the CPU"
        rows.append(Row(title, off, "relative", 1, goal, passed))
    return rows


def contract(name: str, model: FastWeightLM, text: Tensor, table: str = "bfloat16") -> list[Row]:
    """Two ways to the same hidden states and gradients, in bfloat16."""
    print(f"    contract of {name}", flush=True)
    T, K = 1000, 5
    text = text[:, : T + K]
    positions_BC = torch.tensor([[63, 511, T - 1], [0, 512, 777]], device="cuda")
    places = [(b, int(p)) for b in range(2) for p in positions_BC[b]]
    rollouts_RK = torch.stack([text[b].roll(-17 * i)[:K] for i, (b, _) in enumerate(places)])

    def forked() -> Tensor:
        return model.read(rollouts_RK, model.read(text[:, :T]).states_at(positions_BC)).hidden

    def reread() -> Tensor:
        prefixes = [torch.cat((text[b, : p + 1], rollouts_RK[i]))[None] for i, (b, p) in enumerate(places)]
        return torch.cat([model.read(x, forkable=False).hidden[:, -K:] for x in prefixes])

    def whole() -> Tensor:
        return model.read(text, forkable=False).hidden[:, T:]

    def cached() -> Tensor:
        state, out = model.read(text[:, :T], forkable=False).state, []
        for t in range(T, T + K):
            reading = model.read(text[:, t : t + 1], state, forkable=False)
            state = reading.state
            out.append(reading.hidden)
        return torch.cat(out, 1)

    def pieces() -> Tensor:
        state, last = None, None
        for start in range(0, T + K, 300):
            reading = model.read(text[:, start : start + 300], state, forkable=False)
            state, last = reading.state, reading.hidden
        assert last is not None
        return last[:, -K:]

    lengths_B = torch.tensor([400, T])

    def padded() -> Tensor:
        return model.read(text[:, :T], lengths=lengths_B, forkable=False).hidden[0, :400]

    def alone() -> Tensor:
        return model.read(text[:1, :400], forkable=False).hidden[0]

    rows = []
    for what, one, other in (
        ("forked from re-read", forked, reread),
        ("cached from full", cached, whole),
        ("pieces from whole", pieces, whole),
        ("padded from alone", padded, alone),
    ):
        got, want = (probe(model, way) for way in (one, other))
        for quantity in ("hidden", "gradient"):
            off, allowed = relative_error(got[quantity], want[quantity]), MODEL_TOLERANCE[table][quantity]
            rows.append(
                Row(f"{name}, {quantity}: {what}", off, "relative", 1, f"at most {allowed:.2g}", off <= allowed)
            )
    return rows


def probe(model: FastWeightLM, way: Callable[[], Tensor]) -> dict[str, Tensor]:
    """Hidden states, and the gradient of all parameters of a loss on their logits."""
    model.zero_grad()
    hidden = way()
    model.logits(hidden).float().log_softmax(-1)[..., 7].sum().backward()
    grads = (torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters())
    gradient = torch.cat([x.flatten().double() for x in grads])
    return {"hidden": hidden.detach(), "gradient": gradient}


if __name__ == "__main__":
    main()
