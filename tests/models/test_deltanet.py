"""The contract of a reading: forked = re-read, cached = full, padded = alone, pieces = whole; outputs and gradients."""

import json

import pytest
import torch
import torch.nn.functional as F
from refine_kernels.testing import assert_close

from refine_harness.errors import DataError, ModelError
from refine_harness.models import DeltaNetConfig, DeltaNetForCausalLM, State

LENGTHS = (1, 2, 63, 64, 65, 100, 1000)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = DeltaNetConfig(
        hidden_size=16, num_heads=2, num_hidden_layers=2, vocab_size=40, intermediate_size=24, initializer_range=0.4
    )
    return DeltaNetForCausalLM(config).double()


def tokens(rows, T, seed=0):
    return torch.randint(3, 40, (rows, T), generator=torch.Generator().manual_seed(seed))


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def same_gradients(model, got, want):
    a, b = gradients(model, got), gradients(model, want)
    assert a.keys() == b.keys() == {name for name, _ in model.named_parameters()}
    for name in a:
        assert_close(a[name], b[name], name)


def probe(hidden, seed=1):
    """A loss that no symmetry makes blind."""
    weights = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(seed), dtype=hidden.dtype)
    return (hidden * weights).sum() + (hidden**3 * weights.flip(-1)).sum()


def naive_hidden(model, tokens_T):
    """The model token by token from its published definition, independent of every op in refine_kernels."""
    config = model.config
    H, eps = config.num_heads, config.norm_eps
    x_TD = model.model.embeddings.weight[tokens_T]

    def norm(x, weight):
        return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight

    for block in model.model.layers:
        attn, y_TD = block.attn, norm(x_TD, block.attn_norm.weight)
        mixed = []
        for project, conv in (
            (attn.q_proj, attn.q_conv1d),
            (attn.k_proj, attn.k_conv1d),
            (attn.v_proj, attn.v_conv1d),
        ):
            z = F.conv1d(F.pad((y_TD @ project.weight.T).T[None], (3, 0)), conv.weight, groups=conv.weight.shape[0])
            mixed.append(F.silu(z[0].T).view(len(y_TD), H, -1))
        q, k, v = mixed
        q, k = (z / (z.square().sum(-1, keepdim=True) + 1e-6).sqrt() for z in (q, k))
        beta = torch.sigmoid(y_TD @ attn.b_proj.weight.T)
        S = torch.zeros(H, k.shape[-1], v.shape[-1], dtype=x_TD.dtype)
        out = []
        for t in range(len(y_TD)):
            error = v[t] - torch.einsum("hkv,hk->hv", S, k[t])
            S = S + torch.einsum("h,hk,hv->hkv", beta[t], k[t], error)
            out.append(torch.einsum("hkv,hk->hv", S, q[t]) * q.shape[-1] ** -0.5)
        o = norm(torch.stack(out), attn.o_norm.weight).flatten(1)
        x_TD = x_TD + o @ attn.o_proj.weight.T
        y_TD = norm(x_TD, block.mlp_norm.weight)
        inner = F.silu(y_TD @ block.mlp.gate_proj.weight.T) * (y_TD @ block.mlp.up_proj.weight.T)
        x_TD = x_TD + inner @ block.mlp.down_proj.weight.T
    return norm(x_TD, model.model.norm.weight)


@pytest.mark.parametrize("T", (1, 2, 65, 100))
def test_reading_is_the_published_definition(model, T):
    row = tokens(1, T)
    hidden = model.read(row).hidden
    want = naive_hidden(model, row[0])[None]
    assert_close(hidden, want)
    got = probe(model.logits(hidden))
    same_gradients(model, got, probe(F.linear(want, model.lm_head.weight)))


@pytest.mark.parametrize("T", LENGTHS)
def test_forked_is_reread(model, T):
    text, rollout = tokens(2, T), tokens(6, 7, seed=2)
    positions = torch.tensor([[T - 1, T // 2, 0], [T // 3, min(63, T - 1), min(64, T - 1)]])
    reading = model.read(text)
    forked = model.read(rollout, reading.states_at(positions)).hidden
    reread, places = [], [(b, p) for b in range(2) for p in positions[b].tolist()]
    for row, (b, p) in enumerate(places):
        reread.append(model.read(torch.cat((text[b, : p + 1], rollout[row]))[None]).hidden[0, p + 1 :])
    want = torch.stack(reread)
    assert_close(forked, want)
    same_gradients(model, probe(model.logits(forked)), probe(model.logits(want)))


@pytest.mark.parametrize("T", LENGTHS)
def test_cached_decoding_is_one_reading(model, T):
    text = tokens(2, T + 3)
    want = model.read(text).hidden[:, T:]
    state, decoded = model.read(text[:, :T]).state, []
    for t in range(T, T + 3):
        reading = model.read(text[:, t : t + 1], state, forkable=False)
        state = reading.state
        decoded.append(reading.hidden)
    got = torch.cat(decoded, 1)
    assert_close(got, want)
    same_gradients(model, probe(model.logits(got)), probe(model.logits(model.read(text).hidden[:, T:])))


@pytest.mark.parametrize("T", LENGTHS)
def test_pieces_are_the_whole(model, T):
    text = tokens(1, T)
    state, pieces = None, []
    for start in range(0, T, 37):
        reading = model.read(text[:, start : start + 37], state)
        state = reading.state
        pieces.append(reading.hidden)
    assert state is not None
    whole = model.read(text)
    got = torch.cat(pieces, 1)
    assert_close(got, whole.hidden)
    for name, x in state.layers[1].items():
        assert_close(x, whole.state.layers[1][name], name)
    assert state.seen_R.tolist() == whole.state.seen_R.tolist() == [T]
    same_gradients(model, probe(model.logits(got)), probe(model.logits(whole.hidden)))


@pytest.mark.parametrize("T", LENGTHS)
def test_a_padded_row_is_the_row_alone(model, T):
    longest = T + 70
    batch = tokens(2, longest)
    batch[0, T:] = 39
    lengths = torch.tensor([T, longest])
    padded, alone = model.read(batch, lengths=lengths), model.read(batch[:1, :T])
    assert_close(padded.hidden[:1, :T], alone.hidden)
    for layer, want in zip(padded.state.layers, alone.state.layers, strict=True):
        for name in layer:
            assert_close(layer[name][:1], want[name], name)
    assert padded.state.seen_R.tolist() == [T, longest]
    after = tokens(1, 3, seed=4)
    got = model.read(after, padded.state.select([0])).hidden
    want = model.read(after, alone.state).hidden
    same_gradients(
        model,
        probe(model.logits(got)) + probe(model.logits(padded.hidden[:1, :T])),
        probe(model.logits(want)) + probe(model.logits(alone.hidden)),
    )


def test_position_minus_one_is_the_state_before_the_reading(model):
    first = model.read(tokens(1, 30))
    second = model.read(tokens(1, 20, seed=3), first.state)
    fork = second.states_at(torch.tensor([[-1]]))
    for layer, want in zip(fork.layers, first.state.layers, strict=True):
        for name in layer:
            assert_close(layer[name], want[name], name)
    assert fork.seen_R.tolist() == [30]


def test_a_reading_without_tape_cannot_be_forked(model):
    with pytest.raises(RuntimeError, match="forkable"):
        model.read(tokens(1, 4), forkable=False).states_at(torch.tensor([[1]]))


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_narrow_dtypes_stay_near_float64(model, dtype):
    narrow = DeltaNetForCausalLM(model.config).to(dtype)
    narrow.load_state_dict(model.state_dict())
    wide = DeltaNetForCausalLM(model.config).double()
    wide.load_state_dict(narrow.state_dict())
    text = tokens(1, 130)
    with torch.no_grad():
        got, want = narrow.read(text).hidden, wide.read(text).hidden
    assert got.dtype == dtype
    allowed = {torch.float32: 1e-5, torch.bfloat16: 6e-2}[dtype]  # several layers of rounding, not one op
    assert float((got.double() - want).norm() / want.norm()) < allowed


def test_a_state_survives_the_disk_and_is_a_value(model, tmp_path):
    state = model.read(tokens(2, 70)).state.detach()
    state.save(tmp_path / "s.safetensors")
    loaded = State.load(tmp_path / "s.safetensors")
    assert loaded.nbytes == state.nbytes and len(loaded) == 2
    after = tokens(4, 5, seed=9)
    want = model.read(after, state.repeat(2)).hidden
    got = model.read(after, State.cat([loaded.select([0, 0]), loaded.select(slice(1, 2)).repeat(2)])).hidden
    assert torch.equal(got, want)
    before = loaded.layers[0]["memory"].clone()
    model.read(after, loaded.repeat(2))
    assert torch.equal(before, loaded.layers[0]["memory"])
    (tmp_path / "bad").write_text("no state")
    with pytest.raises(DataError, match="not a saved state"):
        State.load(tmp_path / "bad")


@pytest.mark.parametrize("side", ("left", "right"))
def test_forward_with_a_mask_on_either_side_is_each_row_alone(model, side):
    rows = [tokens(1, n, seed=n)[0] for n in (5, 90, 64)]
    T = 90
    batch, mask = torch.zeros(3, T, dtype=torch.int64), torch.zeros(3, T, dtype=torch.int64)
    spans = [slice(T - len(r), T) if side == "left" else slice(0, len(r)) for r in rows]
    for b, (row, span) in enumerate(zip(rows, spans, strict=True)):
        batch[b, span], mask[b, span] = row, 1
    with torch.no_grad():
        logits = model(batch, attention_mask=mask).logits
        for b, (row, span) in enumerate(zip(rows, spans, strict=True)):
            assert_close(logits[b : b + 1, span], model(row[None]).logits)


def test_generation_agrees_with_and_without_cache_and_padding(model):
    model.eval()
    batch, mask = tokens(2, 20), torch.ones(2, 20, dtype=torch.int64)
    mask[0, :7] = 0
    settings = {"max_new_tokens": 10, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    cached = model.generate(batch, attention_mask=mask, use_cache=True, **settings)
    plain = model.generate(batch, attention_mask=mask, use_cache=False, **settings)
    alone = model.generate(batch[:1, 7:], **settings)
    assert cached.shape == (2, 30)
    assert torch.equal(cached, plain)
    assert torch.equal(cached[:1, 7:], alone)


def test_loss_with_labels_is_the_shifted_cross_entropy(model):
    text = tokens(2, 30)
    labels = text.clone()
    labels[:, :10] = -100
    out = model(text, labels=labels)
    logprobs = out.logits.log_softmax(-1)[:, 9:-1].gather(-1, text[:, 10:, None])
    assert_close(out.loss, -logprobs.mean())


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("use_gate", True),
        ("use_beta", False),
        ("qk_norm", "sum"),
        ("qk_activation", "relu"),
        ("use_short_conv", False),
        ("tie_word_embeddings", True),
        ("attn", {"layers": [0], "num_heads": 2}),
        ("num_heads", 3),
    ],
)
def test_options_that_are_not_built_are_refused_by_name(option, value):
    config = DeltaNetConfig(hidden_size=16, num_heads=2, num_hidden_layers=1, vocab_size=40)
    setattr(config, option, value)
    with pytest.raises(ModelError, match=option):
        DeltaNetForCausalLM(config)


def test_saved_names_and_config_are_flas(model, tmp_path):
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["model_type"] == "delta_net" and config["architectures"] == ["DeltaNetForCausalLM"]
    names = set(model.state_dict())
    assert "model.layers.0.attn.q_conv1d.weight" in names and "lm_head.weight" in names
    assert model.model.layers[0].attn.k_conv1d.weight.shape == (16, 1, 4)
