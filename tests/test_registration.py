"""`import refine_harness` costs little, and both registries know us whatever is imported first."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import entry_points
from pathlib import Path

import pytest

from refine_harness.registration import BACKENDS as BACKENDS_OF_OURS

MODELS = """
from transformers import AutoConfig, AutoModelForCausalLM
config = AutoConfig.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder)
assert type(config).__module__ == type(model).__module__ == "refine_harness.models.deltanet", (config, model)
"""
BACKENDS = """
import lm_eval
from lm_eval.api.registry import get_model
assert get_model("refine").__name__ == "RefineLM"
assert get_model("refine-ttt").__name__ == "RefineTTTLM"
get_model("dummy")  # what lm-eval has of its own is still there
"""
RIVAL = """
from fla.models import DeltaNetConfig, DeltaNetForCausalLM
tiny = DeltaNetConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, vocab_size=8)
assert type(AutoModelForCausalLM.from_config(tiny)) is DeltaNetForCausalLM
"""
ORDERS = {
    "ours first": "import refine_harness" + MODELS + BACKENDS,
    # quantizers import the auto classes halfway through, when other modules that our models need are not whole.
    "ours first, then the middle of transformers, then a rival": (
        "import refine_harness, transformers.quantizers, fla.models.delta_net" + MODELS + RIVAL
    ),
    "ours last": (
        "import fla.models.delta_net, transformers.models.auto.modeling_auto, lm_eval.models\nimport refine_harness"
        + MODELS
        + RIVAL
        + BACKENDS
    ),
}


@pytest.fixture
def folder(tmp_path: Path, tiny_model: Callable) -> Path:
    tiny_model().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def rival(tmp_path: Path) -> Path:
    """A stand-in for flash-linear-attention, which cannot be imported without Triton: same names, same type."""
    package = tmp_path / "rival" / "fla" / "models"
    (package / "delta_net").mkdir(parents=True)
    (package.parent / "__init__.py").write_text("import fla.models")
    (package / "__init__.py").write_text("from fla.models.delta_net import DeltaNetConfig, DeltaNetForCausalLM")
    (package / "delta_net" / "__init__.py").write_text(
        "from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM\n"
        "class DeltaNetConfig(LlamaConfig):\n"
        "    model_type = 'delta_net'\n"
        "class DeltaNetForCausalLM(LlamaForCausalLM):\n"
        "    config_class = DeltaNetConfig\n"
        "AutoConfig.register('delta_net', DeltaNetConfig, exist_ok=True)\n"
        "AutoModelForCausalLM.register(DeltaNetConfig, DeltaNetForCausalLM, exist_ok=True)\n"
    )
    return tmp_path / "rival"


def python(code: str, *path: Path) -> None:
    search = [*map(str, path), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(search)} if search else dict(os.environ)
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_importing_the_package_imports_nothing_slow() -> None:
    python(
        "import sys; before = set(sys.modules); import refine_harness\n"
        "new = {name.split('.')[0] for name in set(sys.modules) - before} - set(sys.stdlib_module_names)\n"
        "assert new == {'refine_harness'}, new"
    )


@pytest.mark.parametrize("order", ORDERS)
def test_both_registries_know_us(order: str, folder: Path, rival: Path) -> None:
    python(f"folder = {str(folder)!r}\n{ORDERS[order]}", rival)


def test_importing_our_models_registers_them(tiny_config: Callable) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = tiny_config()
    assert type(AutoConfig.for_model("delta_net")) is type(config)
    assert type(AutoModelForCausalLM.from_config(config)).__module__ == "refine_harness.models.deltanet"


def test_a_watched_module_keeps_its_own_loader() -> None:
    python(
        "import refine_harness, inspect\n"
        "import transformers.utils.logging as module\n"
        "assert 'exec_module' not in vars(module.__loader__)\n"
        "assert inspect.getsource(module)"
    )


def test_newer_releases_of_lm_eval_find_the_same_names_as_entry_points() -> None:
    points = {point.name: point for point in entry_points(group="lm_eval.models") if point.name in BACKENDS_OF_OURS}
    assert {name: point.value for name, point in points.items()} == BACKENDS_OF_OURS
    assert points["refine"].load().__name__ == "RefineLM"


def test_names_that_are_taken_stay_as_they_are() -> None:
    python(
        "import lm_eval.models\n"
        "from lm_eval.api.registry import model_registry\n"
        "model_registry.register('refine', target='somewhere.else:Model')\n"
        "import refine_harness\n"
        "assert model_registry._objs['refine'] == 'somewhere.else:Model'\n"
        "assert 'refine-ttt' in model_registry"
    )
