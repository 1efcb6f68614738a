"""The adapter holds models with flash-linear-attention's conventions to the contract of ours, gradients included."""

import json
from typing import Any

import pytest
import torch
from refine_kernels import fla_models
from refine_kernels.choose import ImplementationError
from refine_kernels.testing import assert_close

from refine_harness.algorithm import collect, refine_step
from refine_harness.algorithm.rereading import refine_step_by_rereading
from refine_harness.config import Algorithm, Batching, Optim, TestTimeConfig
from refine_harness.data.tokenizer import train_tokenizer
from refine_harness.errors import ModelError
from refine_harness.evaluation.answers import Answerer, Decoding
from refine_harness.models import State, adapter, load_model, load_tokenizer
from refine_harness.models.adapter import ContinuingLM, RereadingLM, adapted
from refine_harness.training.testtime import TestTimeTrainer
from refine_harness.types import Batch

from .checks import probe, same_gradients
from .stand_in import StandInForCausalLM, cache_class, family
from .tiny import tokens

KINDS = {
    "recurrent": ("gla", ("linear", "linear")),
    "stepwise": ("mamba2", ("linear", "linear")),
    "hybrid": ("kda", ("linear", "attention", "window")),
    "rereading": ("stand_in", ("linear", "attention")),
}
each = pytest.mark.parametrize("model", KINDS, indirect=True)
LENGTHS = (1, 3, 19)


@pytest.fixture(autouse=True)
def _cache_of_fla(monkeypatch):
    monkeypatch.setattr(fla_models, "cache_class", cache_class)
    monkeypatch.setattr(fla_models, "has_mamba_kernels", lambda: False)


def build(name: str, **settings: Any) -> Any:
    kind, mixers = KINDS[name]
    torch.manual_seed(0)
    model: Any = adapted(family(kind))
    return model(model.config_class(mixers=mixers, **settings)).double().eval()


@pytest.fixture
def model(request):
    return build(request.param)


def same_states(got, want):
    assert got.seen == want.seen == tuple(got.seen_R.tolist())
    for layer, other in zip(got.layers, want.layers, strict=True):
        assert layer.keys() == other.keys()
        for name in layer:
            assert_close(layer[name].double(), other[name].double(), name)


def test_a_model_type_is_continued_only_if_that_was_found_exact():
    ways = {name: type(build(name)).__mro__[1] for name in KINDS}
    assert ways.pop("rereading") is RereadingLM
    assert set(ways.values()) == {ContinuingLM}


@each
@pytest.mark.parametrize("T", LENGTHS)
def test_forked_is_reread(model, T):
    text, rollout = tokens(2, T), tokens(6, 4, seed=2)
    positions = torch.tensor([[T - 1, T // 2, 0], [T // 3, T - 1, T // 3]])
    reading = model.read(text)
    states = reading.states_at(positions)
    assert states.seen == tuple((positions + 1).flatten().tolist())
    forked = model.read(rollout, states).hidden
    reread, places = [], [(b, p) for b in range(2) for p in positions[b].tolist()]
    for row, (b, p) in enumerate(places):
        reread.append(model.read(torch.cat((text[b, : p + 1], rollout[row]))[None]).hidden[0, p + 1 :])
    want = torch.stack(reread)
    assert_close(forked, want)
    same_gradients(model, probe(model.logits(forked)), probe(model.logits(want)))


@each
def test_a_fork_of_a_continued_reading_is_reread(model):
    text, rollout = tokens(2, 17), tokens(2, 3, seed=2)
    start = model.read(text[:, :9], lengths=torch.tensor([4, 9]))
    second = model.read(text[:, 9:], start.state, lengths=torch.tensor([8, 6]))
    forked = model.read(rollout, second.states_at(torch.tensor([[2], [5]]))).hidden
    prefixes = [torch.cat((text[0, :4], text[0, 9:12])), text[1, :15]]
    want = torch.stack([
        model.read(torch.cat((prefix, row))[None]).hidden[0, len(prefix) :]
        for prefix, row in zip(prefixes, rollout, strict=True)
    ])  # fmt: skip
    assert_close(forked, want)
    same_gradients(model, probe(forked), probe(want))


@each
def test_position_minus_one_is_the_state_before_the_reading(model):
    first = model.read(tokens(1, 7))
    second = model.read(tokens(1, 5, seed=3), first.state)
    same_states(second.states_at(torch.tensor([[-1]])), first.state)
    text, after = tokens(1, 6), tokens(2, 3, seed=4)
    states = model.read(text).states_at(torch.tensor([[-1, 3]]))
    assert states.seen == (0, 4)
    got = model.read(after, states).hidden
    assert_close(got[:1], model.read(after[:1]).hidden)
    assert_close(got[1:], model.read(torch.cat((text[:, :4], after[1:]), 1)).hidden[:, 4:])


@each
@pytest.mark.parametrize("T", LENGTHS)
def test_cached_decoding_and_pieces_are_one_reading(model, T):
    text = tokens(2, T + 3)
    whole = model.read(text)
    for size in (1, 2):
        state, pieces = model.read(text[:, :T]).state, []
        for t in range(T, T + 3, size):
            reading = model.read(text[:, t : t + size], state, forkable=False)
            state = reading.state
            pieces.append(reading.hidden)
        got = torch.cat(pieces, 1)
        assert_close(got, whole.hidden[:, T:])
        same_states(state, whole.state)
        same_gradients(model, probe(got), probe(model.read(text).hidden[:, T:]))


@each
@pytest.mark.parametrize("T", LENGTHS)
def test_a_padded_row_is_the_row_alone(model, T):
    batch = tokens(3, T + 5)
    batch[1, T:] = 39
    padded = model.read(batch, lengths=torch.tensor([T + 5, T, T + 2]))
    alone = model.read(batch[1:2, :T])
    assert padded.state.seen == (T + 5, T, T + 2)
    assert_close(padded.hidden[1:2, :T], alone.hidden)
    after = tokens(1, 3, seed=4)
    got, want = model.read(after, padded.state.select([1])).hidden, model.read(after, alone.state).hidden
    assert_close(got, want)
    same_gradients(model, probe(got) + probe(padded.hidden[1:2, :T]), probe(want) + probe(alone.hidden))


@each
def test_a_state_is_a_value_and_survives_the_disk(model, tmp_path):
    with torch.no_grad():
        state = State.cat([model.read(tokens(1, 6)).state, model.read(tokens(1, 11, seed=1)).state])
        before, after = state.clone(), tokens(4, 1, seed=9)
        want = model.read(after, state.repeat(2)).hidden
        model.read(after[:2], state)
        same_states(state, before)
        state.save(tmp_path / "s.safetensors")
        loaded = State.load(tmp_path / "s.safetensors")
        assert loaded.nbytes == state.nbytes
        fresh = build(next(name for name, (kind, _) in KINDS.items() if kind == model.config.model_type))
        got = fresh.read(after, State.cat([loaded.select([0, 0]), loaded.select([1]).repeat(2)])).hidden
        assert_close(got, want)


@each
def test_a_reading_without_tape_cannot_be_forked(model):
    with pytest.raises(RuntimeError, match="forkable"):
        model.read(tokens(1, 4), forkable=False).states_at(torch.tensor([[1]]))


@each
@pytest.mark.parametrize("algorithm", [Algorithm(chunks=3, rollout_length=3), Algorithm(chunks=2, rollouts=2)])
def test_forked_step_is_the_rereading_step(model, algorithm):
    def rng():
        return [torch.Generator().manual_seed(row) for row in range(2)]

    def loss(losses):
        return losses.ntp_sum / losses.ntp_count + algorithm.lambda_rl * losses.policy_sum / losses.policy_count

    batch = Batch(tokens(2, 24), torch.tensor([24, 17]))
    rollouts = collect(model, batch, algorithm, rng()).rollouts
    got = refine_step(model, batch, algorithm, rng())
    want = refine_step_by_rereading(model, batch, algorithm, rollouts)
    assert_close(got.ntp_sum, want.ntp_sum)
    same_gradients(model, loss(got), loss(want))


@each
def test_testtime_training_adapts_and_restores(model):
    algorithm = Algorithm(chunks=2, rollout_length=3)
    settings = TestTimeConfig(steps=2, batch=Batching(sequences=1, steps=1), algorithm=algorithm, optim=Optim(lr=1e-3))
    before = {name: p.clone() for name, p in model.named_parameters()}
    with TestTimeTrainer(model, settings).adapted([tokens(1, 20)[0].tolist()]) as adaptation:
        assert len(adaptation.steps) == 2
        assert any(not torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


@pytest.mark.parametrize("name", KINDS)
def test_answers_and_scores_of_a_batch_are_those_of_each_prompt(name, tmp_path):
    train_tokenizer(["a few words and more words"], 262, tmp_path)
    model = build(name, vocab_size=262)
    answerer = Answerer(model, load_tokenizer(tmp_path), piece=8)
    prompts = [tokens(1, n, seed=n)[0].tolist() for n in (5, 13, 9)]
    decoding = Decoding(max_tokens=5)
    together = answerer.generate(prompts, [decoding] * 3)
    assert together == [answerer.generate([prompt], [decoding])[0] for prompt in prompts]
    endings = [[[4, 5, 6], [7]], [[8, 9]], [[5, 5, 5, 5]]]
    scores = answerer.score(prompts, endings)
    for prompt, continuations, results in zip(prompts, endings, scores, strict=True):
        for continuation, (logprob, _) in zip(continuations, results, strict=True):
            logits = model.logits(model.read(torch.tensor([prompt + continuation])).hidden[0])
            logprobs = logits.log_softmax(-1)[len(prompt) - 1 : -1]
            want = logprobs.gather(-1, torch.tensor(continuation)[:, None]).sum()
            assert abs(logprob - want.item()) < 1e-9


@each
def test_generate_agrees_with_and_without_cache_and_padding(model):
    batch, mask = tokens(2, 9), torch.ones(2, 9, dtype=torch.int64)
    mask[0, :4] = 0
    settings = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    cached = model.generate(batch, attention_mask=mask, use_cache=True, **settings)
    assert torch.equal(cached, model.generate(batch, attention_mask=mask, use_cache=False, **settings))
    assert torch.equal(cached[:1, 4:], model.generate(batch[:1, 4:], **settings))


@each
def test_what_is_saved_is_the_wrapped_model(model, tmp_path):
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == [StandInForCausalLM.__name__]
    wrapped: Any = family(model.config.model_type)
    stock, info = wrapped.from_pretrained(tmp_path, output_loading_info=True, dtype=torch.float64)
    assert type(stock) is wrapped
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    again = type(model).from_pretrained(tmp_path, dtype=torch.float64).state_dict()
    assert all(torch.equal(x, again[name]) for name, x in model.state_dict().items())


def test_the_model_without_its_head_is_found_where_no_prefix_names_it():
    bare: Any = adapted(type("Bare", (family("stand_in"),), {"base_model_prefix": "", "__module__": __name__}))
    made = bare(bare.config_class())
    assert made.headless is made.model
    assert made.read(tokens(1, 3)).hidden.shape == (1, 3, made.config.hidden_size)


def test_rows_of_different_ages_share_a_pass_where_no_layer_counts_tokens(monkeypatch):
    passes = []
    for name in ("recurrent", "hybrid"):
        model = build(name)
        states = model.read(tokens(1, 9)).states_at(torch.tensor([[1, 4, 8]]))
        one_pass = type(model)._pass
        monkeypatch.setattr(type(model), "_pass", lambda *a, n=name, f=one_pass: passes.append(n) or f(*a))
        model.read(tokens(3, 2), states)
    assert passes == ["recurrent", "hybrid", "hybrid", "hybrid"]


def test_a_part_of_a_cache_without_one_row_per_text_is_refused(monkeypatch):
    model = build("recurrent")
    monkeypatch.setattr(adapter, "_named", lambda layer: [("recurrent_state", torch.zeros(1, 2))])
    with pytest.raises(ModelError, match=r"gla keeps recurrent_state of layer 0 .* row per text"):
        model.read(tokens(2, 3))


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_gradient_checkpointing_is_refused_where_it_would_drop_the_cache():
    with pytest.raises(ValueError, match="does not support"):
        build("recurrent").gradient_checkpointing_enable()


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A stand-in for one of fla's models, saved with a tokenizer, on a machine where fla can be imported."""
    known = {"gla": (family("gla").config_class, family("gla"))}
    monkeypatch.setattr(fla_models, "causal_lms", lambda: known)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    build("recurrent", vocab_size=262).save_pretrained(tmp_path)
    train_tokenizer(["a few words and more words"], 262, tmp_path)
    return tmp_path


def test_a_folder_loads_where_its_kernels_run(folder, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    model, tokenizer = load_model(folder, dtype="float64")
    assert isinstance(model, ContinuingLM)
    assert model.config.limits == [0.0, float("inf")]
    text = torch.tensor([tokenizer("a few words")["input_ids"]])
    assert_close(model.read(text).hidden, build("recurrent", vocab_size=262).read(text).hidden)


def test_a_cpu_is_refused_before_anything_is_loaded(folder):
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"^a gla model .* cannot run on cpu: .* GPU\. Use device=cuda"):
        load_model(folder)


def test_a_model_that_needs_another_package_says_which(folder, monkeypatch):
    def init(*_):
        raise ImportError("Please install Flash Attention")

    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(adapted(family("gla")), "__init__", init)
    with pytest.raises(ModelError, match=r"needs a package .* \(Please install Flash Attention\)"):
        load_model(folder)


def test_a_model_type_that_nobody_has_is_refused(folder):
    (folder / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    with pytest.raises(ModelError, match=r"model_type 'gpt2'; this version reads delta_net.* no such model either"):
        load_model(folder)


def test_a_machine_without_triton_is_told_what_is_missing(folder, monkeypatch):
    def missing():
        raise ImplementationError("flash-linear-attention cannot be imported (No module named 'triton')")

    monkeypatch.setattr(fla_models, "causal_lms", missing)
    with pytest.raises(ModelError, match=r"model_type 'gla'.*No module named 'triton'\)\. Install Triton"):
        load_model(folder)
