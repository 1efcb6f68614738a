from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from refine_harness.checkpoint import (
    claim_run_folder,
    final_checkpoint,
    latest_checkpoint,
    load_train_state,
    prune,
    save_checkpoint,
    step_folder,
    weights_sha256,
)
from refine_harness.config import Algorithm, Batching, MidConfig, Optim, PostConfig
from refine_harness.errors import ModelError, RunError
from refine_harness.models import DeltaNetConfig, DeltaNetForCausalLM, load_model
from refine_harness.training.trainer import Trainer, TrainState
from refine_harness.types import Batch

CONFIG = MidConfig(
    steps=4,
    batch=Batching(sequences=2, steps=2),
    algorithm=Algorithm(chunks=2, rollout_length=3),
    optim=Optim(lr=1e-3),
)


def tiny(seed: int = 0) -> DeltaNetForCausalLM:
    torch.manual_seed(seed)
    return DeltaNetForCausalLM(DeltaNetConfig(hidden_size=16, num_heads=2, num_hidden_layers=1, vocab_size=32))


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    words = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"w{number}": number for number in range(3, 32)}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(words, unk_token="<unk>")),
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
    )


def batches(first: int = 0) -> list[Batch]:
    return [
        Batch(torch.randint(3, 32, (2, 20), generator=torch.Generator().manual_seed(number)), torch.tensor([20, 17]))
        for number in range(first, 4)
    ]


def weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_a_run_resumed_from_disk_matches_an_uninterrupted_one(tmp_path, tokenizer):
    whole = Trainer(tiny(), CONFIG)
    list(whole.run(batches()))

    first = Trainer(tiny(), CONFIG)
    for _ in zip(range(2), first.run(batches()), strict=False):
        pass
    folder = save_checkpoint(step_folder(tmp_path, 2), first.model, tokenizer, CONFIG, first.state(), parent="abc")

    assert latest_checkpoint(tmp_path) == folder
    model, _ = load_model(folder)
    second = Trainer(model, CONFIG)
    second.load(load_train_state(folder))
    assert second.done.batches == 1
    list(second.run(batches(first=second.done.batches)))
    assert same(weights(whole.model), weights(second.model))
    assert same(whole.state().optimizer, second.state().optimizer)


def test_a_checkpoint_is_a_hugging_face_folder_with_its_story(tmp_path, tokenizer):
    model = tiny()
    state = TrainState(steps=3, answer_steps=1, batches=1, tokens=70, seconds=1.5)
    config = PostConfig(steps=3, batch=Batching(sequences=3, steps=3))
    folder = save_checkpoint(tmp_path / "final", model, tokenizer, config, state, parent="abc", resumable=False)
    names = {path.name for path in folder.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "training_config.json"} <= names
    assert not any(name.startswith("train_state") or name.endswith((".bin", ".pt", ".pkl")) for name in names)
    about = json.loads((folder / "training_config.json").read_text())
    assert about["stage"] == "post"
    assert about["parent_sha256"] == "abc"
    assert about["progress"] == {"steps": 3, "answer_steps": 1, "batches": 1, "tokens": 70, "seconds": 1.5}
    assert PostConfig.model_validate(about["config"]) == config
    loaded, loaded_tokenizer = load_model(folder)
    assert same(weights(model), weights(loaded))
    assert loaded_tokenizer.get_vocab() == tokenizer.get_vocab()
    assert final_checkpoint(tmp_path) == folder
    assert latest_checkpoint(tmp_path) is None
    with pytest.raises(RunError, match="cannot be resumed from"):
        load_train_state(folder)


@pytest.mark.parametrize("exception", [KeyboardInterrupt, RuntimeError])
def test_an_interrupted_save_leaves_the_old_checkpoint(tmp_path, tokenizer, monkeypatch, exception):
    old, new = tiny(0), tiny(1)
    folder = save_checkpoint(tmp_path / "final", old, tokenizer, CONFIG, TrainState())

    def interrupted(*_, **__):
        raise exception

    monkeypatch.setattr("refine_harness.checkpoint.save_file", interrupted)
    with pytest.raises(exception):
        save_checkpoint(folder, new, tokenizer, CONFIG, TrainState())
    with pytest.raises(exception):
        save_checkpoint(step_folder(tmp_path, 7), new, tokenizer, CONFIG, TrainState())
    assert [path.name for path in tmp_path.iterdir()] == ["final"]
    assert weights_sha256(folder) == weights_sha256(old)

    monkeypatch.undo()
    save_checkpoint(folder, new, tokenizer, CONFIG, TrainState())
    assert [path.name for path in tmp_path.iterdir()] == ["final"]
    assert weights_sha256(folder) == weights_sha256(new)


def test_a_folder_that_cannot_take_its_name_leaves_the_old_checkpoint(tmp_path, tokenizer, monkeypatch):
    old = tiny(0)
    folder = save_checkpoint(tmp_path / "final", old, tokenizer, CONFIG, TrainState())
    rename = Path.rename

    def unlucky(self, target):
        if Path(target) == folder and not self.name.endswith("-old"):
            raise KeyboardInterrupt
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", unlucky)
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(folder, tiny(1), tokenizer, CONFIG, TrainState())
    assert [path.name for path in tmp_path.iterdir()] == ["final"]
    assert weights_sha256(folder) == weights_sha256(old)


def test_a_full_disk_is_one_sentence(tmp_path, tokenizer, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("refine_harness.checkpoint.save_file", full)
    with pytest.raises(RunError, match="No space left on device"):
        save_checkpoint(tmp_path / "final", tiny(), tokenizer, CONFIG, TrainState())
    assert list(tmp_path.iterdir()) == []


def test_only_the_last_resumable_checkpoint_and_the_final_one_are_kept(tmp_path, tokenizer):
    model = tiny()
    for steps in (2, 1_000_000, 40):
        save_checkpoint(step_folder(tmp_path, steps), model, tokenizer, CONFIG, TrainState(steps=steps))
    save_checkpoint(tmp_path / "final", model, tokenizer, CONFIG, TrainState(), resumable=False)
    (tmp_path / "step-2000000.tmp-99").mkdir()  # a save that was killed
    (tmp_path / "metrics.jsonl").touch()
    prune(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["final", "metrics.jsonl", "step-1000000"]
    assert latest_checkpoint(tmp_path) == tmp_path / "step-1000000"
    (tmp_path / "step-3000000").mkdir()  # somebody's own folder
    assert latest_checkpoint(tmp_path) == tmp_path / "step-1000000"


def test_no_run_has_no_checkpoint(tmp_path):
    assert latest_checkpoint(tmp_path / "nothing") is None
    assert final_checkpoint(tmp_path / "nothing") is None


@pytest.mark.parametrize("damage", ["truncated tensors", "no tensors", "broken json", "other json"])
def test_a_damaged_training_state_is_said(tmp_path, tokenizer, damage):
    tensors = {"w:exp_avg": torch.ones(100)}
    folder = save_checkpoint(tmp_path / "step-000001", tiny(), tokenizer, CONFIG, TrainState(optimizer=tensors))
    assert same(load_train_state(folder).optimizer, tensors)
    file = folder / ("train_state.json" if "json" in damage else "train_state.safetensors")
    if damage == "no tensors":
        file.unlink()
    else:
        file.write_bytes(b'{"foot": 1}' if damage == "other json" else file.read_bytes()[:-20])
    with pytest.raises(RunError, match="missing or damaged"):
        load_train_state(folder)


def test_the_hash_is_of_the_weights_and_not_of_their_files(tmp_path, tokenizer):
    model = tiny()
    digest = weights_sha256(model)
    folder = save_checkpoint(tmp_path / "whole", model, tokenizer, CONFIG, TrainState(), resumable=False)
    model.save_pretrained(tmp_path / "shards", max_shard_size="4KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    assert weights_sha256(folder) == weights_sha256(tmp_path / "shards") == digest
    assert weights_sha256(tiny()) == digest
    assert len(digest) == 64


def test_the_hash_sees_every_bit_name_shape_and_dtype(tmp_path):
    def saved(tensors):
        save_file({name: tensor.clone() for name, tensor in tensors.items()}, tmp_path / "model.safetensors")
        return weights_sha256(tmp_path)

    weight = torch.arange(6, dtype=torch.float32)
    flipped = weight.clone()
    flipped[3] = torch.nextafter(flipped[3], torch.tensor(9.0))
    digests = [
        saved({"a": weight, "b": weight}),
        saved({"a": flipped, "b": weight}),
        saved({"a": weight, "c": weight}),
        saved({"a": weight.view(2, 3), "b": weight}),
        saved({"a": weight.view(torch.int32), "b": weight}),
        saved({"a": weight}),
    ]
    assert len(set(digests)) == len(digests)


def test_half_precision_models_have_a_hash(tmp_path):
    model = tiny().bfloat16()
    model.save_pretrained(tmp_path)
    assert weights_sha256(tmp_path) == weights_sha256(model) != weights_sha256(tiny())


def test_tied_weights_count_once(tmp_path):
    model = GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=1, n_head=1, vocab_size=32, n_positions=8))
    model.save_pretrained(tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    assert weights_sha256(tmp_path) == weights_sha256(model)


def test_a_folder_without_weights_has_no_hash(tmp_path):
    with pytest.raises(ModelError, match="no readable safetensors"):
        weights_sha256(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"x" * 30)
    with pytest.raises(ModelError, match="no readable safetensors"):
        weights_sha256(tmp_path)


def test_an_index_that_points_outside_its_folder_is_not_followed(tmp_path):
    save_file({"a": torch.ones(1)}, tmp_path / "secret.safetensors")
    inside = tmp_path / "model"
    inside.mkdir()
    (inside / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../secret.safetensors"}}))
    with pytest.raises(ModelError):
        weights_sha256(inside)


def fingerprint(**changes) -> dict:
    return {"stage": "mid", "config": {"optim": {"lr": 1e-6}, "betas": (0.9, 0.99)}, **changes}


def test_the_same_run_goes_on_in_its_folder(tmp_path):
    run = tmp_path / "deep" / "run"
    assert claim_run_folder(run, fingerprint()) is False
    (run / "metrics.jsonl").touch()
    assert claim_run_folder(run, fingerprint()) is True
    assert {path.name for path in run.iterdir()} == {"run.json", "metrics.jsonl"}


def test_the_folder_of_another_run_is_refused(tmp_path):
    claim_run_folder(tmp_path / "run", fingerprint())
    other = fingerprint(config={"optim": {"lr": 3e-6}, "betas": (0.9, 0.99)}, model="x")
    with pytest.raises(RunError, match=r"config\.optim\.lr is 1e-06 there and 3e-06 here and 1 more differ.*--out"):
        claim_run_folder(tmp_path / "run", other)
    with pytest.raises(RunError, match=r"stage is 'mid' there and None here"):
        claim_run_folder(tmp_path / "run", {"config": fingerprint()["config"]})


def test_of_two_processes_that_claim_a_folder_at_once_one_is_first(tmp_path, monkeypatch):
    def link_after_another(draft, target):
        target.write_text(json.dumps({"fingerprint": json.loads(json.dumps(theirs))}))
        raise FileExistsError

    monkeypatch.setattr("refine_harness.checkpoint.os.link", link_after_another)
    theirs = fingerprint()
    assert claim_run_folder(tmp_path / "same", fingerprint()) is True
    theirs = fingerprint(stage="post")
    with pytest.raises(RunError, match="stage is 'post' there and 'mid' here"):
        claim_run_folder(tmp_path / "other", fingerprint())
    assert [path.name for path in (tmp_path / "other").iterdir()] == ["run.json"]


def test_a_folder_is_claimed_where_files_cannot_have_two_names(tmp_path, monkeypatch):
    def no_links(*_):
        raise OSError("not supported")

    monkeypatch.setattr("refine_harness.checkpoint.os.link", no_links)
    assert claim_run_folder(tmp_path, fingerprint()) is False
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]
    with pytest.raises(RunError, match="stage is 'mid' there and 'post' here"):
        claim_run_folder(tmp_path, fingerprint(stage="post"))
    assert claim_run_folder(tmp_path, fingerprint()) is True


def test_foreign_files_are_refused_and_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("years")
    with pytest.raises(RunError, match=r"thesis\.tex"):
        claim_run_folder(tmp_path, fingerprint())
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_what_an_interrupted_claim_left_is_no_foreign_file(tmp_path):
    (tmp_path / "run.json.tmp-7").touch()
    assert claim_run_folder(tmp_path, fingerprint()) is False


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"fingerprint"'])
def test_an_unreadable_run_is_refused(tmp_path, text):
    (tmp_path / "run.json").write_text(text)
    with pytest.raises(RunError, match=r"run\.json is not readable"):
        claim_run_folder(tmp_path, fingerprint())


def test_a_folder_that_cannot_be_made_is_said(tmp_path):
    (tmp_path / "file").touch()
    for place in (tmp_path / "file", tmp_path / "file" / "run", Path("/proc/refine/run")):
        with pytest.raises(RunError, match=r"cannot be written .*Choose another --out"):
            claim_run_folder(place, fingerprint())
    with pytest.raises(RunError, match="cannot be written"):
        save_checkpoint(tmp_path / "file" / "final", tiny(), None, CONFIG, TrainState())  # pyright: ignore
