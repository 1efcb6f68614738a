"""Loading a model: from a folder, an embedded name; and one clear sentence for everything else."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from refine_harness.data.tokenizer import train_tokenizer
from refine_harness.errors import ModelError
from refine_harness.models import EMBEDDED, load_model, resolve_model
from refine_harness.models.load import create_model

CONFIG = {
    "model_type": "delta_net",
    "hidden_size": 16,
    "num_heads": 2,
    "num_hidden_layers": 1,
    "vocab_size": 300,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    train_tokenizer(["a few words, 123, and more words"], 262, folder / "tokenizer")
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return create_model(folder / "config.json", folder / "tokenizer", folder / "model", seed=1)


@pytest.fixture
def folder(made, tmp_path):
    return shutil.copytree(made, tmp_path / "model")


def edit(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize("dtype", ("float32", "bfloat16", "float64"))
def test_a_folder_loads_in_the_dtype_asked_for(folder, dtype):
    model, tokenizer = load_model(folder, dtype=dtype)
    assert {p.dtype for p in model.parameters()} == {getattr(torch, dtype)}
    assert not model.training
    text = tokenizer("a few words", add_special_tokens=True)["input_ids"]
    assert 1 not in text  # no token is added by itself
    assert model.read(torch.tensor([text])).hidden.isfinite().all()


def test_the_same_seed_makes_the_same_model(made, tmp_path):
    again = create_model(made / "config.json", made, tmp_path / "again", seed=1)
    other = create_model(made / "config.json", made, tmp_path / "other", seed=2)
    weights = [load_file(f / "model.safetensors") for f in (made, again, other)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert any(not torch.equal(weights[0][name], weights[2][name]) for name in weights[0])


def test_the_embedded_model_is_there_and_small():
    folder = resolve_model(EMBEDDED)
    model, tokenizer = load_model(EMBEDDED)
    assert len(tokenizer) <= model.config.vocab_size
    from pathlib import Path

    assert sum(f.stat().st_size for f in Path(folder).iterdir()) < 20_000_000


def broken(folder, what):
    if what == "no config":
        (folder / "config.json").unlink()
    elif what == "config not JSON":
        (folder / "config.json").write_text("{")
    elif what == "another family":
        edit(folder, model_type="gpt2")
    elif what == "an option that is not built":
        edit(folder, use_l2warp=True)
    elif what == "other sizes":
        edit(folder, hidden_size=32)
    elif what == "more layers":
        edit(folder, num_hidden_layers=2)
    elif what == "a cut file":
        path = folder / "model.safetensors"
        path.write_bytes(path.read_bytes()[:2000])
    elif what == "no weights":
        (folder / "model.safetensors").unlink()
    elif what == "a pickle":
        weights = load_file(folder / "model.safetensors")
        (folder / "model.safetensors").unlink()
        torch.save(weights, folder / "pytorch_model.bin")
    elif what == "a missing tensor":
        weights = load_file(folder / "model.safetensors")
        weights.pop("lm_head.weight")
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    elif what == "no tokenizer":
        (folder / "tokenizer.json").unlink()
        (folder / "tokenizer_config.json").unlink()
    elif what == "a larger tokenizer":
        edit(folder, vocab_size=100)
    elif what == "another end token":
        edit(folder, eos_token_id=7)


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("no config", "holds no config.json"),
        ("config not JSON", "cannot be read as JSON"),
        ("another family", "model_type 'gpt2'"),
        ("an option that is not built", "use_l2warp=True"),
        ("other sizes", "do not fit its config.json"),
        ("more layers", "missing keys"),
        ("a cut file", "cannot be read"),
        ("no weights", "cannot be read"),
        ("a pickle", "cannot be read"),
        ("a missing tensor", "missing keys lm_head.weight"),
        ("no tokenizer", "has no tokenizer"),
        ("a larger tokenizer", "tokens and the model 100 embeddings"),
        ("another end token", "eos token 2 and config.json says 7"),
    ],
)
def test_a_folder_that_cannot_be_used_says_why(folder, what, said):
    broken(folder, what)
    with pytest.raises(ModelError, match=said) as error:
        load_model(folder)
    assert "\n" not in str(error.value)
    assert str(folder) in str(error.value)


@pytest.mark.parametrize("name", ("./nowhere", "nowhere", "/no/such/folder", "refine-tyni"))
def test_a_name_that_is_nothing_is_refused_at_once(name):
    with pytest.raises(ModelError, match="no model folder at"):
        load_model(name)


def test_a_device_or_dtype_that_is_not_there_is_named(folder):
    if not torch.cuda.is_available():
        with pytest.raises(ModelError, match="torch sees no GPU"):
            load_model(folder, device="cuda")
    with pytest.raises(ModelError, match="dtype int8 is not known"):
        load_model(folder, dtype="int8")
