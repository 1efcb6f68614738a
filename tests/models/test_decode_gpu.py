"""On a GPU: recorded steps read what plain ones do, through the ends of chunks too."""

from typing import Any

import pytest
import torch
from refine_kernels.testing import relative_error

from refine_harness.models import decode
from refine_harness.models.decode import Decoder

pytestmark = pytest.mark.gpu
L = 64
"""Tokens of LaCT's chunks in `wide_model`."""


@torch.no_grad()
@pytest.mark.parametrize("before", ([L - 2, L - 2, L - 2], [L - 2, 2 * L, 5]), ids=("together", "apart"))
@pytest.mark.parametrize("kind", ("DeltaNet", "LaCT"))
@pytest.mark.parametrize("times", (1, 2))
def test_recorded_steps_read_what_plain_ones_do(kind, before, times, wide_model):
    model: Any = torch.nn.Module.to(wide_model(kind), "cuda", torch.bfloat16).eval()
    for seed in range(3):  # a chunk's end is met, recorded, replayed
        text = torch.randint(3, 300, (3, 3 * L), generator=torch.Generator().manual_seed(seed)).cuda()
        state = model.read(text, lengths=torch.tensor(before), forkable=False).state
        text = text[:, :6].repeat_interleave(times, 0)
        text[1::2] = text[1::2].flip(1)
        decoder = Decoder(model, state, times)
        wanted = model.read(text, state.repeat(times), forkable=False)
        got = torch.stack([decoder.step(tokens_R).clone() for tokens_R in text.unbind(1)], 1)
        assert relative_error(got, wanted.hidden) < 0.1
        after = decoder.state
        for layer, other in zip(after.layers, wanted.state.layers, strict=True):
            for name, x in layer.items():
                assert relative_error(x.float(), other[name].float()) < 0.1, name
    assert any(len(graph._recordings) > 1 for graph in decode._DECODERS[model].values()) == (
        kind == "LaCT" and before[0] == before[1]
    )
