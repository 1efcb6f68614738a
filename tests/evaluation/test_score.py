"""A tiny model, scored: what the record says, what is kept, what is refused."""

from __future__ import annotations

import json
import logging
import random
from typing import Any

import numpy as np
import pytest
import torch
from lm_eval.tasks import TaskManager

from refine_harness.checkpoint import weights_sha256
from refine_harness.config import Evaluation, load
from refine_harness.config import TestTimeConfig as Settings
from refine_harness.data.tokenizer import train_tokenizer
from refine_harness.errors import DataError, ModelError, RunError, TaskError
from refine_harness.evaluation import score as module
from refine_harness.evaluation import statistics
from refine_harness.evaluation.compare import open_run
from refine_harness.evaluation.lm import RefineLM
from refine_harness.evaluation.rescore import rescore
from refine_harness.evaluation.samples import by_part, checked, read_samples
from refine_harness.evaluation.score import score
from refine_harness.evaluation.tasks import Resolved
from refine_harness.models import load_model
from refine_harness.models.deltanet import DeltaNetConfig, DeltaNetForCausalLM
from refine_harness.records import read_record, write_record

TEXT = "One of the special magic numbers for the harbour is: 40. The grass is green. The sky is blue.\n"
EVALUATION = Evaluation(tasks=("niah_single_1", "multikey_1"), lengths=(768, 1024), limit=2, device="cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "tiny"
    train_tokenizer([TEXT], 300, path)
    torch.manual_seed(0)
    config = DeltaNetConfig(
        hidden_size=32, num_heads=2, num_hidden_layers=1, vocab_size=300, pad_token_id=0, initializer_range=0.3
    )
    DeltaNetForCausalLM(config).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def scored(folder, tmp_path_factory):
    """One scored run: (record, folder of its answers, folder of its cache, progress told)."""
    out, cache, told = tmp_path_factory.mktemp("out"), tmp_path_factory.mktemp("cache"), []
    record = score(
        folder,
        EVALUATION.model_copy(update={"max_length": 900}),
        name="tiny",
        argv=["refine", "eval", "--model", str(folder)],
        folder=out,
        cache_dir=cache,
        progress=lambda done, total: told.append((done, total)),
    )
    assert record is not None
    return record, out, cache, told


def answers(out):
    return read_samples(out / "samples.parquet")


def test_a_record_says_what_was_scored_and_how(scored, folder, tmp_path):
    record, _, _, told = scored
    assert {(s.task, s.group, s.metric, s.length, s.n, s.unit) for s in record.scores} == {
        (task, "niah", "string_match_all", length, 2, "percent")
        for task in ("niah_single_1", "niah_multikey_1")
        for length in (768, 1024)
    }
    assert (record.stage, record.method, record.restore, record.training) == ("base", "none", None, None)
    assert record.model.weights_sha256 == weights_sha256(folder)
    assert (record.model.name, record.model.model_type) == ("tiny", "delta_net")
    facts = record.evaluation
    assert (facts.backend, facts.dtype, facts.device, facts.limit, facts.seed) == ("refine", "float32", "cpu", 2, 42)
    assert set(facts.data_sha256) == {f"{s.task}@{s.length}" for s in record.scores}
    assert record.seconds is not None
    assert record.seconds > 0
    assert told[-1] == (8, 8)
    assert str(folder) not in json.dumps(record.as_json())
    assert read_record(write_record(record, tmp_path)) == record


def test_cut_prompts_are_counted_for_each_length(scored):
    record, out, _, _ = scored
    assert {s.length: s.truncated for s in record.scores} == {768: 0, 1024: 2}
    assert all(row.truncated == (row.length == 1024) for row in answers(out))


def test_examples_are_neither_resolved_nor_tokenized_again(scored, folder, monkeypatch):
    evaluation = EVALUATION.model_copy(update={"max_length": 900})
    resolved = module.resolve(evaluation.tasks, evaluation, str(folder))
    built: Any = resolved.load()["tasks"]
    prompts = {doc["prompt"] for task in built.values() for doc in task.eval_docs}
    counted = []
    usual = module.count_all
    monkeypatch.setattr(module, "count_all", lambda t, texts: counted.extend(texts) or usual(t, texts))
    monkeypatch.setattr(module, "resolve", None)
    record = score(folder, evaluation, name="tiny", argv=[], resolved=resolved)
    assert record is not None
    assert record.scores == scored[0].scores, "their hash is of the numbers of tokens, too"
    assert counted
    assert not prompts & set(counted)


def test_answers_are_written_in_the_order_of_tasks_and_documents(scored):
    _, out, _, _ = scored
    rows = answers(out)
    assert [(row.task, row.length, row.doc_id) for row in rows] == [
        (task, length, i)
        for task in ("niah_multikey_1", "niah_single_1")
        for length, first in ((768, 0), (1024, 1))
        for i in (first, first + 2)
    ]
    assert all(row.output_type == "generate_until" and len(row.answers) == 1 for row in rows)
    assert all(set(row.scores) == {"string_match_all"} for row in rows)
    assert [path.name for path in out.iterdir()] == ["samples.parquet"]


def test_answers_hold_no_prompt_but_its_hash_and_length_and_what_scoring_needs(scored, folder):
    record, out, _, _ = scored
    tokenizer = load_model(folder)[1]
    for row in answers(out):
        assert "prompt" not in row.reference
        assert row.reference["answers"]
        assert row.reference["length"] == row.length
        # The example's own count leaves room for the answer.
        assert row.length is not None and row.prompt_tokens is not None
        assert 0.9 * row.length - 256 < row.prompt_tokens <= row.length
        assert row.answer_tokens == len(tokenizer(row.answers[0], add_special_tokens=False)["input_ids"])
    assert len({row.prompt_sha256 for row in answers(out)}) == 8
    assert checked(answers(out), record, out) != []


def test_values_and_errors_follow_from_the_answers_alone(scored, tmp_path):
    record, out, _, _ = scored
    parts = by_part(answers(out))
    for task in record.scores:
        found = statistics.percent([row.scores[task.metric] for row in parts[task.task, task.length]])
        assert (task.value, task.stderr) == found
    for group in record.groups:
        members = [statistics.Estimate(s.value, s.stderr) for s in record.scores if group.averages(s)]
        assert (group.value, group.stderr) == statistics.combined(members)
    write_record(record, out.parent / "kept")
    (out.parent / "kept" / "samples.parquet").write_bytes((out / "samples.parquet").read_bytes())
    results = rescore(open_run(out.parent / "kept"))
    assert len(results) == len(record.scores) + len(record.groups)
    assert all(result.same for result in results)


def test_scoring_again_goes_on_from_the_kept_answers(scored, folder, tmp_path, monkeypatch):
    record, out, cache, _ = scored
    monkeypatch.setattr(RefineLM, "_generate", lambda *_: pytest.fail("an answer was asked for again"))
    evaluation = EVALUATION.model_copy(update={"max_length": 900, "batch_size": 2})
    again = score(folder, evaluation, name="tiny", argv=[], folder=tmp_path, cache_dir=cache)
    assert again is not None
    assert (again.scores, again.seconds) == (record.scores, record.seconds)
    assert (tmp_path / "samples.parquet").read_bytes() == (out / "samples.parquet").read_bytes()


def test_a_loaded_model_is_scored_as_its_folder_is(scored, folder):
    record, _, _, _ = scored
    loaded = load_model(folder)
    evaluation = EVALUATION.model_copy(update={"max_length": 900})
    again = score(folder, evaluation, name="tiny", argv=[], loaded=loaded)
    assert again is not None
    assert (again.scores, again.model) == (record.scores, record.model)


@pytest.mark.parametrize("restore", ["prompt", "never"])
def test_test_time_training_is_recorded_as_such_and_leaves_the_callers_model_alone(folder, restore):
    model, tokenizer = load_model(folder)
    before = weights_sha256(model)
    test_time = load(Settings, None, [f"restore={restore}", "optim.lr=0.01", "batch.sequences=4", "seed=5"])
    evaluation = Evaluation(tasks=("niah_single_1",), lengths=(768,), limit=4, device="cpu")
    record = score(folder, evaluation, name="tt", argv=[], test_time=test_time, loaded=(model, tokenizer))
    assert record is not None
    assert (record.stage, record.method, record.restore) == ("test-time", "refine", restore)
    assert record.evaluation.backend == "refine-ttt"
    assert record.training is not None
    assert record.training.optimizer_steps == (8 if restore == "prompt" else 2)
    assert record.training.tokens > 0
    assert record.model.parent_sha256 == record.model.weights_sha256 == before == weights_sha256(model)
    assert record.provenance is not None
    assert record.provenance.seed == 5


def test_unknown_tasks_and_missing_data_are_told_before_the_model_is_loaded(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("refine_harness.models.load_model", lambda *_, **__: pytest.fail("the model was loaded"))
    for tasks, word in ((("niah_singel_1",), "niah_single_1"), (("longqa_squad",), "squad")):
        evaluation = Evaluation(tasks=tasks, lengths=(768,), limit=1, device="cpu", data=str(tmp_path))
        with pytest.raises(TaskError, match=word):
            score(folder, evaluation, name="x", argv=[])
    if not torch.cuda.is_available():
        with pytest.raises(ModelError, match="GPU"):
            score(folder, EVALUATION.model_copy(update={"device": "cuda"}), name="x", argv=[])
    with pytest.raises(ModelError, match="nothing-here"):
        score(tmp_path / "nothing-here", EVALUATION, name="x", argv=[])


def test_folders_that_cannot_be_written_are_named(folder, tmp_path):
    (tmp_path / "file").write_text("")
    evaluation = Evaluation(tasks=("niah_single_1",), lengths=(768,), limit=1, device="cpu")
    with pytest.raises(RunError, match="file"):
        score(folder, evaluation, name="x", argv=[], folder=tmp_path / "file")
    with pytest.raises(RunError, match="file"):
        score(folder, evaluation, name="x", argv=[], cache_dir=tmp_path / "file")
    (tmp_path / "responses.sqlite").write_text("this is no database" * 100)
    with pytest.raises(RunError, match=r"responses\.sqlite"):
        score(folder, evaluation, name="x", argv=[], cache_dir=tmp_path)


def test_scoring_is_silent_and_leaves_randomness_and_logging_as_they_were(folder, capfd):
    evaluation = Evaluation(tasks=("niah_single_1",), lengths=(768,), limit=1, device="cpu")
    levels = {name: logging.getLogger(name).level for name in ("lm_eval", "datasets", "transformers")}
    expected = []
    for scoring in (False, True):
        random.seed(3)
        np.random.seed(3)
        torch.manual_seed(3)
        if scoring:
            capfd.readouterr()
            score(folder, evaluation, name="x", argv=[])
            assert capfd.readouterr() == ("", "")
        expected.append((random.random(), float(np.random.rand()), float(torch.rand(()))))
    assert expected[0] == expected[1]
    assert levels == {name: logging.getLogger(name).level for name in levels}


TOYS = {
    "choices": """
        task: toy_choices
        output_type: multiple_choice
        doc_to_text: "{{question}}"
        doc_to_choice: choices
        doc_to_target: label
        metric_list: [{metric: acc}, {metric: acc_norm}]
    """,
    "maths": r"""
        task: toy_maths
        output_type: generate_until
        doc_to_text: "{{question}}"
        doc_to_target: "{{label}}"
        generation_kwargs: {max_gen_toks: 4, until: []}
        repeats: 2
        filter_list:
          - {name: first, filter: [{function: regex, regex_pattern: "(.)"}, {function: take_first}]}
          - {name: whole, filter: [{function: take_first}]}
        metric_list: [{metric: exact_match}]
    """,
    "prose": """
        task: toy_prose
        output_type: loglikelihood_rolling
        doc_to_text: ""
        doc_to_target: "{{question}}"
        metric_list: [{metric: word_perplexity}]
    """,
}


@pytest.fixture
def toys(tmp_path, monkeypatch):
    """Stock tasks of every kind, and a group of two that weighs them by size, in place of lm-eval's own."""
    rows = [{"question": f"Which is {i}?", "choices": ["red", "blue and green"], "label": i % 2} for i in range(6)]
    for name, yaml in TOYS.items():
        n = 3 if name == "maths" else 6
        data = tmp_path / f"{name}.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows[:n]))
        lines = [line[8:] for line in yaml.strip("\n").splitlines()]
        lines += ["dataset_path: json", f"dataset_kwargs: {{data_files: {{test: '{data}'}}}}", "test_split: test"]
        (tmp_path / f"{name}.yaml").write_text("\n".join(lines) + "\n")
    (tmp_path / "more.yaml").write_text("include: choices.yaml\ntask: toy_more\nprocess_docs: null\n")
    (tmp_path / "group.yaml").write_text(
        "group: toys\ntask: [toy_choices, toy_more]\naggregate_metric_list: [{metric: acc, weight_by_size: true}]\n"
    )

    def resolve(names, evaluation, tokenizer):
        manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
        bare = tuple(name.removeprefix("stock:") for name in names)
        return Resolved(names=bare, task_manager=manager, evaluation=evaluation)

    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("refine_harness.evaluation.score.resolve", resolve)
    monkeypatch.setattr("refine_harness.evaluation.tasks.resolve", resolve)
    return tmp_path


def test_stock_tasks_have_errors_too_and_are_scored_again_from_their_own_data(folder, toys, tmp_path):
    evaluation = Evaluation(tasks=("toys", "toy_maths", "toy_prose"), device="cpu")
    out = tmp_path / "out"
    record = score(folder, evaluation, name="toys", argv=[], folder=out)
    assert record is not None
    write_record(record, out)
    found = {(s.task, s.metric): s for s in record.scores}
    assert set(found) == {
        *((task, metric) for task in ("toy_choices", "toy_more") for metric in ("acc", "acc_norm")),
        *(("toy_maths", f"exact_match,{name}") for name in ("first", "whole")),
        ("toy_prose", "word_perplexity"),
    }
    assert all(s.stderr is not None for s in found.values())
    assert found["toy_prose", "word_perplexity"].unit == "raw"
    assert found["toy_prose", "word_perplexity"].stderr != 0
    (group,) = record.groups
    assert group.metrics == {"toy_choices": "acc", "toy_more": "acc"}
    assert group.stderr == pytest.approx((found["toy_choices", "acc"].stderr or 0) / 2**0.5)

    run = open_run(out)
    assert {len(row.answers) for row in run.samples["toy_maths", None]} == {2}
    assert {row.reference for row in run.samples["toy_choices", None]} == {0, 1}
    results = rescore(run)
    assert len(results) == 8
    assert all(result.same for result in results), results

    (toys / "choices.jsonl").write_text((toys / "choices.jsonl").read_text().replace("red", "yellow"))
    with pytest.raises(DataError, match="has other data now"):
        rescore(run)
