"""Scoring through lm-eval: this backend beside lm-eval's own `hf` with stock flash-linear-attention, one checkpoint.

Both get the same requests, in bfloat16, in one process on one GPU, each at its best batch size of a few. The checkpoint
has the shape of DeltaNet-1.3B and refine-tiny's weights in the corner of its own (`enlarged`): it costs what the shape
costs and answers as a trained model does, so that equal answers mean something. Parts, each its own run and results:

    python benchmarks/evaluate.py --part niah     # RULER's eight needle tasks at 16K: examples/s
    python benchmarks/evaluate.py --part choice   # four endings of one context: examples/s
    python benchmarks/evaluate.py --part memory   # peak memory, prompts of 128K beside 16K
    python benchmarks/evaluate.py --part lact     # LaCT-760M at 16K beside reading everything again for each token

Without a GPU, and so without fla, `hf` runs this project's own model. A size for a laptop:
--tokens 512 --layers 6 --hidden 256 --examples 8 --answer 8 --hf 4
"""

from __future__ import annotations

import argparse
import gc
import os
import random
import resource as process_resources
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")

import torch
from lm_eval.api.instance import Instance
from report import Row, publish
from shapes import DELTANET_1B, LACT_760M, build

from refine_harness.evaluation import niah
from refine_harness.evaluation.answers import Counts, Decoding
from refine_harness.evaluation.lm import RefineLM
from refine_harness.evaluation.scorers import string_match_all
from refine_harness.models import load_model
from refine_harness.models.load import EMBEDDED, load_tokenizer
from refine_harness.resources import resource
from refine_harness.synthetic.needles import SPECS

CUDA = torch.cuda.is_available()
DEVICE, DTYPE = ("cuda", torch.bfloat16) if CUDA else ("cpu", torch.float32)

BEGIN = "<s>"
"""refine-tiny's begin token, written out: `hf` adds none to the prompts of a tokenizer without a rule for it."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=PARTS, required=True)
    parser.add_argument("--tokens", type=int, default=16384, help="of a prompt")
    parser.add_argument("--examples", type=int, help="in all")
    parser.add_argument("--answer", type=int, help="tokens of an answer")
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--hidden", type=int, help="another hidden size, a multiple of 128")
    parser.add_argument("--ours", nargs="+", default=["auto"], help="batch sizes to try")
    parser.add_argument("--hf", nargs="+", type=int, help="batch sizes to try")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rows = PARTS[asked.part](Path(folder), asked)
    print(publish(f"evaluate-{asked.part}", rows))


# Parts --------------------------------------------------------------------------------------------


def needles(folder: Path, asked: Any) -> list[Row]:
    save_deltanet(folder, asked)
    each = max(1, (asked.examples or 128) // len(SPECS))
    docs = [doc for spec in SPECS for doc in needle_docs(folder, spec, asked.tokens, each)]
    length = asked.answer or 128

    def requests(tokens: int) -> list[Instance]:
        settings = {"until": [], "max_gen_toks": tokens, "do_sample": False}
        return [generation(doc["prompt"], settings, i) for i, doc in enumerate(docs)]

    def run(lm: Any, size: int | None) -> Callable[[], list[str]]:
        lm.generate_until(requests(2)[:size], disable_tqdm=True)
        return lambda: lm.generate_until(requests(length), disable_tqdm=True)

    rows, ours, theirs = compare(folder, asked, asked.hf or [16, 32, 64], len(docs), run, 3.0)
    same = [a == b for a, b in zip(ours, theirs, strict=True)]
    scores = [
        [string_match_all(text, doc["answers"]) for text, doc in zip(answers, docs, strict=True)]
        for answers in (ours, theirs)
    ]
    alike = [a == b for a, b in zip(*scores, strict=True)]
    return [
        *rows,
        Row("equal answers", sum(same) / len(same), "share", len(same)),
        Row("equal scores", sum(alike) / len(alike), "share", len(alike)),
        *(
            Row(f"score, {who}", 100 * sum(values) / len(values), "percent", len(values))
            for who, values in zip(("ours", "hf"), scores, strict=True)
        ),
    ]


def choices(folder: Path, asked: Any) -> list[Row]:
    save_deltanet(folder, asked)
    count = asked.examples or 1024
    requests = endings(count)

    def run(lm: Any, size: int | None) -> Callable[[], list[tuple[float, bool]]]:
        lm.loglikelihood(requests[: 4 * (size or count)], disable_tqdm=True)
        return lambda: lm.loglikelihood(requests, disable_tqdm=True)

    rows, ours, theirs = compare(folder, asked, asked.hf or [64, 128, 256], count, run, 2.5)

    def chosen(scores: Sequence[tuple[float, bool]]) -> list[int]:
        values = [score for score, _ in scores]
        return [max(range(4), key=lambda j: values[4 * i + j]) for i in range(count)]

    same = [a == b for a, b in zip(chosen(ours), chosen(theirs), strict=True)]
    off = [abs(a - b) / abs(b) for (a, _), (b, _) in zip(ours, theirs, strict=True)]
    return [
        *rows,
        Row("equal choices", sum(same) / len(same), "share", len(same)),
        Row("log-likelihoods, mean difference", sum(off) / len(off), "relative", len(off)),
    ]


def memory(folder: Path, asked: Any) -> list[Row]:
    save_deltanet(folder, asked)
    count = asked.examples or 4
    peaks, seconds = [], []
    lengths = (asked.tokens, 8 * asked.tokens)
    for tokens in lengths:
        docs = needle_docs(folder, "niah_multikey_1", tokens, count)
        settings = {"until": [], "max_gen_toks": asked.answer or 8, "do_sample": False}
        lm = RefineLM(folder, device=DEVICE, dtype=str(DTYPE).removeprefix("torch."), batch_size=asked.ours[0])
        requests = [generation(doc["prompt"], settings, i) for i, doc in enumerate(docs)]
        lm.generate_until(requests[:1], disable_tqdm=True)  # compiles kernels
        settle()
        if CUDA:
            torch.cuda.reset_peak_memory_stats()
        started = time.perf_counter()
        lm.generate_until(requests, disable_tqdm=True)
        seconds.append(time.perf_counter() - started)
        peaks.append(
            float(torch.cuda.max_memory_allocated())
            if CUDA
            else 2.0**10 * process_resources.getrusage(process_resources.RUSAGE_SELF).ru_maxrss
        )
        del lm
    ratio = peaks[1] / peaks[0]
    return [
        *(
            Row(f"peak memory, {count} prompts of {n} tokens", peak / 2**30, "GiB", 1)
            for n, peak in zip(lengths, peaks, strict=True)
        ),
        *(Row(f"{count} prompts of {n} tokens", took, "s", 1) for n, took in zip(lengths, seconds, strict=True)),
        Row(f"peak memory, {lengths[1]} / {lengths[0]} tokens", ratio, "ratio", 1, "at most 1.1", ratio <= 1.1),
    ]


def lact(folder: Path, asked: Any) -> list[Row]:
    shape = resized(LACT_760M, asked)
    model = build(shape, DTYPE)
    tokenizer = load_tokenizer(EMBEDDED)
    length, count = asked.answer or 32, asked.examples or 4
    sizes = sorted({1, 2, count})  # alone, as the published path answers, and together
    docs = needle_docs(EMBEDDED, "niah_single_2", asked.tokens, count)
    lm = RefineLM(EMBEDDED, model=model.eval(), tokenizer=tokenizer, batch_size=asked.ours[0])
    greedy = {"until": [], "max_gen_toks": length, "do_sample": False}
    ours: dict[int, float] = {}
    for n in sizes:
        for _ in range(2):  # compiles kernels, and records what is met again
            lm.generate_until([generation(doc["prompt"], greedy, i) for i, doc in enumerate(docs[:n])], True)
        settle()
        started = time.perf_counter()
        lm.generate_until([generation(doc["prompt"], greedy, i) for i, doc in enumerate(docs[:n])], True)
        ours[n] = (time.perf_counter() - started) / n
    prompt = lm.tok_encode(docs[0]["prompt"])
    published, theirs = [], {}
    for n in sizes:
        text = torch.tensor([prompt] * n, device=DEVICE)
        by_rereading(model, text, 1)
        settle()
        started = time.perf_counter()
        published = by_rereading(model, text, length)
        theirs[n] = (time.perf_counter() - started) / n
    [answer] = lm.answerer.generate([prompt], [Decoding(max_tokens=length)])
    differ = [i for i, (a, b) in enumerate(zip(published, answer.tokens, strict=False)) if a != b]
    equal = differ[0] if differ else len(answer.tokens)
    ratio = min(theirs.values()) / min(ours.values())
    return [
        *(
            Row(f"{length} tokens after {asked.tokens}, {who}, {n} at once", took, "s an example", n)
            for who, seconds in (("published path", theirs), ("ours", ours))
            for n, took in seconds.items()
        ),
        Row("published path / ours, one at a time", theirs[1] / ours[1], "ratio", 1),
        Row("published path / ours, each at its best", ratio, "ratio", 1, "at least 20", ratio >= 20),
        Row("first tokens that are equal", equal / length, "share", length),
    ]


PARTS: dict[str, Callable[[Path, Any], list[Row]]] = {
    "niah": needles,
    "choice": choices,
    "memory": memory,
    "lact": lact,
}


# The two backends ---------------------------------------------------------------------------------


def compare(
    folder: Path,
    asked: Any,
    sizes: Sequence[int],
    count: int,
    run: Callable[[Any, int | None], Callable[[], list[Any]]],
    goal: float,
) -> tuple[list[Row], list[Any], list[Any]]:
    """Examples per second of both at each batch size, and the answers of each at its best.

    `run(lm, size)` warms a backend up and gives what is timed.
    """
    rows: list[Row] = []
    read = Counts()
    best: dict[str, tuple[float, list[Any]]] = {}
    for who, sizes_of in (("ours", asked.ours), ("hf", sizes)):
        model = None if who == "ours" else stock(folder)
        for size in sizes_of:
            try:
                lm: Any = ours(folder, str(size)) if who == "ours" else hf(folder, model, int(size), asked)
                timed = run(lm, None if who == "ours" else int(size))
                if who == "ours":
                    lm.answerer.tokens = read = Counts()
                settle()
                started = time.perf_counter()
                answers = timed()
                rate = count / (time.perf_counter() - started)
            except torch.OutOfMemoryError:
                print(f"{who} at batch size {size}: out of memory", flush=True)
                continue
            finally:
                lm = timed = None
                settle()
            print(f"{who} at batch size {size}: {rate:.3f} examples/s", flush=True)
            rows.append(Row(f"{who}, batch size {size}", rate, "examples/s", count))
            if who not in best or rate > best[who][0]:
                best[who] = (rate, answers)
        del model
    rows.append(Row("tokens read / tokens of all requests, ours", read.read / read.asked, "share", count))
    ratio = best["ours"][0] / best["hf"][0]
    return (
        [*rows, Row("ours / hf, each at its best", ratio, "ratio", count, f"at least {goal:g}", ratio >= goal)],
        best["ours"][1],
        best["hf"][1],
    )


def ours(folder: Path, size: str) -> RefineLM:
    return RefineLM(folder, device=DEVICE, dtype=str(DTYPE).removeprefix("torch."), batch_size=size)


def stock(folder: Path) -> Any:
    """Stock fla's model; without a GPU this project's, which transformers finds under the same name."""
    if not CUDA:
        return load_model(folder, DEVICE, DTYPE)[0]
    from fla.models import DeltaNetForCausalLM
    from refine_kernels.fla import load_tuned

    load_tuned()  # stock fla profits from the tuned choices too
    model: Any = DeltaNetForCausalLM.from_pretrained(folder, dtype=DTYPE)
    return model.to(DEVICE).eval()


def hf(folder: Path, model: Any, size: int, asked: Any) -> Any:
    """lm-eval's own backend around a model. Its longest input is told, or it would cut prompts to 2048 tokens."""
    from lm_eval.models.huggingface import HFLM

    room = 2 * asked.tokens + 1024
    backend: Any = HFLM
    return backend(
        pretrained=model, tokenizer=load_tokenizer(folder), max_length=room, batch_size=size, add_bos_token=True
    )


# What they are asked ------------------------------------------------------------------------------


def generation(prompt: str, settings: dict[str, Any], i: int) -> Instance:
    return Instance("generate_until", {}, (BEGIN + prompt, dict(settings)), 0, ("niah", i, 1))


def needle_docs(source: str | Path, spec: str, tokens: int, count: int) -> list[dict[str, Any]]:
    from refine_harness.models.load import resolve_model

    found = niah.load(spec=spec, pretrained=resolve_model(source), lengths=[tokens], samples=count, limit=count)
    return [dict(doc) for docs in found.values() for doc in docs]


def endings(count: int) -> list[Instance]:
    """Contexts of some 70 words with four endings of 12 to 24, from the packaged essays: hellaswag's sizes."""
    import pyarrow.parquet

    table = pyarrow.parquet.read_table(resource("tasks") / "niah" / "data" / "essays.parquet", columns=["text"])
    words = " ".join(table["text"].to_pylist()).split()
    rng = random.Random(0)

    def passage(least: int, most: int) -> str:
        n = rng.randint(least, most)
        start = rng.randrange(len(words) - n)
        return " ".join(words[start : start + n])

    pairs = [
        (BEGIN + context, f" {passage(12, 24)}")
        for context in (passage(50, 90) for _ in range(count))
        for _ in range(4)
    ]
    return [Instance("loglikelihood", {}, pair, 0, ("choice", i // 4, 1)) for i, pair in enumerate(pairs)]


# Checkpoints --------------------------------------------------------------------------------------


def resized(shape: dict[str, Any], asked: Any) -> dict[str, Any]:
    """A shape with as many layers as asked for, and perhaps another hidden size with heads of the same size."""
    changed = {**shape, "num_hidden_layers": asked.layers}
    if asked.hidden:
        changed["hidden_size"] = asked.hidden
        changed |= {
            key: max(1, value * asked.hidden // shape["hidden_size"])
            for key, value in shape.items()
            if key.endswith("heads")
        }
    return changed


def save_deltanet(folder: Path, asked: Any) -> None:
    """The checkpoint that both backends load: weights, config and refine-tiny's tokenizer."""
    small, tokenizer = load_model(EMBEDDED)
    model = enlarged(small, resized(DELTANET_1B, asked))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    del model
    settle()


@torch.no_grad()
def enlarged(small: Any, shape: dict[str, Any]) -> Any:
    """A model of a larger shape that computes what the first layers of `small` do.

    Its residual stream is small's in the first channels and zero in the others: whatever would write elsewhere (heads,
    MLP channels and layers that small has not) has a zero output projection, and is computed all the same. The norms
    divide by a root mean square over more channels, which their weights make up for. Words that small has not, and the
    end token, have logit zero, so that answers go on to their full length, as those of base models do.
    """
    model = build(shape, torch.float32)
    parts = small.state_dict()
    scale = (small.config.hidden_size / model.config.hidden_size) ** 0.5
    for name, p in model.named_parameters():
        if name.endswith(("o_proj.weight", "down_proj.weight", "embeddings.weight", "lm_head.weight")):
            p.zero_()
        if (part := parts.get(name)) is not None:
            over_channels = name.endswith((".attn_norm.weight", ".mlp_norm.weight", "model.norm.weight"))
            p[tuple(slice(n) for n in part.shape)] = (part * scale if over_channels else part).to(p.device)
    model.lm_head.weight[small.config.eos_token_id] = 0
    torch.nn.Module.to(model, DTYPE)
    return model.eval()


@torch.no_grad()
def by_rereading(model: Any, text: torch.Tensor, count: int) -> list[int]:
    """Greedy tokens of the first row the published way: everything is read again for each of them."""
    n = text.shape[1]
    while text.shape[1] < n + count:
        hidden_BD = model.read(text, forkable=False).hidden[:, -1]
        text = torch.cat((text, model.logits(hidden_BD).argmax(-1)[:, None]), 1)
    return text[0, n:].tolist()


def settle() -> None:
    gc.collect()
    if CUDA:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
