"""The lm-eval models against a plain loop that reads the whole text again for every token."""

from __future__ import annotations

import json
import sqlite3
from typing import Any

import pytest
import torch
from lm_eval.api.instance import Instance

from refine_harness.config import TestTimeConfig as Settings
from refine_harness.config import load
from refine_harness.data.tokenizer import train_tokenizer
from refine_harness.errors import ConfigError, TaskError
from refine_harness.evaluation.answers import Answerer, Decoding
from refine_harness.evaluation.lm import RefineLM, RefineTTTLM, parse_generation, resolve_device
from refine_harness.models import load_model
from refine_harness.models.deltanet import DeltaNetConfig, DeltaNetForCausalLM

TEXT = (
    "The harbour master counted 40 boats before noon and wrote each name in a blue book. "
    "Nobody asked why the lighthouse was dark; the keeper, said the baker, slept until three.\n"
)
PROMPTS = [TEXT[:n] for n in (7, 160, 33, 90, 12, 91, 1, 60, 171)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A two-layer model with random weights and its tokenizer, saved as a Hugging Face folder."""
    path = tmp_path_factory.mktemp("tiny")
    train_tokenizer([TEXT], 300, path)
    torch.manual_seed(0)
    config = DeltaNetConfig(
        hidden_size=32, num_heads=2, num_hidden_layers=2, vocab_size=300, pad_token_id=0, initializer_range=0.3
    )
    DeltaNetForCausalLM(config).save_pretrained(path)
    return path


@pytest.fixture
def lm(folder):
    return RefineLM(folder, dtype="float64", device="cpu", piece=32, progress=lambda done, total: None)


def generation(prompt, task="t", doc_id=0, **settings):
    return Instance("generate_until", {}, (prompt, {"until": [], "max_gen_toks": 6, **settings}), 0, (task, doc_id, 1))


def likelihood(context, continuation, task="t", doc_id=0):
    return Instance("loglikelihood", {}, (context, continuation), 0, (task, doc_id, 1))


def plain_greedy(lm, prompt, count):
    """Greedy tokens, reading everything again for each of them."""
    tokens = lm.tok_encode(prompt)
    answer = []
    with torch.no_grad():
        while len(answer) < count:
            hidden = lm.model.read(torch.tensor([tokens + answer])).hidden
            token = int(lm.model.logits(hidden[0, -1]).argmax())
            if token == lm.eot_token_id:
                break
            answer.append(token)
    return lm.tok_decode(answer)


def plain_loglikelihood(lm, context, continuation):
    """Sum over one full forward."""
    tokens = torch.tensor([context + continuation])
    with torch.no_grad():
        logprobs = lm.model.logits(lm.model.read(tokens).hidden).log_softmax(-1)[0]
    at = range(len(context) - 1, len(context) + len(continuation) - 1)
    total = sum(float(logprobs[t, label]) for t, label in zip(at, continuation, strict=True))
    return total, all(int(logprobs[t].argmax()) == label for t, label in zip(at, continuation, strict=True))


def test_answers_are_those_of_a_loop_that_reads_the_text_again_for_each_token(lm):
    answers = lm.generate_until([generation(prompt) for prompt in PROMPTS])
    assert answers == [plain_greedy(lm, prompt, 6) for prompt in PROMPTS]
    assert len(set(answers)) > 3, "prompts that all have one answer would show nothing"


@pytest.mark.parametrize("batch_size", ["1", 3, "8", "auto"])
def test_answers_do_not_depend_on_the_batch_size(folder, lm, batch_size):
    other = RefineLM(folder, dtype="float64", device="cpu", batch_size=batch_size, progress=lambda *_: None)
    requests = [generation(prompt, max_gen_toks=2 + i) for i, prompt in enumerate(PROMPTS)]
    assert other.generate_until(requests) == lm.generate_until(requests)
    pairs = [likelihood(a, b) for a in PROMPTS[:4] for b in (" three", " boats before", ".")]
    for ours, theirs in zip(lm.loglikelihood(pairs), other.loglikelihood(pairs), strict=True):
        assert ours == (pytest.approx(theirs[0], abs=1e-9), theirs[1])


def test_every_row_has_its_own_length_and_stop(lm):
    alone = [lm.generate_until([generation(PROMPTS[i], max_gen_toks=i + 1)])[0] for i in range(4)]
    assert lm.generate_until([generation(PROMPTS[i], max_gen_toks=i + 1) for i in range(4)]) == alone
    assert [lm.tok_encode(text, add_special_tokens=False) != [] for text in alone] == [True] * 4


def test_log_likelihoods_are_sums_over_one_full_forward(lm):
    requests = [likelihood(a, b) for a in PROMPTS[:5] for b in (" boats", " counted 40 boats before noon", "", "x")]
    for request, (total, greedy) in zip(requests, lm.loglikelihood(requests), strict=True):
        context, continuation = lm._encode_pair(*request.args)
        expected, expected_greedy = plain_loglikelihood(lm, context, continuation)
        assert total == pytest.approx(expected, abs=1e-9)
        assert greedy == expected_greedy


def test_the_greedy_answer_is_called_greedy(lm):
    context = lm.tok_encode(PROMPTS[1])
    answer = lm.answerer.generate([context], [Decoding(max_tokens=5)])[0].tokens
    other = (*answer[:-1], (answer[-1] + 1) % 300)
    [[(_, yes), (_, no)]] = lm.answerer.score([context], [[answer, other]])
    assert (yes, no) == (True, False)


def test_an_empty_context_is_the_begin_token(lm):
    [(total, _)] = lm.loglikelihood([likelihood("", TEXT[:40])])
    tokens = lm.tok_encode(TEXT[:40], add_special_tokens=False)
    assert total == pytest.approx(plain_loglikelihood(lm, [lm.tokenizer.bos_token_id], tokens)[0], abs=1e-9)


def test_a_shared_context_is_read_once(lm):
    requests = [likelihood(a, b) for a in PROMPTS[:3] for b in (" a", " counted 40 boats", " the keeper", " .")]
    lm.loglikelihood(requests)
    assert lm.answerer.reads == 3


def test_rolling_streams_the_whole_document(folder):
    told = []
    settings = {"dtype": "float64", "device": "cpu", "piece": 32, "max_length": 16, "batch_size": 2}
    lm = RefineLM(folder, **settings, progress=lambda done, total: told.append(done))
    documents = [TEXT * 2, TEXT[:50], "a"]
    requests = [Instance("loglikelihood_rolling", {}, (text,), 0, ("t", i, 1)) for i, text in enumerate(documents)]
    for text, total in zip(documents, lm.loglikelihood_rolling(requests), strict=True):
        tokens = lm.tok_encode(text, add_special_tokens=False)
        assert total == pytest.approx(plain_loglikelihood(lm, [lm.tokenizer.bos_token_id], tokens)[0], abs=1e-9)
    assert told == [0, 2, 3]
    assert not lm.truncated, "no document is cut, whatever max_length says"


def test_prompts_start_with_one_begin_token(lm, folder):
    bos = lm.tokenizer.bos_token_id
    assert lm.tok_encode("boats")[:1] == [bos]
    assert lm.tok_encode("<s>boats") == lm.tok_encode("boats")
    assert bos not in lm.tok_encode("boats", add_special_tokens=False)
    assert bos not in RefineLM(folder, device="cpu", add_bos=False).tok_encode("boats")


def test_an_answer_ends_before_its_stop_string_even_inside_and_across_tokens(lm):
    whole = plain_greedy(lm, PROMPTS[1], 12)
    pieces = [lm.tok_decode([token]) for token in lm.tok_encode(whole, add_special_tokens=False)]
    assert len(pieces) > 4
    across = whole[len(pieces[0]) : len(pieces[0]) + len(pieces[1]) + 1]  # the second token and a bit of the third
    for stop in (across, pieces[2], whole[-1]):
        [answer] = lm.generate_until([generation(PROMPTS[1], until=["never said", stop], max_gen_toks=12)])
        assert answer == whole.partition(stop)[0]
        assert answer != whole


def test_generation_goes_no_further_than_the_stop(lm):
    whole = plain_greedy(lm, PROMPTS[1], 12)
    [answer] = lm.answerer.generate([lm.tok_encode(PROMPTS[1])], [Decoding(max_tokens=12, stops=(whole[0],))])
    assert answer.text == ""
    assert len(answer.tokens) == 1


def test_the_end_token_ends_an_answer(lm, monkeypatch):
    context = lm.tok_encode(PROMPTS[1])
    tokens = lm.answerer.generate([context], [Decoding(max_tokens=8)])[0].tokens
    end = next(i for i in range(1, 8) if tokens[i] not in tokens[:i])
    answerer = Answerer(lm.model, lm.tokenizer)
    answerer.end_ids = frozenset({tokens[end]})
    assert answerer.generate([context], [Decoding(max_tokens=8)])[0].tokens == tokens[:end]
    assert len(answerer.generate([context], [Decoding(max_tokens=8, min_tokens=end + 1)])[0].tokens) > end


def test_a_special_token_can_be_a_stop_string(lm):
    assert lm.answerer.generate([lm.tok_encode("a")], [Decoding(max_tokens=40, stops=("<pad>",))])[0].tokens
    answerer = Answerer(lm.model, lm.tokenizer)
    with torch.no_grad():
        lm.model.lm_head.weight[0] = 100 * lm.model.lm_head.weight.abs().sum(0)  # <pad> can win
    context = lm.tok_encode(PROMPTS[3])
    with_stop = answerer.generate([context], [Decoding(max_tokens=40, stops=("<pad>",))])[0].tokens
    without = answerer.generate([context], [Decoding(max_tokens=40)])[0].tokens
    assert 0 in without
    assert with_stop == without[: without.index(0)]


def test_samples_belong_to_their_request(lm):
    requests = [
        generation(prompt, do_sample=True, temperature=2.0, top_p=0.9, doc_id=i) for i, prompt in enumerate(PROMPTS)
    ]
    answers = lm.generate_until(requests)
    assert lm.generate_until(requests[::-1]) == answers[::-1]
    assert answers != lm.generate_until([generation(prompt, doc_id=i) for i, prompt in enumerate(PROMPTS)])
    assert len(set(lm.generate_until([requests[1]] * 4))) > 1, "each repetition has samples of its own"
    assert len(set(lm.generate_until([generation(PROMPTS[1])] * 4))) == 1


@pytest.mark.parametrize(("settings", "word"), [({"num_beams": 4}, "beam"), ({"penalty": 2}, "penalty")])
def test_generation_settings_we_do_not_have_are_refused(settings, word):
    with pytest.raises(TaskError, match=word):
        parse_generation(settings, "t")


def test_sampling_settings_count_only_when_sampling_is_asked_for():
    assert parse_generation({"temperature": 1.0, "do_sample": False, "num_beams": 1, "until": "\n"}, "t") == Decoding(
        stops=("\n",)
    )
    assert parse_generation({"temperature": 0.7, "max_new_tokens": 3}, "t") == Decoding(3, temperature=0.7)


def test_a_long_prompt_loses_its_middle_and_is_counted(folder, caplog):
    lm = RefineLM(folder, dtype="float64", device="cpu", max_length=30, progress=lambda *_: None)
    long, short = lm.tok_encode(TEXT), lm.tok_encode(TEXT[:9])
    requests = [
        generation(TEXT, "a", 0),
        generation(TEXT[:9], "a", 1),
        generation(TEXT, "b", 0),
        generation(TEXT, "b", 0),
    ]
    seen = []
    original = lm.answerer.generate
    lm.answerer.generate = lambda prompts, decodings: seen.extend(map(tuple, prompts)) or original(prompts, decodings)
    lm.generate_until(requests)
    assert sorted(seen) == sorted([tuple(long[:13] + long[-12:]), tuple(short)])
    assert lm.truncated == {"a": 1, "b": 1}
    assert lm.shortened == {("a", 0), ("b", 0)}
    assert [record.message for record in caplog.records if "lost their middle" in record.message] == [
        "prompts longer than max_length = 30 tokens lost their middle: a 1, b 1"
    ]
    assert lm.get_model_info()["truncated"] == {"a": 1, "b": 1}


def test_prompts_that_are_read_whole_though_too_long_are_counted_as_such(folder, caplog):
    lm = RefineLM(folder, device="cpu", max_length=30, truncation="none", progress=lambda *_: None)
    lm.generate_until([generation(TEXT, "a"), generation(TEXT[:9], "a", 1)])
    info = lm.get_model_info()
    assert (info["over_long"], info["truncated"], lm.shortened) == ({"a": 1}, {}, set())
    assert "were read whole: a 1" in caplog.text


def test_pairs_are_split_as_lm_evals_template_splits_them(lm):
    pairs = [(TEXT[:n], more) for n in (3, 12, 20, 21, 60) for more in (" boats", "", "s and ", "\n")]
    pairs += [("  ", "a"), ("40 boats  \n", "before")]
    for pair, (context, continuation) in zip(pairs, lm._encoded_pairs(pairs), strict=True):
        assert (context.tolist(), continuation.tolist()) == lm._encode_pair(*pair)


def test_answers_of_different_greatest_length_are_decoded_apart(lm):
    requests = [generation(prompt, max_gen_toks=2 + 4 * (i % 2), doc_id=i) for i, prompt in enumerate(PROMPTS)]
    together = []
    original = lm.answerer.generate
    lm.answerer.generate = lambda prompts, decodings: (
        together.append({decoding.max_tokens for decoding in decodings}) or original(prompts, decodings)
    )
    lm.generate_until(requests)
    assert together == [{2}, {6}] or together == [{6}, {2}]


def test_a_bad_size_is_refused(folder):
    for name in ("batch_size", "batch_tokens", "piece"):
        size: Any = {name: -3}
        with pytest.raises(ConfigError, match=f"{name} = -3; expected a positive number"):
            RefineLM(folder, device="cpu", **size)


def test_rival_continuations_follow_the_same_cut_context(folder):
    lm = RefineLM(folder, dtype="float64", device="cpu", max_length=30, progress=lambda *_: None)
    requests = [likelihood(TEXT, " a"), likelihood(TEXT, " counted 40 boats")]
    lm.loglikelihood(requests)
    assert lm.answerer.reads == 1
    assert lm.truncated == {"t": 1}


@pytest.mark.parametrize(("policy", "kept"), [("left", 24), ("none", 1000), ("middle", None), ("error", None)])
def test_truncation_policies(folder, policy, kept):
    lm = RefineLM(folder, device="cpu", max_length=30, truncation=policy)
    tokens: Any = lm.tok_encode(TEXT)
    if policy == "error":
        with pytest.raises(TaskError, match="max_length = 30"):
            lm._fit(tokens, 6, "t")
    elif kept is not None:
        assert lm._fit(tokens, 6, "t")[0] == tokens[:1] + tokens[1:][-kept:]
    else:
        assert lm._fit(tokens, 7, "t") == (tokens[:12] + tokens[-12:], True)
        assert lm._fit(tokens[:24], 7, "t") == (tokens[:24], False), "the begin token is not counted"
        assert lm._fit(tokens[:25], 7, "t")[1]
    with pytest.raises(TaskError, match="no room"):
        RefineLM(folder, device="cpu", max_length=30)._fit(tokens, 30, "t")


def test_an_interrupted_evaluation_goes_on_where_it_was(folder, tmp_path):
    """Batches of two; the third batch is interrupted; the rest is answered later, and nothing twice."""
    requests = [generation(prompt, doc_id=i) for i, prompt in enumerate(PROMPTS[:7])]
    settings = {"dtype": "float64", "device": "cpu", "batch_size": 2, "max_length": 40}
    expected = RefineLM(folder, **settings).generate_until(requests, disable_tqdm=True)

    def interrupt(done, total):
        if done >= 4:
            raise KeyboardInterrupt

    first = RefineLM(folder, **settings, cache_dir=tmp_path, progress=interrupt)
    with pytest.raises(KeyboardInterrupt):
        first.generate_until(requests)
    second = RefineLM(folder, **settings, cache_dir=tmp_path, progress=lambda *_: None)
    assert second.generate_until(requests) == expected
    assert second.answerer.reads == 3
    third = RefineLM(folder, **{**settings, "batch_size": 8}, cache_dir=tmp_path, progress=lambda *_: None)
    assert third.generate_until(requests) == expected
    assert third.answerer.reads == 0
    assert third.truncated == second.truncated, "cut prompts are counted all the same"
    assert third.truncated["t"] > 0


def test_a_portion_is_answered_again_as_a_whole_so_that_no_bit_depends_on_what_was_kept(folder, tmp_path):
    """In float32, where the shape of a batch shows in the last bits of a score."""
    requests = [likelihood(TEXT[:n], TEXT[n : n + 9], doc_id=n) for n in range(3, 150, 7)]
    settings = {"dtype": "float32", "device": "cpu", "progress": lambda *_: None}
    whole = RefineLM(folder, batch_size=4, cache_dir=tmp_path, **settings).loglikelihood(requests)
    assert whole != RefineLM(folder, batch_size=1, **settings).loglikelihood(requests), "or this would show nothing"
    with sqlite3.connect(tmp_path / "responses.sqlite") as database:
        database.execute("DELETE FROM responses WHERE rowid % 3 = 0 OR rowid > 16")
    again = RefineLM(folder, batch_size=4, cache_dir=tmp_path, **settings)
    assert again.loglikelihood(requests) == whole


def test_kept_answers_belong_to_weights_and_settings_not_to_a_name(folder, tmp_path):
    request = [generation(PROMPTS[1]), generation(PROMPTS[2])]
    pairs = [likelihood(PROMPTS[1], " boats")]

    def answered(**settings):
        lm = RefineLM(folder, device="cpu", cache_dir=tmp_path, progress=lambda *_: None, **settings)
        lm.generate_until(request)
        lm.loglikelihood(pairs)
        return lm.answerer.reads

    assert answered(dtype="float64") == 3
    assert answered(dtype="float64") == 0
    assert answered(dtype="float32") == 3
    assert answered(dtype="float64", max_length=20) == 3
    assert answered(dtype="float64", add_bos=False) == 3

    model, tokenizer = load_model(folder, dtype="float64")
    with torch.no_grad():
        model.lm_head.weight[5, 5] += 1e-12
    other = RefineLM(folder, model=model, tokenizer=tokenizer, cache_dir=tmp_path, progress=lambda *_: None)
    other.generate_until(request)
    assert other.answerer.reads == 2


def test_progress_counts_up_to_all_requests(folder):
    told = []
    lm = RefineLM(folder, device="cpu", batch_size=4, progress=lambda done, total: told.append((done, total)))
    lm.generate_until([generation(prompt) for prompt in PROMPTS])
    assert told == [(0, 9), (4, 9), (8, 9), (9, 9)]


def test_arguments_as_lm_eval_sends_them(folder):
    lm = RefineLM.create_from_arg_string(
        f"pretrained={folder},dtype=float64,data_dir=somewhere,max_length=64",
        {"batch_size": "2", "max_batch_size": None, "device": "cuda:0" if not torch.cuda.is_available() else "cpu"},
    )
    assert (lm.batch_size, lm.max_length, lm.device.type) == (2, 64, "cpu")
    with pytest.raises(ConfigError, match="max_length"):
        RefineLM(folder, max_lenght=3)
    with pytest.raises(ConfigError, match="batch_size"):
        RefineLM(folder, batch_size="many")
    with pytest.raises(ConfigError, match="truncation"):
        RefineLM(folder, truncation="right")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ConfigError, match="device"):
        resolve_device("gpu7")


TEST_TIME = ("algorithm.chunks=2", "algorithm.rollout_length=2", "batch.sequences=4", "batch.steps=2", "dtype=float64")


def ttt(folder, *overrides, **settings):
    settings = {"device": "cpu", "progress": lambda *_: None, **settings}
    return RefineTTTLM(folder, config=load(Settings, None, [*TEST_TIME, *overrides]), **settings)


def weights(lm):
    return {name: tensor.clone() for name, tensor in lm.model.state_dict().items()}


def same(before, after):
    return all(torch.equal(before[name], after[name]) for name in before)


def test_test_time_training_changes_answers_and_puts_the_weights_back(folder, lm):
    adapting = ttt(folder, "optim.lr=0.01")
    before = weights(adapting)
    requests = [generation(prompt, doc_id=i) for i, prompt in enumerate(PROMPTS)]
    answers = adapting.generate_until(requests)
    assert answers != lm.generate_until(requests)
    assert same(before, weights(adapting))
    assert adapting.adaptation["optimizer_steps"] == 2 * len(PROMPTS)
    assert adapting.generate_until(requests[::-1]) == answers[::-1], "the order of the prompts does not matter"


def test_test_time_training_with_a_vanishing_rate_answers_as_the_model_does(folder, lm):
    adapting = ttt(folder, "optim.lr=1e-18")
    requests = [generation(prompt, doc_id=i) for i, prompt in enumerate(PROMPTS)]
    assert adapting.generate_until(requests) == lm.generate_until(requests)
    pairs = [likelihood(a, b) for a in PROMPTS[:3] for b in (" boats", " the keeper")]
    for (ours, _), (plain, _) in zip(adapting.loglikelihood(pairs), lm.loglikelihood(pairs), strict=True):
        assert ours == pytest.approx(plain, abs=1e-9)


def test_continuations_share_one_adaptation_on_their_context(folder, lm):
    adapting = ttt(folder, "optim.lr=0.01")
    pairs = [likelihood(a, b) for a in PROMPTS[1:3] for b in (" boats", " the keeper", ".")]
    scores = adapting.loglikelihood(pairs)
    assert adapting.adaptation["prompts"] == 2
    context, continuation = adapting._encode_pair(*pairs[4].args)
    with adapting.adapted([context]):
        expected = plain_loglikelihood(adapting, context, continuation)
    assert scores[4] == (pytest.approx(expected[0], abs=1e-9), expected[1])
    assert scores[4][0] != pytest.approx(lm.loglikelihood([pairs[4]])[0][0], abs=1e-6)


def test_carrying_over_adapts_on_batches_in_request_order_and_keeps_nothing_for_later(folder, tmp_path):
    adapting = ttt(folder, "restore=never", "optim.lr=0.01", cache_dir=tmp_path, batch_size=2)
    before = weights(adapting)
    seen = []
    original = adapting._trainer.adapted
    adapting._trainer.adapted = lambda prompts: seen.append([tuple(p) for p in prompts]) or original(prompts)
    adapting.generate_until([generation(prompt, doc_id=i) for i, prompt in enumerate(PROMPTS)])
    prompts = [tuple(adapting.tok_encode(prompt)) for prompt in PROMPTS]
    assert seen == [prompts[:4], prompts[4:8], prompts[8:]]
    assert not same(before, weights(adapting))
    assert not list(tmp_path.iterdir())


def test_an_interrupted_adapting_evaluation_goes_on_and_counts_all_its_steps(folder, tmp_path):
    requests = [generation(prompt, doc_id=i) for i, prompt in enumerate(PROMPTS[:4])]
    expected = ttt(folder, "optim.lr=0.01").generate_until(requests)

    def interrupt(done, total):
        if done == 2:
            raise KeyboardInterrupt

    first = ttt(folder, "optim.lr=0.01", cache_dir=tmp_path, progress=interrupt)
    before = weights(first)
    with pytest.raises(KeyboardInterrupt):
        first.generate_until(requests)
    assert same(before, weights(first))
    second = ttt(folder, "optim.lr=0.01", cache_dir=tmp_path)
    assert second.generate_until(requests) == expected
    assert second.answerer.reads == 2
    assert second.adaptation["optimizer_steps"] == 8
    other = ttt(folder, "optim.lr=0.02", cache_dir=tmp_path)
    other.generate_until(requests)
    assert other.answerer.reads == 4, "other settings are another model"


def test_test_time_settings_from_an_argument_string(folder):
    lm = RefineTTTLM.create_from_arg_string(
        f"pretrained={folder},steps=3,optim.lr=1e-5,restore=never,seed=7", {"device": "cpu", "batch_size": 1}
    )
    assert (lm.test_time.steps, lm.test_time.optim.lr, lm.test_time.restore, lm.seed) == (3, 1e-5, "never", 7)
    assert (lm.test_time.seed, lm.get_model_info()["test_time"]["steps"]) == (7, 3)
    with pytest.raises(ConfigError, match=r"optim\.rl is not a setting"):
        RefineTTTLM(folder, **{"optim.rl": 3, "device": "cpu"})


def test_documents_without_a_prompt_cannot_be_adapted_on(folder):
    request = Instance("loglikelihood_rolling", {}, ("text",), 0, ("wiki", 0, 1))
    with pytest.raises(TaskError, match="wiki"):
        ttt(folder).loglikelihood_rolling([request])


TASK = """task: {name}
output_type: {kind}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}, cache_dir: {cache}}}
test_split: test
doc_to_text: "{text}"
metric_list: [{{metric: {metric}, aggregation: {aggregation}, higher_is_better: true}}]
{more}
"""


def test_lm_eval_knows_the_model_by_name(folder, tmp_path, lm, monkeypatch):
    import lm_eval
    import lm_eval.evaluator

    import refine_harness  # noqa: F401  (what makes the name known)

    monkeypatch.setattr(lm_eval.evaluator, "add_env_info", lambda storage: None)  # seconds of asking pip
    rows = [{"text": prompt, "answer": i % 2} for i, prompt in enumerate(PROMPTS[1:4])]
    data = tmp_path / "rows.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)))
    tasks = {
        "gen": (
            "generate_until",
            "{{text}}",
            "exact_match",
            "mean",
            "doc_to_target: 'x'\ngeneration_kwargs: {until: [], max_gen_toks: 4}",
        ),
        "choice": (
            "multiple_choice",
            "{{text}}",
            "acc",
            "mean",
            "doc_to_target: answer\ndoc_to_choice: [boats, the keeper]",
        ),
        "roll": ("loglikelihood_rolling", "", "word_perplexity", "weighted_perplexity", "doc_to_target: '{{text}}'"),
    }
    (tmp_path / "tasks").mkdir()
    for name, (kind, text, metric, aggregation, more) in tasks.items():
        fields = {"name": name, "kind": kind, "text": text, "metric": metric, "aggregation": aggregation, "more": more}
        yaml = TASK.format(data=data, cache=tmp_path / "cache", **fields)
        (tmp_path / "tasks" / f"{name}.yaml").write_text(yaml)
    manager = lm_eval.tasks.TaskManager(include_path=str(tmp_path / "tasks"), include_defaults=False)
    harness: Any = lm_eval  # its decorator hides the signature
    results = harness.simple_evaluate(
        model="refine",
        model_args=f"pretrained={folder},dtype=float64",
        tasks=list(tasks),
        device="cpu",
        batch_size="2",
        task_manager=manager,
        bootstrap_iters=0,
    )
    assert results is not None
    answers = [sample["resps"][0][0] for sample in results["samples"]["gen"]]
    assert answers == [plain_greedy(lm, prompt, 4) for prompt in PROMPTS[1:4]]
    [first, *_] = results["samples"]["choice"]
    pairs = [lm._encode_pair(PROMPTS[1], f" {choice}") for choice in ("boats", "the keeper")]
    assert [response[0][0] for response in first["resps"]] == [
        pytest.approx(plain_loglikelihood(lm, *pair)[0], abs=1e-9) for pair in pairs
    ]
    assert results["results"]["roll"]["word_perplexity,none"] > 1
    assert results["config"]["truncated"] == {}
    assert results["config"]["batch_sizes"] == [2]
