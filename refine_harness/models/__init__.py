"""Fast-weight language models: one `read`, one `State`, one loader."""

from refine_harness.models.base import FastWeightLM, Reading
from refine_harness.models.deltanet import DeltaNetConfig, DeltaNetForCausalLM
from refine_harness.models.gated_deltanet import GatedDeltaNetConfig, GatedDeltaNetForCausalLM
from refine_harness.models.lact import LaCTForCausalLM, LaCTSWIGLUConfig
from refine_harness.models.load import EMBEDDED, load_config, load_model, load_tokenizer, resolve_model
from refine_harness.models.state import State

__all__ = [
    "EMBEDDED",
    "DeltaNetConfig",
    "DeltaNetForCausalLM",
    "FastWeightLM",
    "GatedDeltaNetConfig",
    "GatedDeltaNetForCausalLM",
    "LaCTForCausalLM",
    "LaCTSWIGLUConfig",
    "Reading",
    "State",
    "load_config",
    "load_model",
    "load_tokenizer",
    "resolve_model",
]
