"""The examples that each group's functions build from small data."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from refine_harness.errors import TaskError
from refine_harness.evaluation import generation, longbench, longqa, niah
from refine_harness.evaluation.generation import GeneratorSettings, data_sha256, token_counter

from .conftest import LONGBENCH, hotpot_rows, longbench_rows, squad_rows, write_json, write_parquet

HOTPOT_TEMPLATE = "Read. \n{context}\n\nQuestion: {input}\nAnswer:"
CODE_TEMPLATE = "Please complete the code given below. \n{context}Next line of code:\n"


def docs(load: Callable[..., Any], **arguments: Any) -> list[dict[str, Any]]:
    return list(load(**arguments)["test"])


# Settings


def test_settings_take_what_lm_eval_makes_of_the_command_line():
    read = GeneratorSettings.read
    assert read({"lengths": "1024,512"}).lengths == (512, 1024)
    assert read({"max_seq_lengths": [2048, 2048]}).lengths == (2048,)
    assert read({"lengths": 4096, "limit": "3", "seed": "7"}) == GeneratorSettings((4096,), limit=3, seed=7)
    assert read({"pretrained": "a", "tokenizer": "b"}).tokenizer == "b"
    assert read({"version": 1.0, "config_source": "x", "data_dir": "/d"}).data == "/d"
    assert read({"samples": 10, "limit": 50}).count == 10


@pytest.mark.parametrize("bad", [{"lengths": "4k"}, {"lengths": [0]}, {"limit": -1}, {"samples": 1.5}])
def test_settings_that_are_no_counts_are_refused(bad: dict[str, Any]):
    with pytest.raises(TaskError, match="expected a whole number above 0"):
        GeneratorSettings.read(bad)


def test_a_missing_or_broken_tokenizer_is_one_sentence(tmp_path: Path):
    with pytest.raises(TaskError, match=r"refine_niah_single_1 needs a tokenizer .*tokenizer=<model folder>"):
        niah.load(spec="niah_single_1", lengths=512)
    (tmp_path / "tokenizer.json").write_text("{", encoding="utf-8")
    with pytest.raises(TaskError, match="no tokenizer can be read from"):
        niah.load(spec="niah_single_1", lengths=512, tokenizer=str(tmp_path))


# Needles


def needles(spec: str, tokenizer: str, **more: Any) -> list[dict[str, Any]]:
    return docs(niah.load, **{"spec": spec, "tokenizer": tokenizer, "lengths": [768], "limit": 2, **more})


def test_examples_do_not_depend_on_the_lengths_limits_or_tasks_beside_them(tokenizer_folder: str):
    alone = needles("niah_multikey_1", tokenizer_folder)
    needles("niah_multivalue", tokenizer_folder)
    beside = needles("niah_multikey_1", tokenizer_folder, lengths=[1024, 768], limit=4)
    assert [doc for doc in beside if doc["length"] == 768][:2] == alone
    assert [doc["length"] for doc in beside] == [768, 1024] * 4, "a cut of the front keeps all lengths"
    assert data_sha256(alone) == data_sha256(needles("niah_multikey_1", tokenizer_folder))
    assert data_sha256(alone) != data_sha256(needles("niah_multikey_1", tokenizer_folder, seed=7))


def test_needles_are_scored_under_the_name_of_their_length(tokenizer_folder: str):
    doc = needles("niah_multiquery", tokenizer_folder, limit=1, lengths=[1024])[0]
    assert len(doc["answers"]) == 4
    assert doc["prompt"].endswith("mentioned in the provided text are")
    assert niah.process_results(doc, [" " + ", ".join(doc["answers"])]) == {"1024": 1.0}
    assert niah.process_results(doc, [doc["answers"][2]]) == {"1024": 0.25}


def test_the_packaged_haystack_lasts_for_the_longest_contexts():
    haystack = niah.haystack()
    assert sum(len(sentence.split()) for sentence in haystack.sentences) > 100_000
    assert len(haystack.nouns) * len(haystack.adjectives) > 10**6


def test_a_text_of_the_users_can_be_the_haystack(tokenizer_folder: str, tmp_path: Path):
    path = tmp_path / "essays.txt"
    path.write_text("Zebras graze here. " * 30, encoding="utf-8")
    doc = needles("niah_single_2", tokenizer_folder, essays=str(path), limit=1)[0]
    assert "Zebras graze here." in doc["prompt"]
    assert doc["tokens"] > 750, "a short text starts again"
    with pytest.raises(TaskError, match="cannot be read"):
        needles("niah_single_2", tokenizer_folder, essays=str(tmp_path / "none.txt"))


def test_an_unknown_needle_task_is_refused(tokenizer_folder: str):
    with pytest.raises(TaskError, match=r"Did you mean niah_single_1\?"):
        needles("niah_singel_1", tokenizer_folder)


# Long questions


def asked(corpus: str, data: str, tokenizer: str, **more: Any) -> list[dict[str, Any]]:
    return docs(longqa.load, **{"corpus": corpus, "data": data, "tokenizer": tokenizer, "lengths": [400], **more})


@pytest.mark.parametrize("corpus", ["squad", "hotpot"])
def test_questions_come_with_what_answers_them(corpus: str, data_folder: str, tokenizer_folder: str):
    rows = {row["question"]: row for row in (squad_rows() if corpus == "squad" else hotpot_rows())}
    made = asked(corpus, data_folder, tokenizer_folder)
    assert len(made) == len(rows)
    for doc in made:
        question = doc["prompt"].rpartition("Question: ")[2].removesuffix(" Answer:")
        assert doc["answers"] == rows[question]["answers"]
        assert doc["answers"][0] in doc["prompt"]
        assert doc["tokens"] <= 400
        assert longqa.process_results(doc, [f"It is {doc['answers'][-1]}."]) == {"400": 1.0}
        assert longqa.process_results(doc, ["No idea."]) == {"400": 0.0}
        if corpus == "hotpot":
            number = question.removesuffix(" live in?").rpartition(" ")[2]
            assert f"Thing {number}\nThing {number} was made" in doc["prompt"]


def test_prompts_are_counted_together(monkeypatch: pytest.MonkeyPatch, data_folder: str, tokenizer_folder: str):
    together = []
    usual = generation.count_all
    monkeypatch.setattr(generation, "count_all", lambda t, texts: together.append(len(texts)) or usual(t, texts))
    made = docs(niah.load, spec="niah_single_1", tokenizer=tokenizer_folder, lengths=[768], samples=generation.TOGETHER)
    assert len(made) in together
    together.clear()
    questions = asked("squad", data_folder, tokenizer_folder)
    assert len(questions) in together


def test_where_quick_counts_are_wrong_examples_are_made_with_exact_ones(
    monkeypatch: pytest.MonkeyPatch, data_folder: str, tokenizer_folder: str
):
    counter = token_counter(tokenizer_folder)
    right = asked("squad", data_folder, tokenizer_folder)
    monkeypatch.setattr(counter, "quick", lambda text: counter.exact(text) + 1)
    assert asked("squad", data_folder, tokenizer_folder) == right
    with pytest.raises(TaskError, match="cannot be made 100 tokens long"):
        docs(niah.load, spec="niah_multiquery", tokenizer=tokenizer_folder, lengths=[100])


def test_a_limit_takes_some_of_the_same_examples(data_folder: str, tokenizer_folder: str):
    everything = asked("squad", data_folder, tokenizer_folder, lengths=[300, 500])
    some = asked("squad", data_folder, tokenizer_folder, lengths=[500], limit=4)
    assert some == [doc for doc in everything if doc["length"] == 500][:4]
    assert {doc["index"] for doc in everything} == set(range(12))


def test_published_files_give_the_same_questions_as_rows(data_folder: str, tmp_path: Path):
    rows = squad_rows()
    articles = {}
    for row in rows:
        paragraphs = articles.setdefault(row["title"], {})
        paragraphs.setdefault(row["context"], []).append(
            {"question": row["question"], "answers": [{"text": text, "answer_start": 0} for text in row["answers"]]}
        )
    tree = {
        "data": [
            {"title": title, "paragraphs": [{"context": context, "qas": qas} for context, qas in paragraphs.items()]}
            for title, paragraphs in articles.items()
        ]
    }
    plain = longqa.read_corpus("squad", data_folder)
    write_json(tmp_path / "v1" / "dev-v1.1.json", tree)
    assert longqa.read_corpus("squad", str(tmp_path / "v1")) == plain
    tree["data"][0]["paragraphs"][0]["qas"].append({"question": "Why not?", "answers": [], "is_impossible": True})
    write_json(tmp_path / "v2" / "squad" / "dev-v2.0.json", tree)
    assert longqa.read_corpus("squad", str(tmp_path / "v2")) == plain

    published = [
        {
            "question": row["question"],
            "answer": row["answers"][0],
            "context": [
                [title, [text]] for title, text in zip(row["paragraph_titles"], row["paragraphs"], strict=True)
            ],
            "supporting_facts": [[title, 0] for title in row["supporting_titles"]],
        }
        for row in hotpot_rows()
    ]
    write_json(tmp_path / "hotpot" / "hotpot_dev_distractor_v1.json", published)
    assert longqa.read_corpus("hotpot", str(tmp_path / "hotpot")) == longqa.read_corpus("hotpot", data_folder)
    hub = [
        {
            "question": row["question"],
            "answer": row["answer"],
            "context": {"title": [t for t, _ in row["context"]], "sentences": [s for _, s in row["context"]]},
            "supporting_facts": {"title": [t for t, _ in row["supporting_facts"]], "sent_id": [0, 0]},
        }
        for row in published
    ]
    write_parquet(tmp_path / "hub" / "hotpotqa.parquet", hub)
    assert longqa.read_corpus("hotpot", str(tmp_path / "hub")) == longqa.read_corpus("hotpot", data_folder)


def test_the_article_of_a_question_is_near_it(data_folder: str):
    corpus = longqa.read_corpus("squad", data_folder)
    question = corpus.questions[0]
    assert [corpus.paragraphs[i][:15] for i in (*question.gold, *question.near)] == [
        "Towers number 1",
        "Towers number 2",
    ]


def test_missing_data_names_what_was_looked_for(tmp_path: Path, tokenizer_folder: str):
    with pytest.raises(TaskError, match=r"looked for squad/dev\.parquet, .*dev-v2\.0\.json.*--data"):
        asked("squad", str(tmp_path), tokenizer_folder)
    with pytest.raises(TaskError, match="there is no such folder"):
        asked("hotpot", str(tmp_path / "none"), tokenizer_folder)
    with pytest.raises(TaskError, match=r"no data folder, and rajpurkar/squad_v2 could not be read .*--data DIR"):
        docs(longqa.load, corpus="squad", tokenizer=tokenizer_folder)


def test_broken_data_names_the_file(tmp_path: Path, tokenizer_folder: str):
    (tmp_path / "squad.parquet").write_bytes(b"not parquet")
    with pytest.raises(TaskError, match=r"squad\.parquet cannot be read"):
        asked("squad", str(tmp_path), tokenizer_folder)
    write_parquet(tmp_path / "hotpotqa.parquet", [{"text": "only text"}])
    with pytest.raises(TaskError, match=r"hotpotqa\.parquet, row 1 is not a question in a known layout.* it has text"):
        asked("hotpot", str(tmp_path), tokenizer_folder)
    write_json(tmp_path / "json" / "dev-v2.0.json", {"rows": []})
    with pytest.raises(TaskError, match=r"dev-v2\.0\.json is not in the layout it was published in"):
        asked("squad", str(tmp_path / "json"), tokenizer_folder)


def test_a_length_too_small_for_any_question_is_refused(data_folder: str, tokenizer_folder: str):
    with pytest.raises(TaskError, match="finds no question that fits into 100 tokens"):
        asked("squad", data_folder, tokenizer_folder, lengths=[100])


# LongBench


def test_longbench_rows_become_published_prompts(data_folder: str):
    made = docs(longbench.load, subset="hotpotqa", template=HOTPOT_TEMPLATE, data=data_folder, limit=2)
    assert [doc["prompt"] for doc in made] == [
        f"Read. \nSome text {i} about Ann.\n\nQuestion: question {i}\nAnswer:" for i in range(2)
    ]
    assert made[0]["answers"] == LONGBENCH["hotpotqa"]


@pytest.mark.parametrize("name", ["longbench/lcc.jsonl", "lcc.jsonl", "data/lcc.jsonl", "longbench/data/lcc.jsonl"])
def test_longbench_is_found_in_every_layout(name: str, tmp_path: Path):
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [{"context": "x = {1}\n", "input": "", "answers": ["return x"], "all_classes": None, "length": 3}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    made = docs(longbench.load, subset="lcc", template=CODE_TEMPLATE, data=str(tmp_path))
    assert made[0]["prompt"] == "Please complete the code given below. \nx = {1}\nNext line of code:\n"
    assert made[0]["all_classes"] == []


def test_ready_made_prompts_get_back_the_white_space_of_their_end(tmp_path: Path):
    ready = "Please complete the code given below. \nx = 1\nNext line of code:"
    write_parquet(tmp_path / "lcc.parquet", [{"prompt": ready, "answers": ["y"]}])
    made = docs(longbench.load, subset="lcc", template=CODE_TEMPLATE, data=str(tmp_path))
    assert made[0]["prompt"] == ready + "\n"
    write_parquet(tmp_path / "lcc.parquet", [{"prompt": "Write code: x = 1", "answers": ["y"]}])
    with pytest.raises(TaskError, match=r"lcc\.parquet, row 1 has a prompt that is not LongBench's"):
        docs(longbench.load, subset="lcc", template=CODE_TEMPLATE, data=str(tmp_path))


def test_trec_rows_without_classes_get_the_fifty(data_folder: str, tmp_path: Path):
    made = docs(longbench.load, subset="trec", template="{context}\n{input}", data=data_folder)
    assert len(made[0]["all_classes"]) == len(set(made[0]["all_classes"])) == 50
    own = [{**row, "all_classes": ["Date", "Food"]} for row in longbench_rows("trec")]
    write_parquet(tmp_path / "trec.parquet", own)
    made = docs(longbench.load, subset="trec", template="{context}\n{input}", data=str(tmp_path))
    assert made[0]["all_classes"] == ["Date", "Food"]


def test_longbench_answers_are_scored_by_the_tasks_own_rule():
    doc = {"answers": ["Ann", "Ann Lee"], "all_classes": []}
    assert longbench.score_qa_f1(doc, ["\nAnn Lee\nBob"]) == {"score": pytest.approx(0.8)}
    assert longbench.score_first_line_qa_f1(doc, ["\nAnn Lee\nBob"]) == {"score": 1.0}
    assert longbench.score_rouge_l({"answers": ["a b", "c"]}, ["c"])["score"] == pytest.approx(1.0)
    assert longbench.score_first_line_rouge_l({"answers": ["a b"]}, ["\na b\nc d"])["score"] == pytest.approx(1.0)
    assert longbench.score_code_similarity({"answers": ["return x"]}, ["# c\n\nreturn x"]) == {"score": 0.0}
    types = {"answers": ["Date"], "all_classes": ["Date", "Food"]}
    assert longbench.score_first_line_classification(types, ["\nDate\nFood"]) == {"score": 1.0}
    assert longbench.score_first_line_classification(types, ["Date or Food"]) == {"score": 0.5}


def test_missing_or_foreign_longbench_data_is_one_sentence(tmp_path: Path):
    arguments: dict[str, Any] = {"subset": "qmsum", "template": HOTPOT_TEMPLATE}
    with pytest.raises(TaskError, match=r"looked for longbench/qmsum\.parquet, .*data/qmsum\.jsonl.*--data"):
        docs(longbench.load, data=str(tmp_path), **arguments)
    with pytest.raises(TaskError, match=r"no data folder, and .*LongBench could not be read from the hub"):
        docs(longbench.load, **arguments)
    write_parquet(tmp_path / "qmsum.parquet", [{"text": "a"}])
    with pytest.raises(TaskError, match=r"qmsum\.parquet, row 1 has text; expected context, input and answers"):
        docs(longbench.load, data=str(tmp_path), **arguments)
    write_parquet(tmp_path / "qmsum.parquet", [{"context": "a", "input": "b", "answers": []}])
    with pytest.raises(TaskError, match="row 1 has no answers"):
        docs(longbench.load, data=str(tmp_path), **arguments)
