"""Make the embedded checkpoint from a trained one: bfloat16 weights, tokenizer. Run: python embed.py FINAL OUT"""

from __future__ import annotations

import sys

from refine_harness.models import load_model


def main(final: str, out: str) -> None:
    model, tokenizer = load_model(final, dtype="bfloat16")
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(*sys.argv[1:])
