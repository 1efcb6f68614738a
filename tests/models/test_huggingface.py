"""Every native model is at home in transformers and PEFT: loading, generation, training, compiling, saving."""

import copy
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from refine_kernels.testing import assert_close
from transformers import AutoConfig, AutoModelForCausalLM

import refine_harness  # noqa: F401  registers our classes
from refine_harness.models import State

from .checks import gradients
from .tiny import MODELS, VOCABULARY, build, tokens

FAMILIES = ("delta_net", "gated_deltanet", "lact_muon")
each_model = pytest.mark.parametrize("model", MODELS, indirect=True)
each_family = pytest.mark.parametrize("model", [name for name in MODELS if name in FAMILIES], indirect=True)

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")


@pytest.fixture
def model(request):
    return build(request.param).eval()


def generate(model, batch, new=6, **settings):
    settings = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None, **settings}
    return model.generate(batch, max_new_tokens=new, **settings)


def padded(rows, T):
    """Rows of different lengths in one batch, padded on the left, and its mask."""
    batch, mask = torch.zeros(len(rows), T, dtype=torch.int64), torch.zeros(len(rows), T, dtype=torch.int64)
    for b, row in enumerate(rows):
        batch[b, T - len(row) :], mask[b, T - len(row) :] = row, 1
    return batch, mask


@each_model
def test_auto_classes_load_what_was_saved_bit_for_bit(model, tmp_path):
    model.save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    assert type(config) is type(model.config)
    got, want = config.to_diff_dict(), model.config.to_diff_dict()
    assert {**got, "_name_or_path": ""} == {**want, "_name_or_path": ""}
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto")
    assert type(loaded) is type(model)
    got, want = loaded.state_dict(), model.state_dict()
    assert got.keys() == want.keys()
    assert all(got[name].dtype == x.dtype and torch.equal(got[name], x) for name, x in want.items())
    assert loaded.num_parameters() == model.num_parameters() == sum(p.numel() for p in model.parameters())
    loaded.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (tmp_path / "model.safetensors").read_bytes()


@each_model
def test_a_padded_batch_generates_what_each_row_does_alone_with_and_without_cache(model):
    rows = [tokens(1, n, seed=n)[0] for n in (3, 21, 16)]
    batch, mask = padded(rows, 21)
    cached = generate(model, batch, attention_mask=mask)
    assert torch.equal(cached, generate(model, batch, attention_mask=mask, use_cache=False))
    for b, row in enumerate(rows):
        assert torch.equal(cached[b, 21:], generate(model, row[None])[0, len(row) :])


@each_family
def test_samples_depend_on_the_seed_and_not_on_the_cache(model):
    batch, mask = padded([tokens(1, n, seed=n)[0] for n in (5, 12)], 12)
    settings = {"do_sample": True, "temperature": 1.5, "top_k": 20, "top_p": 0.95, "attention_mask": mask}
    drawn = []
    for seed, use_cache in ((7, True), (7, False), (8, True)):
        torch.manual_seed(seed)
        drawn.append(generate(model, batch, new=12, use_cache=use_cache, **settings))
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


@each_family
def test_beams_and_several_answers_follow_their_states(model):
    batch, mask = padded([tokens(1, n, seed=n)[0] for n in (5, 18)], 18)
    beams = {"num_beams": 3, "num_return_sequences": 2, "attention_mask": mask}
    with_cache = generate(model, batch, **beams)
    assert with_cache.shape == (4, 24)
    assert torch.equal(with_cache, generate(model, batch, use_cache=False, **beams))
    several = {"do_sample": True, "num_return_sequences": 3, "attention_mask": mask}
    drawn = []
    for use_cache in (True, False):
        torch.manual_seed(3)
        drawn.append(generate(model, batch, use_cache=use_cache, **several))
    assert torch.equal(*drawn)


@each_family
def test_the_cache_that_forward_returns_is_a_state_to_go_on_from(model):
    text = tokens(2, 20)
    with torch.no_grad():
        first = model(text[:, :17], use_cache=True)
        assert isinstance(first.past_key_values.state, State)
        assert first.past_key_values.get_seq_length() == 17
        rest = model(text[:, 17:], past_key_values=first.past_key_values)
        whole = model(text, logits_to_keep=3)
        assert_close(rest.logits, whole.logits)
        assert_close(model(text, return_dict=False)[0][:, 17:], whole.logits)


@each_model
def test_lora_trains_its_adapters_and_merges_into_the_same_outputs(model):
    linear = {name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)} - {"lm_head"}
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
    assert {name for name, module in model.named_modules() if hasattr(module, "lora_A")} == linear
    adapted.double()
    text = tokens(2, 40)
    adapted(input_ids=text, labels=text).loss.backward()
    for name, p in adapted.named_parameters():
        assert p.requires_grad == ("lora_" in name), name
        assert p.grad is not None and p.grad.norm() > 0 if p.requires_grad else p.grad is None, name
    with torch.no_grad():
        want = adapted(input_ids=text).logits
        merged: Any = adapted.merge_and_unload()
        assert type(merged) is type(model)
        assert_close(merged(text).logits, want)
        assert_close(merged.logits(merged.read(text).hidden), want)


@each_family
def test_a_fork_under_adapters_with_a_bias_is_its_prefix_read_again(model):
    """What an adapter makes of nothing is not nothing, and must not stand before a text's first token."""
    config = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False, lora_bias=True)
    get_peft_model(model, config).double()
    for name, p in model.named_parameters():
        if "lora_B" in name and name.endswith("bias"):
            torch.nn.init.normal_(p)
    text, positions = tokens(1, 40), [0, 1, 2, 21]
    with torch.no_grad():
        forks = model.read(text).states_at(torch.tensor([positions]))
        got = model.read(text[:, :5].expand(4, -1), forks).hidden
        for c, position in enumerate(positions):
            again = model.read(torch.cat((text[:, : position + 1], text[:, :5]), 1)).hidden[:, -5:]
            assert_close(got[c : c + 1], again)


@each_model
def test_gradient_checkpointing_changes_neither_loss_nor_gradients(model):
    model.train()
    text = tokens(2, 40)
    loss = model(text, labels=text).loss
    want = gradients(model, loss)
    model.gradient_checkpointing_enable()
    assert model.is_gradient_checkpointing
    again = model(text, labels=text).loss
    assert_close(again, loss)
    for name, x in gradients(model, again).items():
        assert_close(x, want[name], name)
    model.gradient_checkpointing_disable()


@each_family
@pytest.mark.parametrize("backend", ("eager", "aot_eager"))
def test_compiling_changes_no_output(model, backend):
    torch.compiler.reset()
    compiled = torch.compile(model, backend=backend, dynamic=True)
    for T in (9, 33):
        text = tokens(2, T)
        assert_close(compiled(text, labels=text).loss, model(text, labels=text).loss)
        assert_close(compiled(text).logits, model(text).logits)
    torch.compiler.reset()


@each_family
def test_resized_embeddings_keep_the_old_rows(model):
    text, old = tokens(1, 12), model(tokens(1, 12)).logits
    model.resize_token_embeddings(VOCABULARY + 7)
    assert model.config.vocab_size == VOCABULARY + 7
    assert model.get_input_embeddings().weight.shape[0] == model.head_weight.shape[0] == VOCABULARY + 7
    assert_close(model(text).logits[..., :VOCABULARY], old)
    assert generate(model, torch.tensor([[VOCABULARY + 3, 5]])).shape == (1, 8)


@each_family
@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16))
def test_a_narrower_dtype_goes_on_working(model, dtype):
    narrow = copy.deepcopy(model).to(dtype)
    text = tokens(2, 30)
    out = narrow(text, labels=text)
    assert out.logits.dtype == dtype and out.loss.dtype == torch.float32 and out.loss.isfinite()
    out.loss.backward()
    assert all(p.dtype == dtype and p.grad.isfinite().all() for p in narrow.parameters() if p.grad is not None)
    assert abs(out.loss.item() - model(text, labels=text).loss.item()) < 0.2
    assert generate(narrow, text).shape == (2, 36)
