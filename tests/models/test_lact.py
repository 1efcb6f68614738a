"""LaCT is its published definition; its options, formats and costs. What holds for every model is in test_contract."""

import json
import sys

import pytest
import torch
import torch.nn.functional as F
from refine_kernels.testing import assert_close

from refine_harness.errors import ModelError
from refine_harness.models import LaCTForCausalLM, LaCTSWIGLUConfig

from .tiny import LACT_OPTIONS, build, lact, tokens

each_variant = pytest.mark.parametrize("model", [f"lact_{name}" for name in LACT_OPTIONS], indirect=True)


@pytest.fixture(scope="module")
def model(request):
    return build(getattr(request, "param", "lact_muon"))


def norm(x, weight, eps):
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


def turned(x_THI, theta):
    """Channel i of the first half and of the second turned together, by position times theta^(-2i/I)."""
    T, _, size = x_THI.shape
    out = x_THI.clone()
    for t in range(T):
        for i in range(size // 2):
            angle = torch.tensor(t * theta ** (-2 * i / size), dtype=x_THI.dtype)
            a, b = x_THI[t, :, i], x_THI[t, :, i + size // 2]
            out[t, :, i] = a * angle.cos() - b * angle.sin()
            out[t, :, i + size // 2] = a * angle.sin() + b * angle.cos()
    return out


def orthogonal(g):
    """The published Newton-Schulz iteration on one matrix."""
    x = g.T if g.shape[0] > g.shape[1] else g
    x = x / (x.norm() + 1e-7)
    for a, b, c in (
        (4.0848, -6.8946, 2.9270),
        (3.9505, -6.3029, 2.6377),
        (3.7418, -5.5913, 2.3037),
        (2.8769, -3.1427, 1.2046),
        (2.8366, -3.0525, 1.2012),
    ):
        s = x @ x.T
        x = a * x + (b * s + c * s @ s) @ x
    return x.T if g.shape[0] > g.shape[1] else x


def fast_weights(config, w, q, k, v, rates, kept):
    """One head of the fast branch, token by token and a step at each chunk's end: [T, V]."""
    w0, w1, w2 = main = used = w
    norms = [x.norm(dim=1, keepdim=True) for x in w]
    last, out = [torch.zeros_like(x) for x in w], []
    for t in range(len(q)):
        if t and t % config.lact_chunk_size == 0:
            w0, w1, w2 = used
            d0, d1, d2 = (torch.zeros_like(x) for x in w)
            for s in range(t - config.lact_chunk_size, t):
                rate0, rate1, rate2 = rates[s].chunk(3)
                gate, up = w0 @ k[s], w2 @ k[s]
                sigma = 1 / (1 + (-gate).exp())
                back = w1.T @ v[s]
                d1 = d1 + torch.outer(v[s], gate * sigma * up * rate1)
                d0 = d0 + torch.outer(back * up * sigma * (1 + gate * (1 - sigma)), k[s] * rate0)
                d2 = d2 + torch.outer(back * gate * sigma, k[s] * rate2)
            steps = [d0, d1, d2]
            if config.use_momentum:
                mean = kept[t - config.lact_chunk_size : t].mean()
                last = steps = [d + mean * m for d, m in zip(steps, last, strict=True)]
            if config.use_muon and config.use_fused_kernel:
                both = orthogonal(torch.cat((steps[0], steps[2])))
                steps = [both[: len(d0)], orthogonal(steps[1]), both[len(d0) :]]
            elif config.use_muon:
                steps = [orthogonal(d) for d in steps]
            main = [x + d for x, d in zip(main if config.ttt_prenorm else used, steps, strict=True)]
            used = [x / (x.norm(dim=1, keepdim=True) + 1e-5) * n for x, n in zip(main, norms, strict=True)]
        w0, w1, w2 = used
        out.append(w1 @ (F.silu(w0 @ q[t]) * (w2 @ q[t])))
    return torch.stack(out)


def attention(q, k, v, window):
    """One head, query by query."""
    out = []
    for t in range(len(q)):
        first = max(0, t - window + 1)
        out.append((k[first : t + 1] @ q[t] * q.shape[1] ** -0.5).softmax(0) @ v[first : t + 1])
    return torch.stack(out)


def mixed(config, attn, y_TD):
    """The token mixer by its definition, [T, D] before o_proj."""
    T, D = y_TD.shape
    A, H = config.num_attn_heads, config.num_lact_heads
    bias = attn.qkv.bias if config.qkv_bias else 0
    q, k, v = (y_TD @ attn.qkv.weight.T + bias).split(D, -1)
    if config.attn_qk_norm:
        q, k = norm(q, attn.q_norm.weight, 1e-5), norm(k, attn.k_norm.weight, 1e-5)
    fq, fk = (x * attn.qk_scale[:, i] + attn.qk_offset[:, i] for i, x in enumerate((q, k)))
    fv = v
    q, k = (turned(x.view(T, A, -1), config.rope_theta) for x in (q, k))
    attended = torch.stack(
        [attention(q[:, a], k[:, a], v.view(T, A, -1)[:, a], config.window_size) for a in range(A)], 1
    )
    if config.qkv_silu:
        fq, fk, fv = F.silu(fq), F.silu(fk), fv if config.no_v_silu else F.silu(fv)
    fq, fk = (x.view(T, H, -1) / (x.view(T, H, -1).norm(dim=-1, keepdim=True) + 1e-5) for x in (fq, fk))
    if not config.ttt_nope:
        fq, fk = (turned(x.reshape(T, A, -1), config.rope_theta).reshape(T, H, -1) for x in (fq, fk))
    base = torch.log(torch.expm1(torch.tensor(0.001, dtype=y_TD.dtype)))
    rates = F.softplus(y_TD @ attn.lr_proj.weight.T + attn.lr_proj.bias + base).view(T, H, -1)
    kept = y_TD.new_zeros(T, H)
    if config.use_momentum:
        kept = torch.sigmoid(y_TD @ attn.momentum_proj[0].weight.T + attn.momentum_proj[0].bias)
    w0, w2 = attn.w0, attn.w2
    if config.w0_w2_low_rank > 0:
        w0, w2 = (
            torch.stack([a @ b + 0.5 * torch.eye(len(a), b.shape[1]) for a, b in zip(w.w_left, w.w_right, strict=True)])
            for w in (w0, w2)
        )
    heads = []
    for h in range(H):
        o = fast_weights(
            config, (w0[h], attn.w1[h], w2[h]), fq[:, h], fk[:, h], fv.view(T, H, -1)[:, h], rates[:, h], kept[:, h]
        )
        o = norm(o, attn.ttt_norm.weight, 1e-5)
        if config.learnable_ttt_scale:
            o = o * F.silu(y_TD @ attn.ttt_scale_proj.weight[h] + attn.ttt_scale_proj.bias[h])[:, None]
        heads.append(o)
    return attended.reshape(T, D) + torch.cat(heads, -1)


def naive_hidden(model, tokens_T):
    """The model from its published definition, independent of every op in refine_kernels."""
    config = model.config
    x_TD = model.model.embeddings.weight[tokens_T]
    for block in model.model.layers:
        y_TD = norm(x_TD, block.attn_norm.weight, config.norm_eps)
        x_TD = x_TD + mixed(config, block.attn, y_TD) @ block.attn.o_proj.weight.T
        y_TD = norm(x_TD, block.mlp_norm.weight, config.norm_eps)
        inner = F.silu(y_TD @ block.mlp.gate_proj.weight.T) * (y_TD @ block.mlp.up_proj.weight.T)
        x_TD = x_TD + inner @ block.mlp.down_proj.weight.T
    return norm(x_TD, model.model.norm.weight, config.norm_eps)


@pytest.mark.parametrize("T", (1, 16, 17, 40))
@each_variant
def test_reading_is_the_published_definition(model, T):
    row = tokens(1, T)
    got, want = model.read(row).hidden, naive_hidden(model, row[0])[None]
    assert_close(got, want)
    slope = torch.randn(want.shape, generator=torch.Generator().manual_seed(3), dtype=want.dtype)
    grads = []
    for hidden in (got, want):
        model.zero_grad()
        (hidden * slope).sum().backward()
        grads.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    for name, want_grad in grads[1].items():
        assert_close(grads[0][name], want_grad, name)
    if T > 32:  # two updates were made, so everything that decides how the fast weights move has a gradient
        untouched = {name for name, _ in model.named_parameters()} - {n for n, g in grads[0].items() if bool(g.any())}
        assert untouched <= {"lm_head.weight"}


def states_equal(got, want):
    for a, b in zip(got.layers, want.layers, strict=True):
        assert a.keys() == b.keys()
        for name in a:
            assert_close(a[name], b[name], name)


@pytest.mark.parametrize("begun", (0, 5, 16, 27))
@each_variant
def test_every_fork_is_the_state_after_the_prefix(model, begun):
    text, T = tokens(2, begun + 20), 20
    with torch.no_grad():
        before = model.read(text[:, :begun]).state if begun else None
        reading = model.read(text[:, begun:], before)
        forks = reading.states_at(torch.arange(-1, T).expand(2, -1))
        assert forks.seen_R.tolist() == [*range(begun, begun + T + 1)] * 2
        for p in range(-1 if begun else 0, T):
            states_equal(forks.select([p + 1, p + 1 + T + 1]), model.read(text[:, : begun + p + 1]).state)
        if not begun:  # reading goes on from the fork before the first token as from nothing
            start = forks.select([0, T + 1])
            states_equal(model.read(text, start).state, reading.state)


@each_variant
def test_token_by_token_the_states_are_those_of_one_reading(model):
    text, state = tokens(2, 50), None
    with torch.no_grad():
        forks = model.read(text).states_at(torch.arange(50).expand(2, -1))
        for t in range(50):
            state = model.read(text[:, t : t + 1], state, forkable=False).state
            states_equal(state, forks.select([t, t + 50]))


@each_variant
def test_rows_at_different_places_with_different_lengths_are_rows_alone(model):
    first, second = (3, 16, 30), (14, 1, 25)
    text = tokens(3, 60)
    with torch.no_grad():
        state = model.read(text, lengths=torch.tensor(first)).state
        rest = torch.stack([text[b, f : f + max(second)] for b, f in enumerate(first)])
        got = model.read(rest, state, torch.tensor(second))
        for b, (f, s) in enumerate(zip(first, second, strict=True)):
            want = model.read(text[b : b + 1, : f + s])
            assert_close(got.hidden[b, :s], want.hidden[0, f:])
            states_equal(got.state.select([b]), want.state)


def test_a_state_has_one_size_whatever_was_read(model):
    with torch.no_grad():
        sizes = {model.read(tokens(1, T), forkable=False).state.nbytes for T in (1, 16, 17, 200)}
    assert len(sizes) == 1


def test_a_token_that_crosses_no_end_computes_no_update(model, monkeypatch):
    with torch.no_grad():
        full, partial = (model.read(tokens(2, T)).state for T in (16, 17))
        monkeypatch.setattr(sys.modules["refine_kernels.lact.reference"], "update", None)
        model.read(tokens(2, 1), partial)
        with pytest.raises(TypeError):
            model.read(tokens(2, 1), full)


def test_a_state_keeps_its_values_when_the_parameters_change():
    model = build("lact_plain")
    with torch.no_grad():
        state = model.read(tokens(1, 3)).state
        before = state.clone()
        for p in model.parameters():
            p.add_(1.0)
    states_equal(state, before)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("options", ({"fp32_states": True}, {"ttt_prenorm": True}, {"use_muon": True}))
def test_narrow_dtypes_stay_near_float64(dtype, options):
    changes = {"hidden_size": 32, "initializer_range": 0.2, "w0_w2_low_rank": 3, **options}
    narrow, wide = (lact(stir=False, **changes)() for _ in range(2))
    torch.nn.Module.to(narrow, dtype)
    wide.load_state_dict(narrow.state_dict())
    torch.nn.Module.to(wide, torch.float64)
    text = tokens(1, 50)
    with torch.no_grad():
        reading, want = narrow.read(text), wide.read(text).hidden
        after = narrow.read(text[:, :3], reading.state)
    assert reading.hidden.dtype == dtype
    states = {torch.float32} if "fp32_states" in options else {dtype}
    assert {reading.state.layers[0]["w1"].dtype, after.state.layers[0]["w1"].dtype} == states
    for name, x in reading.state.layers[0].items():
        assert after.state.layers[0][name].dtype == x.dtype, name
    # Several layers of rounding, not one op; Muon makes small singular values as large as others, errors and all.
    allowed = {torch.float32: 1e-4, torch.bfloat16: 0.15 if "use_muon" in options else 6e-2}[dtype]
    assert float((reading.hidden.double() - want).norm() / want.norm()) < allowed


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("lr_parameterization", "softmax"),
        ("ttt_loss_type", "mse"),
        ("hidden_act", "gelu"),
        ("window_size", None),
        ("lact_chunk_size", 0),
        ("num_attn_heads", 3),
        ("num_attn_heads", 16),
        ("num_lact_heads", 5),
        ("lr_dim", 2),
    ],
)
def test_options_whose_meaning_is_not_known_are_refused_by_name(option, value):
    config = LaCTSWIGLUConfig(hidden_size=16, num_attn_heads=4, num_lact_heads=2, num_hidden_layers=1, vocab_size=40)
    setattr(config, option, value)
    with pytest.raises(ModelError, match=option):
        LaCTForCausalLM(config)


@each_variant
def test_a_model_survives_the_disk(model, tmp_path):
    model.save_pretrained(tmp_path)
    again = LaCTForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    with torch.no_grad():
        assert torch.equal(again.read(tokens(1, 40)).hidden, model.read(tokens(1, 40)).hidden)


def test_saved_names_and_config_are_the_published_ones(tmp_path):
    model = build("lact_muon")
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["model_type"] == "lact_swiglu" and config["architectures"] == ["LaCTForCausalLM"]
    shapes = {name: tuple(p.shape) for name, p in model.state_dict().items() if name.startswith("model.layers.0.attn.")}
    assert {name.removeprefix("model.layers.0.attn."): shape for name, shape in shapes.items()} == {
        "qkv.weight": (48, 16),
        "o_proj.weight": (16, 16),
        "w0.w_left": (2, 8, 3),
        "w0.w_right": (2, 3, 8),
        "w1": (2, 8, 8),
        "w2.w_left": (2, 8, 3),
        "w2.w_right": (2, 3, 8),
        "lr_proj.weight": (6, 16),
        "lr_proj.bias": (6,),
        "qk_scale": (16, 2),
        "qk_offset": (16, 2),
        "ttt_scale_proj.weight": (2, 16),
        "ttt_scale_proj.bias": (2,),
        "ttt_norm.weight": (8,),
        "momentum_proj.0.weight": (2, 16),
        "momentum_proj.0.bias": (2,),
    }


@torch.no_grad()
def test_initial_weights_have_the_published_deviations():
    torch.manual_seed(0)
    D = 128
    low = dict(lact(stir=False, hidden_size=D, w0_w2_low_rank=16, initializer_range=0.006)().named_parameters())
    full = dict(lact(stir=False, hidden_size=D, inter_multi=2)().named_parameters())
    layer = "model.layers.0.attn."
    for name, p, deviation in (
        ("w0.w_left", low, 0.5 * 16**-0.5),
        ("w2.w_right", low, 0.5 * 64**-0.5),
        ("qkv.weight", low, 0.006),
        ("w0", full, 64**-0.5),
        ("w1", full, 128**-0.5),
    ):
        assert float(p[layer + name].std()) == pytest.approx(deviation, rel=0.1), name
    assert bool((full[layer + "qk_scale"] == 1).all())
    assert not bool(full[layer + "qk_offset"].any() or full[layer + "lr_proj.bias"].any())


@torch.no_grad()
def test_a_step_in_place_writes_one_token_and_makes_no_state(model):
    text = tokens(3, 40)
    state = model.read(text[:, :20], lengths=torch.tensor((3, 19, 20)), forkable=False).state.clone()
    where = [{name: x.data_ptr() for name, x in layer.items()} for layer in state.layers]
    after = model.read(text[:, 20:21], state, forkable=False, in_place=True).state
    for layer, given, at in zip(after.layers, state.layers, where, strict=True):
        assert all(x is given[name] and x.data_ptr() == at[name] for name, x in layer.items())


IN_PLACE = {
    **LACT_OPTIONS,
    "bare": {"use_momentum": False, "learnable_ttt_scale": False},
    "wide states": {"fp32_states": True, "w0_w2_low_rank": 3},
    "narrow": {"inter_multi": 0.5},
}


@torch.no_grad()
@pytest.mark.parametrize("options", IN_PLACE.values(), ids=IN_PLACE)
@pytest.mark.parametrize("watched", (False, True))
def test_steps_in_place_are_a_reading_wherever_the_rows_stand(options, watched):
    """Rows come to the ends of their chunks one by one. Who watches a projection is called, and changes nothing."""
    torch.manual_seed(0)
    model, calls = lact(**options)(), []
    torch.nn.Module.to(model, torch.float64)
    text, first, steps = tokens(4, 60), torch.tensor((1, 15, 16, 31)), 20
    begun = torch.arange(4)[:, None]
    rest = text[begun, first[:, None] + torch.arange(steps)]
    reading = model.read(text, lengths=first, forkable=False)
    want = model.read(rest, reading.state)
    state = reading.state.clone()
    if watched:
        for part in model.modules():
            if isinstance(part, torch.nn.Linear):
                part.register_forward_hook(lambda part, *_: calls.append(part))
    for t in range(steps):
        got = model.read(rest[:, t : t + 1], state, forkable=False, in_place=True)
        state = got.state
        assert_close(got.hidden[:, 0], want.hidden[:, t])
    states_equal(state, want.state)
    assert len(calls) == watched * steps * len([p for p in model.modules() if isinstance(p, torch.nn.Linear)][:-1])


@torch.no_grad()
def test_a_step_in_place_after_no_token_is_the_first(model):
    text = tokens(2, 3)
    state = model.read(text).states_at(torch.tensor([[-1], [0]])).detach().clone()
    got = model.read(text[:, 1:2], state, forkable=False, in_place=True)
    assert_close(got.hidden[0], model.read(text[:1, 1:2]).hidden[0])
    assert_close(got.hidden[1], model.read(text[1:, :2]).hidden[0, 1:])


@torch.no_grad()
@pytest.mark.parametrize("T", (1, 40))
@each_variant
def test_small_projections_are_one_product_and_say_what_each_says(model, T):
    for layer in model.layers:
        mixer, x = layer.attn, torch.randn(2, T, 16, dtype=torch.float64)
        qkv, said = mixer._linear(x)
        assert said.raw
        assert_close(qkv, mixer.qkv(x))
        assert_close(said.rates_BTX, mixer.lr_proj(x))
        assert (said.momentum_BTH is None) == (not model.config.use_momentum)
        assert (said.gate_BTH is None) == (not model.config.learnable_ttt_scale)
        if said.momentum_BTH is not None:
            assert_close(said.momentum_BTH, mixer.momentum_proj[0](x))
        if said.gate_BTH is not None:
            assert_close(said.gate_BTH, mixer.ttt_scale_proj(x))


def test_who_watches_the_momentum_is_heard():
    """As the test of recorded values rounds it."""
    model = build("lact_muon")
    text, heard = tokens(2, 20), []
    want = model.read(text).hidden
    for name, module in model.named_modules():
        if name.endswith("momentum_proj"):
            module.register_forward_hook(lambda _, __, output: heard.append(output) or output.clone())
    assert_close(model.read(text).hidden, want)
    assert len(heard) == len(model.layers)
    assert all(bool((x > 0).all() and (x < 1).all()) for x in heard)


@pytest.mark.parametrize("rows", (1, 3))
def test_steps_of_a_kind_start_where_that_kind_does(model, rows):
    for kind in (0, rows):
        assert model.step_kind(model.place_of(kind, rows)) == kind
    L = model.config.lact_chunk_size
    assert model.step_kind((0, L - 1, 3 * L + 1)) == 0
    assert model.step_kind((L, 5 * L)) == 2
    assert model.step_kind((L, L + 1)) is None
