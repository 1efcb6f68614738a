"""The contract of a reading: forked = re-read, cached = full, padded = alone, pieces = whole; outputs and gradients.

For every native model, in float64, at lengths around the ends of its chunks.
"""

import pytest
import torch
from refine_kernels.delta_rule import reference
from refine_kernels.testing import assert_close

from refine_harness.errors import DataError
from refine_harness.models import State

from .checks import probe, same_gradients, same_states
from .tiny import MODELS, build, tokens

EACH = [(name, T) for name, tiny in MODELS.items() for T in tiny.lengths]
each_length = pytest.mark.parametrize(("model", "T"), EACH, indirect=["model"])
each_model = pytest.mark.parametrize("model", MODELS, indirect=True)


@pytest.fixture(scope="module")
def model(request):
    return build(request.param)


@each_length
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


@pytest.mark.parametrize("kept", (1, 2))
@pytest.mark.parametrize(
    ("model", "T"), [(name, T) for name, T in EACH if "delta" in name and T > 64], indirect=["model"]
)
def test_forked_is_reread_where_few_states_are_kept(model, T, kept, monkeypatch):
    monkeypatch.setattr(reference, "KEPT", kept)
    test_forked_is_reread(model, T)


@each_length
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


@each_length
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
    same_states(state, whole.state)
    assert state.seen_R.tolist() == [T]
    same_gradients(model, probe(model.logits(got)), probe(model.logits(whole.hidden)))


@each_length
def test_a_padded_row_is_the_row_alone(model, T):
    longest = T + 70
    batch = tokens(2, longest)
    batch[0, T:] = 39
    lengths = torch.tensor([T, longest])
    padded, alone = model.read(batch, lengths=lengths), model.read(batch[:1, :T])
    assert_close(padded.hidden[:1, :T], alone.hidden)
    same_states(padded.state.select([0]), alone.state)
    assert padded.state.seen_R.tolist() == [T, longest]
    after = tokens(1, 3, seed=4)
    got = model.read(after, padded.state.select([0])).hidden
    want = model.read(after, alone.state).hidden
    same_gradients(
        model,
        probe(model.logits(got)) + probe(model.logits(padded.hidden[:1, :T])),
        probe(model.logits(want)) + probe(model.logits(alone.hidden)),
    )


@each_model
def test_position_minus_one_is_the_state_before_the_reading(model):
    first = model.read(tokens(1, 30))
    second = model.read(tokens(1, 20, seed=3), first.state)
    fork = second.states_at(torch.tensor([[-1]]))
    same_states(fork, first.state)
    assert fork.seen_R.tolist() == [30]


@each_model
def test_a_reading_without_tape_cannot_be_forked(model):
    with pytest.raises(RuntimeError, match="forkable"):
        model.read(tokens(1, 4), forkable=False).states_at(torch.tensor([[1]]))


@each_model
def test_a_state_survives_the_disk_and_is_a_value(model, tmp_path):
    state = model.read(tokens(2, 70)).state.detach()
    state.save(tmp_path / "s.safetensors")
    loaded = State.load(tmp_path / "s.safetensors")
    assert loaded.nbytes == state.nbytes and len(loaded) == 2
    after = tokens(4, 5, seed=9)
    want = model.read(after, state.repeat(2)).hidden
    got = model.read(after, State.cat([loaded.select([0, 0]), loaded.select(slice(1, 2)).repeat(2)])).hidden
    assert torch.equal(got, want)
    before = loaded.clone()
    model.read(after[:2], loaded)
    for layer, want in zip(loaded.layers, before.layers, strict=True):
        assert all(torch.equal(layer[name], want[name]) for name in layer)
    (tmp_path / "bad").write_text("no state")
    with pytest.raises(DataError, match="not a saved state"):
        State.load(tmp_path / "bad")


@each_model
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


@each_model
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


@each_model
def test_loss_with_labels_is_the_shifted_cross_entropy(model):
    text = tokens(2, 30)
    labels = text.clone()
    labels[:, :10] = -100
    out = model(text, labels=labels)
    logprobs = out.logits.log_softmax(-1)[:, 9:-1].gather(-1, text[:, 10:, None])
    assert_close(out.loss, -logprobs.mean())


@each_model
def test_packed_texts_are_each_text_alone(model):
    lengths = [1, 70, 33]
    texts = [tokens(1, n, seed=n) for n in lengths]
    packed, starts = torch.cat(texts, 1), torch.tensor([0, 1, 71, 104])
    out = model(packed, cu_seqlens=starts, labels=packed, use_cache=True)
    alone = [model(text, use_cache=True) for text in texts]
    assert_close(out.logits, torch.cat([x.logits for x in alone], 1))
    want = torch.cat([x.logits[0, :-1].log_softmax(-1) for x in alone]).gather(
        -1, torch.cat([t[0, 1:] for t in texts])[:, None]
    )
    assert_close(out.loss, -want.mean())
    same_gradients(model, out.loss, -want.mean())
    for i, x in enumerate(alone):
        same_states(out.past_key_values.state.select([i]), x.past_key_values.state)
    with pytest.raises(ValueError, match="cu_seqlens"):
        model(packed, cu_seqlens=torch.tensor([0, 5]))


@each_model
def test_a_step_in_place_is_a_step(model):
    if not model.fixed_state:
        pytest.skip("its state grows: there is no place for more")
    text = tokens(2, 40)
    with torch.no_grad():
        state = model.read(text[:, :3]).state
        ours = state.clone()
        for t in range(3, 40):
            want = model.read(text[:, t : t + 1], state, forkable=False)
            got = model.read(text[:, t : t + 1], ours, forkable=False, in_place=True)
            state, ours = want.state, got.state
            assert_close(got.hidden, want.hidden)
            same_states(ours, state)
