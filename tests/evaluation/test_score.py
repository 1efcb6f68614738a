"""A tiny model, scored: what the record says, what is kept, what is refused."""

from __future__ import annotations

import json
import logging
import random

import numpy as np
import pytest
import torch

from refine_harness.checkpoint import weights_sha256
from refine_harness.config import Evaluation, load
from refine_harness.config import TestTimeConfig as Settings
from refine_harness.data.tokenizer import train_tokenizer
from refine_harness.errors import ModelError, RunError, TaskError
from refine_harness.evaluation.lm import RefineLM
from refine_harness.evaluation.score import score
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
    return [json.loads(line) for line in (out / "samples.jsonl").read_text(encoding="utf-8").splitlines()]


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
    assert all(row["truncated"] == (row["length"] == 1024) for row in answers(out))


def test_answers_are_written_in_the_order_of_tasks_and_documents(scored):
    _, out, _, _ = scored
    rows = answers(out)
    assert [(row["task"], row["doc_id"]) for row in rows] == [
        (task, i) for task in ("niah_multikey_1", "niah_single_1") for i in range(4)
    ]
    assert all(isinstance(row["answer"], str) and row["targets"] for row in rows)
    assert all(set(row["scores"]) == {"string_match_all"} for row in rows)
    assert [path.name for path in out.iterdir()] == ["samples.jsonl"]


def test_scoring_again_goes_on_from_the_kept_answers(scored, folder, tmp_path, monkeypatch):
    record, out, cache, _ = scored
    monkeypatch.setattr(RefineLM, "_generate", lambda *_: pytest.fail("an answer was asked for again"))
    evaluation = EVALUATION.model_copy(update={"max_length": 900, "batch_size": 2})
    again = score(folder, evaluation, name="tiny", argv=[], folder=tmp_path, cache_dir=cache)
    assert again is not None
    assert (again.scores, again.seconds) == (record.scores, record.seconds)
    assert (tmp_path / "samples.jsonl").read_bytes() == (out / "samples.jsonl").read_bytes()


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
