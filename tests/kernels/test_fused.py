"""Every Triton kernel computes what its plain reference computes, outputs and gradients, on awkward sizes.

On a CUDA device the kernels run there; elsewhere in Triton's interpreter, where Triton is installed.
"""

import os
from typing import Any, cast

import pytest
import torch
from refine_kernels.testing import assert_close, poisoned, run_interpreted

pytest.importorskip("triton")

ON_GPU = torch.cuda.is_available()
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if ON_GPU and not INTERPRETED else "cpu"

if not (ON_GPU or INTERPRETED):

    def test_in_the_interpreter():
        run_interpreted(__file__)

else:
    from refine_kernels import (
        Lookup,
        Packing,
        add_normed_heads,
        add_rms_norm,
        delta_step,
        fork_attention,
        gated_rms_norm,
        linear_head,
        linears,
        replay,
        rms_norm,
        rotary,
        shared_qkv,
        short_conv,
        short_conv_step,
        swiglu,
        swiglu_linear,
        window_step,
    )
    from refine_kernels.delta_rule import fused as delta_fused
    from refine_kernels.delta_rule.fused import state_gradients, states
    from refine_kernels.fork_attention import Elsewhere
    from refine_kernels.lact import Chunk, FastWeights, Fresh, Place, kernels, lact, row_norms
    from refine_kernels.lact.reference import map_chunk
    from refine_kernels.linear_head import fused as head
    from refine_kernels.rotary import turns
    from refine_kernels.short_conv import fused as conv

    DTYPES = (torch.float32, torch.bfloat16) if ON_GPU else (torch.float32,)
    dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)

    def draw(*shape, dtype=torch.float32, seed=0):
        x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))
        return x.to(DEVICE, dtype).requires_grad_()

    def compare(op: Any, inputs: Any, *, wider: float = 1.0, **settings: Any) -> None:
        """Outputs and all gradients of the fused form against those of the reference in float64."""
        with poisoned():
            got = op(*inputs, impl="fused", **settings)
        exact = [x.detach().double().requires_grad_() for x in inputs]
        want = op(*exact, impl="reference", **settings)
        got, want = (x if isinstance(x, tuple) else (x,) for x in (got, want))
        slopes = [draw(*x.shape, seed=7 + i).detach() for i, x in enumerate(want)]
        for i, (a, b) in enumerate(zip(got, want, strict=True)):
            assert_close(a, b, f"output {i}", wider=wider)
        losses: list[Any] = [
            sum((x * slope.to(x.dtype)).sum() for x, slope in zip(outputs, slopes, strict=True))
            for outputs in (got, want)
        ]
        with poisoned():
            grads = torch.autograd.grad(losses[0], inputs)
        wants = torch.autograd.grad(losses[1], exact)
        for i, (a, b) in enumerate(zip(grads, wants, strict=True)):
            assert_close(a, b, f"gradient {i}", wider=wider)

    @dtypes
    @pytest.mark.parametrize("shape", [(1, 8), (3, 5, 33), (70, 128), (2, 3, 1000)], ids=str)
    def test_norms(dtype, shape):
        x, residual, gate = (draw(*shape, dtype=dtype, seed=s) for s in range(3))
        weight = draw(shape[-1], dtype=dtype)
        compare(rms_norm, [x, weight], eps=1e-6)
        compare(add_rms_norm, [x, residual, weight], eps=1e-6)
        for activation in ("silu", "sigmoid"):
            compare(gated_rms_norm, [x, gate, weight], eps=1e-6, activation=activation)

    @dtypes
    def test_a_norm_whose_sum_alone_is_used(dtype):
        x, residual, weight = draw(5, 16, dtype=dtype), draw(5, 16, dtype=dtype, seed=3), draw(16, dtype=dtype)
        _, total = add_rms_norm(x, residual, weight, 1e-6, impl="fused")
        gx, gr = torch.autograd.grad(total.sum(), [x, residual])
        assert torch.equal(gx, torch.ones_like(x)) and torch.equal(gr, torch.ones_like(x))

    @dtypes
    @pytest.mark.parametrize("shape", [(1, 7), (3, 5, 33), (2, 3000)], ids=str)
    def test_swiglu(dtype, shape):
        gate, up = draw(*shape, dtype=dtype), draw(*shape, dtype=dtype, seed=1)
        compare(swiglu, [gate, up])
        compare(swiglu_linear, [gate, up, draw(6, shape[-1], dtype=dtype)])

    @dtypes
    @pytest.mark.parametrize("T", (1, 3, 64, 100))
    @pytest.mark.parametrize(
        ("D", "W", "settings"),
        [(12, 4, {}), (12, 4, {"unit_heads": 2}), (70, 3, {"silu": False}), (24, 2, {"silu": False, "unit_heads": 3})],
    )
    def test_short_convolution(dtype, T, D, W, settings):
        x, weight, before = draw(2, T, D, dtype=dtype), draw(D, W, dtype=dtype), draw(2, W - 1, D, dtype=dtype)
        compare(short_conv, [x, weight], **settings)
        compare(short_conv, [x, weight, before], **settings)
        if T >= W:
            compare(short_conv, [x, weight], leading=True, **settings)

    @dtypes
    def test_short_convolution_over_several_blocks(dtype, monkeypatch):
        monkeypatch.setattr(conv, "WALK", 32)
        x, weight, bias = draw(1, 100, 20, dtype=dtype), draw(20, 4, dtype=dtype), draw(20, dtype=dtype)
        compare(short_conv, [x, weight])
        compare(short_conv, [x, weight], leading=True)
        compare(short_conv, [x, weight], packing=packed(70, 1, 29))

        def biased(x, weight, bias, impl):
            return short_conv(x, weight, bias_D=bias, impl=impl)

        compare(biased, [x, weight, bias])

    @dtypes
    def test_short_convolution_with_bias(dtype):
        x, weight, before, bias = draw(2, 9, 8), draw(8, 4), draw(2, 3, 8), draw(8, seed=5)

        def biased(x, weight, before, bias, impl):
            return short_conv(x, weight, before, bias_D=bias, unit_heads=2, impl=impl)

        compare(biased, [x, weight, before, bias])

    @torch.no_grad()
    @dtypes
    @pytest.mark.parametrize(
        ("D", "W", "settings"),
        [(12, 4, {"unit_heads": 2}), (300, 3, {"silu": False}), (24, 2, {"unit_heads": 3}), (12, 1, {})],
    )
    def test_short_convolution_of_one_token(dtype, D, W, settings):
        x, weight, state = draw(3, D, dtype=dtype), draw(D, W, dtype=dtype), draw(3, W - 1, D, dtype=dtype)
        exact = [t.double() for t in (x, weight, state)]
        for _ in range(3):
            got = short_conv_step(x, weight, state, impl="fused", **settings)
            assert_close(got, short_conv_step(*exact, impl="reference", **settings))
            assert_close(state, exact[-1])

    @torch.no_grad()
    @dtypes
    @pytest.mark.parametrize("decay", (False, True))
    @pytest.mark.parametrize(("G", "H", "K", "V"), [(1, 2, 20, 40), (2, 2, 16, 8)])
    def test_delta_rule_of_one_token(dtype, decay, G, H, K, V):
        q, k, v = draw(3, G, K, dtype=dtype), draw(3, G, K, dtype=dtype, seed=1), draw(3, H, V, dtype=dtype)
        k = torch.nn.functional.normalize(k, dim=-1)
        beta, state = draw(3, H).sigmoid(), draw(3, H, K, V).detach().clone()
        g = -draw(3, H, seed=3).abs() if decay else None
        exact, exact_g = [t.double() for t in (q, k, v, beta, state)], None if g is None else g.double()
        for _ in range(3):
            got = delta_fused.delta_step(q, k, v, beta, state, g_BH=g)
            assert_close(got, delta_step(*exact, g_BH=exact_g, impl="reference"))
            assert_close(state, exact[-1])

    def packed(*lengths):
        return Packing(lengths, torch.tensor(lengths, device=DEVICE), max(lengths))

    @dtypes
    @pytest.mark.parametrize("lengths", [(1, 64, 3, 100), (2, 1)], ids=str)
    @pytest.mark.parametrize(
        ("D", "W", "settings"),
        [(12, 4, {}), (12, 4, {"unit_heads": 2}), (70, 3, {"silu": False}), (12, 1, {})],
    )
    def test_short_convolution_of_packed_texts(dtype, lengths, D, W, settings):
        x, weight = draw(1, sum(lengths), D, dtype=dtype), draw(D, W, dtype=dtype)
        compare(short_conv, [x, weight], packing=packed(*lengths), **settings)
        if W > 1:
            before = draw(len(lengths), W - 1, D, dtype=dtype)
            compare(short_conv, [x, weight, before], packing=packed(*lengths), **settings)

    @dtypes
    @pytest.mark.parametrize("pieces", (1, 3))
    @pytest.mark.parametrize("ahead", (False, True))
    def test_linear_head(dtype, pieces, ahead, monkeypatch):
        M, V, D = 37, 300, 16
        monkeypatch.setattr(head, "LOGITS", V * -(-M // pieces))
        monkeypatch.setattr(head, "BLOCK", 64)
        labels = torch.randint(V, (M,), generator=torch.Generator().manual_seed(0)).to(DEVICE)

        slope = draw(M, seed=7).detach()

        def both(hidden, weight, impl):
            known = linear_head(hidden, weight, labels, ahead_M=slope if ahead else None, impl=impl)
            loss = (known.logprobs * slope).sum()[None]
            both = (known.logprobs.detach() + 0 * loss, known.entropies + 0 * loss, loss)
            return tuple(x.to(dtype) if x.dtype == torch.float32 else x for x in both)  # as exact as the products

        compare(both, [draw(M, D, dtype=dtype), draw(V, D, dtype=dtype, seed=2)])

    def log_decay(B, T, H):
        """Summed within each chunk, as the recurrences take it."""
        g = -draw(B, T, H, seed=8).detach().abs() * 0.05
        return torch.cat([piece.cumsum(1) for piece in g.split(64, 1)], 1).contiguous()

    def same_as_alone(together, alone, dims):
        """What packed texts give is what each of them gives, side by side in a dimension of each result."""
        for x, each, dim in zip(together, zip(*alone, strict=True), dims, strict=True):
            assert x is not None
            if ON_GPU:  # where tiles are compiled for lengths, which changes the order of sums
                assert_close(x, torch.cat(each, dim))
            else:
                assert torch.equal(x, torch.cat(each, dim))

    @dtypes
    @pytest.mark.parametrize("T", (1, 63, 64, 150))
    @pytest.mark.parametrize("decay", (False, True))
    @pytest.mark.parametrize("forks", (False, True))
    def test_state_gradients(dtype, T, decay, forks):
        B, G, H, K, V = 2, 1, 2, 20, 24
        N = -(-T // 64)
        q, k = (draw(B, T, G, K, dtype=dtype, seed=s).detach() * 0.3 for s in (0, 1))
        w, do, dv = (draw(B, T, H, X, dtype=dtype, seed=s).detach() * 0.1 for s, X in ((2, K), (3, V), (4, V)))
        dafter = draw(B, H, K, V, seed=5).detach()
        # Two forks of one state among them.
        lookup = Lookup(torch.tensor([0, B * N - 1, 0, N // 2], device=DEVICE))
        brought = draw(4, H, K, V, dtype=dtype, seed=6).detach()
        arrivals = (lookup, lookup.summed(brought)) if forks else None
        dgrid = torch.zeros(B * N, H, K, V, dtype=torch.float64, device=DEVICE)
        lookup.add(brought.double(), dgrid)
        dgrid = dgrid.unflatten(0, (B, N))
        g = log_decay(B, T, H) if decay else None
        with poisoned():
            dh, dstart, dv2 = state_gradients(q, k, w, do, dv, g, dafter, arrivals, 0.7, True)
        # The definition, a chunk at a time, in float64.
        each = [x.double() for x in (q.repeat_interleave(H // G, 2), k.repeat_interleave(H // G, 2), w, do, dv)]
        wanted_dh, wanted_dv, S = [], [], dafter.double()
        for n in reversed(range(N)):
            q_n, k_n, w_n, do_n, dv_n = (x[:, 64 * n : 64 * n + 64].transpose(1, 2) for x in each)
            g_n = torch.zeros_like(q_n[..., :1]) if g is None else g[:, 64 * n : 64 * n + 64].double().mT[..., None]
            last = g_n[..., -1:, :]
            wanted_dh.insert(0, S)
            dv_n = dv_n + (k_n @ S) * torch.exp2(last - g_n)
            wanted_dv.insert(0, dv_n.transpose(1, 2))
            S = torch.exp2(last) * S + 0.7 * (q_n * torch.exp2(g_n)).mT @ do_n - w_n.mT @ dv_n
            if forks:
                S = S + dgrid[:, n]
        loose = torch.bfloat16 if dtype == torch.bfloat16 else torch.float32
        wider = 250.0 if ON_GPU and dtype == torch.float32 else 1.0  # products of float32 are rounded to 10 bits there
        assert_close(dh, torch.stack(wanted_dh, 1), "states", wider=wider)
        assert_close(dv2, torch.cat(wanted_dv, 1), "what was written", wider=wider)
        assert dstart is not None
        assert_close(dstart.to(loose), S, "first state", wider=wider)

    @dtypes
    @pytest.mark.parametrize("decay", (False, True))
    def test_state_gradients_of_packed_texts_are_those_of_each_alone(dtype, decay):
        lengths, G, H, K, V = (150, 1, 64, 129, 300), 1, 2, 20, 24
        packing = packed(*lengths)

        def at_tokens(heads, X, seed):
            return draw(1, sum(lengths), heads, X, dtype=dtype, seed=seed).detach() * 0.2

        parts: Any = [at_tokens(*sizes, seed) for seed, sizes in enumerate([(G, K), (G, K), (H, K), (H, V), (H, V)])]
        g = -draw(1, sum(lengths), H, seed=8).detach().abs() * 0.01 if decay else None
        dafter = draw(len(lengths), H, K, V, seed=5).detach()
        # One fork of every chunk.
        grid = packing.pieces(64)
        brought = draw(len(grid.index_N2), H, K, V, dtype=dtype, seed=6).detach()
        arrivals = Lookup(torch.arange(len(brought), device=DEVICE)), brought
        with poisoned():
            q, k, w, do, dv = parts
            got = state_gradients(q, k, w, do, dv, g, dafter, arrivals, 0.7, True, packing)
        alone = []
        for b, n in enumerate(lengths):
            start = sum(lengths[:b])
            q, k, w, do, dv = (x[:, start : start + n].contiguous() for x in parts)
            own_g = None if g is None else g[:, start : start + n].contiguous()
            first, last = grid.starts[b], grid.starts[b + 1]
            forks = Lookup(torch.arange(int(last - first), device=DEVICE)), brought[first:last]
            alone.append(state_gradients(q, k, w, do, dv, own_g, dafter[b : b + 1], forks, 0.7, True))
        same_as_alone(got, alone, (1, 0, 1))

    @dtypes
    @pytest.mark.parametrize("T", (1, 64, 150))
    @pytest.mark.parametrize(("decay", "started"), [(False, False), (True, True)])
    def test_states(dtype, T, decay, started):
        B, G, H, K, V, N = 2, 1, 2, 20, 40, -(-T // 64)
        k, w, u = (
            draw(B, T, heads, X, dtype=dtype, seed=i).detach() * 0.2
            for i, (heads, X) in enumerate([(G, K), (H, K), (H, V)])
        )
        first = draw(B, H, K, V, seed=5).detach() if started else None
        g = log_decay(B, T, H) if decay else None
        with poisoned():
            h, written, after = states(k, w, u, g, first, True)
            nothing, unsaid, alone = states(k, w, u, g, first, False)
        assert nothing is None and unsaid is None and torch.equal(after, alone)
        # The definition, a chunk at a time, in float64.
        each = [x.double() for x in (k.repeat_interleave(H // G, 2), w, u)]
        S = torch.zeros(B, H, K, V, dtype=torch.float64, device=DEVICE) if first is None else first.double()
        wanted_h, wanted_v = [], []
        for n in range(N):
            k_n, w_n, u_n = (x[:, 64 * n : 64 * n + 64].transpose(1, 2) for x in each)
            g_n = torch.zeros_like(k_n[..., :1]) if g is None else g[:, 64 * n : 64 * n + 64].double().mT[..., None]
            last = g_n[..., -1:, :]
            wanted_h.append(S)
            v_n = u_n - w_n @ S
            wanted_v.append(v_n.transpose(1, 2))
            S = torch.exp2(last) * S + (k_n * torch.exp2(last - g_n)).mT @ v_n
        loose = torch.bfloat16 if dtype == torch.bfloat16 else torch.float32
        wider = 250.0 if ON_GPU and dtype == torch.float32 else 1.0  # products of float32 are rounded to 10 bits there
        assert h is not None and written is not None
        assert_close(h, torch.stack(wanted_h, 1), "states", wider=wider)
        assert_close(written, torch.cat(wanted_v, 1), "what was written", wider=wider)
        assert_close(after.to(loose), S, "last state", wider=wider)

    @dtypes
    def test_states_of_packed_texts_are_those_of_each_alone(dtype):
        lengths, G, H, K, V = (150, 1, 64, 129), 1, 2, 20, 24
        M = sum(lengths)
        k, w, u = (draw(1, M, heads, X, dtype=dtype).detach() * 0.2 for heads, X in ((G, K), (H, K), (H, V)))
        g = -draw(1, M, H, seed=8).detach().abs() * 0.01
        first = draw(len(lengths), H, K, V, seed=5).detach()
        with poisoned():
            got = states(k, w, u, g, first, True, packed(*lengths))
        alone = []
        for b, text in enumerate(zip(*(x.split(lengths, 1) for x in (k, w, u, g)), strict=True)):
            k, w, u, g = (x.contiguous() for x in text)
            alone.append(states(k, w, u, g, first[b : b + 1], True))
        same_as_alone(got, alone, (1, 1, 0))

    @pytest.fixture
    def fla_here(monkeypatch):
        """fla's kernels in the interpreter: one choice of tile sizes each."""
        if not INTERPRETED:
            pytest.skip("tests/kernels/test_gpu.py runs them")
        from refine_kernels import fla

        monkeypatch.setattr(fla, "load_tuned", lambda: 0)
        for name in ("chunk_fwd", "wy_fast", "fused_recurrent"):
            fla.ops(f"gated_delta_rule.{name}")
        for name in ("common.chunk_o", "utils.cumsum"):
            fla.ops(name)
        for _, tuner in fla.autotuners():
            monkeypatch.setattr(tuner, "configs", tuner.configs[:1])

    @pytest.mark.parametrize("lengths", [(150, 1, 64, 129), (7, 20)], ids=str)
    @pytest.mark.parametrize("decay", (False, True))
    @pytest.mark.parametrize("kept", (1, 32))
    def test_delta_rule_of_packed_texts(fla_here, lengths, decay, kept, monkeypatch):
        """All of the fused form, fla's kernels included."""
        from refine_kernels.delta_rule import fused, reference

        G, H, K, V, M, packing = 1, 2, 16, 32, sum(lengths), packed(*lengths)
        q, k = (torch.nn.functional.normalize(draw(1, M, G, K, seed=s).detach(), dim=-1) for s in (0, 1))
        text = [q, k, draw(1, M, H, V), draw(1, M, H).sigmoid(), draw(len(lengths), H, K, V) * 0.1]
        text += [-draw(1, M, H, seed=2).abs() * 0.1] if decay else []
        monkeypatch.setattr(reference, "KEPT", kept)
        # Every chunk is forked, the first one twice.
        chunks = Lookup(torch.tensor([*range(len(packing.pieces(64).index_N2)), 0]))
        results: list[Any] = []
        for ops, dtype in ((fused, torch.float32), (reference, torch.float64)):
            inputs = [x.detach().to(dtype).requires_grad_() for x in text]
            given = {"g_BTH": inputs[5] if decay else None, "packing": packing}
            rule = ops.delta_rule(*inputs[:5], boundaries=True, **given)
            with torch.no_grad():
                start = draw(len(chunks.rows_M), H, K, V, seed=7).to(dtype)
            states = rule.boundaries.join(chunks, start)
            kept_by_both = reference.kept(rule.boundaries.value, rule.stride, 192 if kept == 1 else 128, packing)
            outputs = [rule.outputs_BTHV, rule.state_BHKV, kept_by_both, states]
            loss: Any = sum((x * draw(*x.shape, seed=9).detach().to(dtype)).sum() for x in outputs)
            grads = torch.autograd.grad(loss, inputs)
            with torch.no_grad():  # a few tokens go another way
                outputs += ops.delta_rule(*inputs[:5], **given)[:2]
            results.append([*outputs, *grads])
        for i, (got, want) in enumerate(zip(*results, strict=True)):
            assert_close(got, want, f"result {i}")

    @pytest.mark.parametrize("T", (5, 70))
    @pytest.mark.parametrize("decay", (False, True))
    def test_a_state_that_nobody_reads(fla_here, T, decay):
        from refine_kernels.delta_rule import fused, reference

        B, G, H, K, V = 2, 1, 2, 16, 32
        k = torch.nn.functional.normalize(draw(B, T, G, K).detach(), dim=-1)
        text = [k, draw(B, T, H, V), draw(B, T, H).sigmoid(), draw(B, H, K, V) * 0.1]
        text += [-draw(B, T, H, seed=2).abs() * 0.1] if decay else []
        results: list[Any] = []
        for ops, dtype in ((fused, torch.float32), (reference, torch.float64)):
            inputs = [x.detach().to(dtype).requires_grad_() for x in text]
            g = inputs[4] if decay else None
            after = ops.delta_state(*inputs[:4], g_BTH=g)
            grads = torch.autograd.grad((after * draw(*after.shape, seed=9).detach().to(dtype)).sum(), inputs)
            with torch.no_grad():
                results.append([after, ops.delta_state(*inputs[:4], g_BTH=g), *grads])
        for i, (got, want) in enumerate(zip(*results, strict=True)):
            assert_close(got, want, f"result {i}")

    @dtypes
    @pytest.mark.parametrize("sizes", [(70,), (70, 65), (3, 70, 5), (2, 7)], ids=str)
    @pytest.mark.parametrize("biased", (False, True))
    def test_linears(dtype, sizes, biased):
        x, weights = draw(2, 9, 12, dtype=dtype), [draw(n, 12, dtype=dtype, seed=i) for i, n in enumerate(sizes)]
        biases = [draw(n, dtype=dtype, seed=i) for i, n in enumerate(sizes[:1])] if biased else []

        def op(x, *tensors, impl):
            given = [*tensors[len(sizes) :], *[None] * len(sizes)]
            return tuple(linears(x, list(zip(tensors, given, strict=False))[: len(sizes)], impl=impl))

        compare(op, [x, *weights, *biases])

    def test_linears_of_frozen_weights_or_of_which_one_is_used():
        x, w, v = draw(5, 12), draw(70, 12), draw(3, 12)
        y, z = linears(x.detach(), [(w, None), (v.detach(), None)], impl="fused")
        assert_close(torch.autograd.grad(y.sum() + z.sum(), w)[0], x.detach().double().sum(0).expand(70, 12))
        _, z = linears(x, [(w, None), (v, None)], impl="fused")
        assert_close(torch.autograd.grad(z.sum(), x)[0], v.detach().double().sum(0).expand(5, 12))

    def angles(like, rows, T, size):
        """Rows at different places of long texts."""
        positions = torch.arange(T)[None] + 100_003 * torch.arange(rows)[:, None]
        # The same rounded angles for either side: what is compared is the turning.
        made = turns(positions.to(like.device), size, 1e4)
        return type(made)(*(x.to(torch.float64) if like.dtype == torch.float64 else x for x in made))

    @dtypes
    @pytest.mark.parametrize(("T", "H", "size"), [(1, 1, 2), (5, 3, 6), (33, 24, 64)])
    def test_rotary(dtype, T, H, size):
        compare(
            lambda x, impl: rotary(x, angles(x, 2, T, size), impl=impl), [draw(2, T, H, size, dtype=dtype)]
        )  # fmt: skip

    @dtypes
    @pytest.mark.parametrize(
        ("T", "D", "heads", "size", "options"),
        [
            (1, 8, 2, 2, {}),
            (37, 36, 3, 4, {}),
            (5, 24, 2, 6, {"silu": False, "silu_values": False}),
            (33, 24, 2, 12, {"turn_fast": False, "silu_values": False}),
        ],
    )
    def test_shared_qkv(dtype, T, D, heads, size, options):
        def op(qkv, scale, offset, impl):
            return tuple(
                shared_qkv(qkv, scale, offset, angles(qkv, 2, T, size), fast_heads=heads, impl=impl, **options)
            )

        compare(op, [draw(2, T, 3, D, dtype=dtype), draw(D, 2, dtype=dtype), draw(D, 2, dtype=dtype, seed=1)])

    @dtypes
    @pytest.mark.parametrize("gated", (False, True))
    @pytest.mark.parametrize("by_head", (False, True))
    def test_adding_normed_heads(dtype, gated, by_head):
        B, T, H, K = 2, 37, 3, 20
        gate = [draw(B, T, H, dtype=dtype)] if gated else []

        def op(base, x, weight, *gate, impl):
            x = x.transpose(1, 2) if by_head else x
            return add_normed_heads(base, x, weight, gate[0] if gate else None, 1e-5, impl=impl)

        x = draw(B, H, T, K, dtype=dtype) if by_head else draw(B, T, H, K, dtype=dtype)
        compare(op, [draw(B, T, H * K, dtype=dtype), x, draw(K, dtype=dtype), *gate])

    @dtypes
    @pytest.mark.parametrize(("N", "K", "window"), [(1, 5, 70), (3, 7, 12), (20, 4, 1), (2, 1, 1000)])
    def test_fork_attention(dtype, N, K, window):
        positions = torch.tensor([[-1, 0, 63, 130], [64, 64, 129, 100]], device=DEVICE)
        H, D, T = 2, 20, 131
        own = [draw(8, N * K, H, D, dtype=dtype, seed=i) for i in range(3)]
        text = [draw(2, T, H, D, dtype=dtype), draw(2, T, 3, H, D, dtype=dtype, seed=1)[:, :, 2]]

        def op(q, k, v, text_k, text_v, *, impl):
            return fork_attention(q, k, v, text_k, text_v, positions, length=K, window=window, impl=impl)

        compare(op, [*own, *text])
        with torch.no_grad():
            for x in text:
                x[1, 130:] = torch.nan
            got = op(own[0], own[1], own[2], text[0], text[1], impl="fused")
            assert got.isfinite().all()
            elsewhere = [Elsewhere.like(draw(2, 7, H, D, dtype=dtype).detach()) for _ in range(2)]
            for place, x in zip(elsewhere, text, strict=True):
                place.point_to(x.detach())
            assert torch.equal(got, op(own[0], own[1], own[2], elsewhere[0], elsewhere[1], impl="fused"))

    @dtypes
    @pytest.mark.parametrize(("P", "D"), [(0, 4), (1, 4), (5, 20), (64, 8), (129, 6), (2100, 2)])
    def test_window_step(dtype, P, D):
        B, H = 3, 2
        own = [draw(B, H, D, dtype=dtype, seed=i).detach() for i in range(3)]
        windows = [draw(B, P, H * D, dtype=dtype, seed=3 + i).detach() for i in range(2)]
        seen = torch.tensor((0, 70, 100_000), device=DEVICE)
        exact = [x.double() for x in windows]
        with poisoned():
            got = window_step(*own, *windows, seen_B=seen, impl="fused")
        assert_close(got, window_step(*(x.double() for x in own), *exact, seen_B=seen, impl="reference"))
        assert all(torch.equal(x.double(), y) for x, y in zip(windows, exact, strict=True))

    BARE = {"momentum": False}
    LACT = {
        # One chunk, full ones, a last one that is not full, rows of different length: tokens, of each row, heads.
        "one": (3, (3,), 2, {}),
        "full": (12, (12, 12), 2, {}),
        "rest": (11, (11,), 2, BARE),
        "ragged": (14, (14, 6), 1, {}),
        "padding after all": (15, (10, 6), 1, {}),
        "ragged, bare": (9, (4, 1), 2, BARE),
        "in any order": (14, (5, 14, 1, 13), 2, {}),
        "none and several": (15, (3, 15, 15), 1, BARE),
        "muon": (11, (11,), 1, {"muon": True}),
        "muon, ragged": (8, (8, 1), 1, {"muon": True}),
        "muon, bare": (5, (5,), 1, {"muon": True, **BARE}),
    }

    def weights_of_lact(B, H, M):
        """Fast weights and momenta of each row."""
        return [draw(B, H, M, M, seed=i) for i in range(6)]

    def text_for_lact(B, T, H, M):
        q, k = (torch.nn.functional.normalize(draw(B, T, H, M, seed=s).detach(), dim=-1) for s in (3, 4))
        rates, kept = draw(B, T, H, 3).detach().exp(), draw(B, T, H, seed=2).detach().sigmoid()
        return [x.requires_grad_() for x in (q, k, draw(B, T, H, M, seed=8), rates, kept)]

    THROUGH_MUON = 5.0
    """Newton-Schulz multiplies small singular values by up to 493, and their rounding errors with them."""

    def reading(inputs, L, lengths, impl, *, muon=False, momentum=True):
        q, k, v, rates, kept, *packs = inputs
        B, T = q.shape[:2]
        w, m = tuple(packs[:3]), tuple(packs[3:])
        fast = FastWeights(w, None, m if momentum else None, row_norms(w))
        lengths_B = None if min(lengths) == T else torch.tensor(lengths, device=q.device)
        place = Place(torch.zeros(B, dtype=torch.int64, device=q.device), (0,) * B, lengths_B, lengths)
        tokens = Chunk(k, v, rates, kept if momentum else None)
        return lact(q, tokens, fast, None, place, chunk_size=L, muon=muon, boundaries=True, impl=impl)

    def results(reading, lengths):
        """Outputs of real tokens, the last state, and that of a few forks."""
        T = reading.outputs_BTHV.shape[1]
        real_BT = torch.arange(T) < torch.tensor(lengths)[:, None]
        forks = torch.tensor([[-1, n // 2, n - 1] for n in lengths]).to(reading.outputs_BTHV.device)
        fast, unfinished = reading.state_at(forks)
        parts = [*reading.fast.weights, *(reading.fast.momentum or ()), *fast.weights, *(fast.momentum or ())]
        outputs = reading.outputs_BTHV.masked_fill(~real_BT.to(forks.device)[..., None, None], 0)
        return (outputs, *parts, *fast.norms, *(x for x in unfinished if x is not None))

    @pytest.mark.parametrize(("T", "lengths", "H", "options"), LACT.values(), ids=LACT)
    def test_lact(T, lengths, H, options):
        B, M, L = len(lengths), 3, 4
        inputs = [*text_for_lact(B, T, H, M), *weights_of_lact(B, H, M)]
        used = [x for i, x in enumerate(inputs) if options.get("momentum", True) or not (i == 4 or i >= 8)]

        def op(*given, impl):
            filled = iter(given)
            each = [next(filled) if any(x is y for y in used) else None for x in inputs]
            return results(reading(each, L, lengths, impl, **options), lengths)

        compare(op, used, wider=THROUGH_MUON if options.get("muon") else 1.0)

    @pytest.mark.parametrize("H", (1, 2))
    def test_texts_that_begin_share_their_start(H):
        B, T, M, L = 2, 11, 3, 4
        inputs = [*text_for_lact(B, T, H, M), *(draw(H, M, M, seed=i) for i in range(3))]

        def op(q, k, v, rates, kept, *w, impl):
            place = Place(torch.zeros(B, dtype=torch.int64, device=q.device), (0,) * B, None, (T,) * B)
            start = Fresh(cast(Any, w), B, momentum=True, prenorm=False)
            tokens = Chunk(k, v, rates, kept)
            return results(lact(q, tokens, start, None, place, chunk_size=L, boundaries=True, impl=impl), (T,) * B)

        compare(op, inputs)

    def test_nothing_is_computed_for_padding(monkeypatch):
        """Chunks are made full for the reading; no token after a row's last chunk is read, and none is learned from."""
        monkeypatch.setattr(replay, "_find", lambda *_: None)
        T, lengths, H, L = 23, (5, 23, 1, 20), 2, 4
        ends, chunks = (1, 5, 0, 4), 2 + 6 + 1 + 5
        learned, read = [], []
        terms, inner = kernels.terms, kernels.inner
        monkeypatch.setattr(kernels, "terms", lambda both, *rest: learned.append(both.shape[:2]) or terms(both, *rest))
        monkeypatch.setattr(kernels, "inner", lambda both: read.append(both.shape[:-1].numel()) or inner(both))
        with torch.no_grad():
            reading([*text_for_lact(4, T, H, 3), *weights_of_lact(4, H, 3)], L, lengths, "fused")
        assert sum(n * tokens for n, tokens in learned) == sum(ends) * H * L
        assert sum(read) <= chunks * H * L

    GOING_ON = {
        # No chunk ends, one, several, the held one is full, rows of different length: tokens held, tokens, of each row.
        "none": (1, 3, (3, 3), {}),
        "one": (3, 2, (2, 2), {}),
        "several": (1, 12, (12, 12), {}),
        "several, bare": (3, 10, (10, 10), BARE),
        "full": (4, 12, (12, 12), {}),
        "full, then one": (4, 2, (2, 2), BARE),
        "ragged": (2, 13, (13, 3), {}),
        "ragged, padding after all": (3, 13, (2, 9), {}),
        "full, ragged": (4, 9, (2, 9), {}),
        # Newton-Schulz's errors grow with every update, in the plain form too.
        "muon": (3, 2, (2, 2), {"muon": True}),
        "muon, full": (4, 2, (2, 1), {"muon": True}),
    }

    @pytest.mark.parametrize(("held", "T", "lengths", "options"), GOING_ON.values(), ids=GOING_ON)
    def test_lact_that_goes_on(held, T, lengths, options):
        """From an unfinished chunk, whose gradients flow too; the second row began with a chunk more."""
        B, M, L = len(lengths), 3, 4
        momentum, muon = options.get("momentum", True), options.get("muon", False)
        before = [draw(*x.shape, seed=11 + i) for i, x in enumerate(text_for_lact(B, held, 1, M)[1:])]
        inputs = [*text_for_lact(B, T, 1, M), *weights_of_lact(B, 1, M), *before]
        used = [x for i, x in enumerate(inputs) if momentum or i not in (4, 8, 9, 10, 14)]

        def op(*given, impl):
            filled = iter(given)
            each: Any = [next(filled) if any(x is y for y in used) else None for x in inputs]
            q, *each = each
            w, m, earlier = tuple(each[4:7]), tuple(each[7:10]), cast(Any, each[10:])
            fast = FastWeights(w, None, m if momentum else None, row_norms(w))
            rest = map_chunk(lambda x: torch.cat((x, x.new_zeros(B, L - held, *x.shape[2:])), 1), Chunk(*earlier))
            seen = (held, held + L)
            lengths_B = None if min(lengths) == T else torch.tensor(lengths, device=q.device)
            place = Place(torch.tensor(seen, device=q.device), seen, lengths_B, lengths)
            made = lact(q, Chunk(*each[:4]), fast, rest, place, chunk_size=L, muon=muon, boundaries=True, impl=impl)
            after = [x for x in made.unfinished if x is not None]
            return (*results(made, lengths), *after)

        compare(op, used, wider=THROUGH_MUON if muon else 1.0)

    @pytest.mark.parametrize("lengths", [(13, 13, 13), (13, 2, 9)], ids=str)
    def test_rows_at_different_places_of_their_chunks(lengths):
        B, T, M, L, held = 3, 13, 3, 4, (1, 1, 4)
        before = [draw(*x.shape, seed=11 + i) for i, x in enumerate(text_for_lact(B, L, 1, M)[1:])]

        def op(q, k, v, rates, kept, *rest, impl):
            w, m, earlier = rest[:3], rest[3:6], rest[6:]
            place_BL = torch.arange(L, device=q.device) < torch.tensor(held, device=q.device)[:, None]
            buffer = map_chunk(lambda x: x * place_BL.view(B, L, *[1] * (x.dim() - 2)), Chunk(*earlier))
            lengths_B = None if min(lengths) == T else torch.tensor(lengths, device=q.device)
            place = Place(torch.tensor(held, device=q.device), held, lengths_B, lengths)
            start = FastWeights(cast(Any, w), None, cast(Any, m), row_norms(cast(Any, w)))
            made = lact(q, Chunk(k, v, rates, kept), start, buffer, place, chunk_size=L, impl=impl)
            real_BT = torch.arange(T, device=q.device) < torch.tensor(lengths, device=q.device)[:, None]
            outputs = made.outputs_BTHV.masked_fill(~real_BT[..., None, None], 0)
            return (outputs, *made.fast.weights, *cast(Any, made.fast.momentum), *cast(Any, made.unfinished))

        compare(op, [*text_for_lact(B, T, 1, M), *weights_of_lact(B, 1, M), *before])

    def test_between_the_passes_only_inputs_are_kept_of_every_token():
        """What is as large as the tokens' channels is what the operations were given; all else grows with chunks."""
        B, T, H, M, L = 1, 64, 2, 4, 32
        qkv, base = draw(B, T, 3, H * M), draw(B, T, H * M)
        scale, offset, weight, gate = draw(H * M, 2), draw(H * M, 2), draw(M), draw(B, T, H)
        text, packs = text_for_lact(B, T, H, M), weights_of_lact(B, H, M)
        kept: list[Any] = []

        def keep(x):
            kept.append(x)
            return x

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            parts = shared_qkv(qkv, scale, offset, angles(qkv, B, T, M), fast_heads=H, impl="fused")
            given = [*parts[3:], *text[3:], *packs]
            read = reading(given, L, (T,), "fused", muon=True).outputs_BTHV
            add_normed_heads(base, read, weight, gate, 1e-5, impl="fused")
        inputs = {x.untyped_storage().data_ptr() for x in (qkv, base, *parts, *text, read)}
        large = [x for x in kept if x.numel() >= T * H * M and x.shape[:1] != (B * H * 3,)]
        assert large
        assert all(x.untyped_storage().data_ptr() in inputs for x in large if T in x.shape)
        assert not [x.shape for x in large if L in x.shape]
