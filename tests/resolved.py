"""Plans of a model whose facts are written here, SmolLM2-135M's, on a CPU or a GPU that is not there."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from lightllmd.architecture.family import Architecture
from lightllmd.architecture.outline import Outline, StepBytes
from lightllmd.architecture.spec import GroupedQuery
from lightllmd.config.load import load
from lightllmd.config.plan import DeviceFacts, Facts, ModelFacts, Plan
from lightllmd.config.resolve import resolve
from lightllmd.errors import ConfigInvalid, Problem

SMOLLM2 = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 576,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 64,
    "intermediate_size": 1536,
    "vocab_size": 49152,
    "tie_word_embeddings": True,
}
MODEL = ModelFacts(
    path="/models/smollm2",
    format="safetensors",
    model_type="llama",
    hf_config=SMOLLM2,
    files=["/models/smollm2/model.safetensors"],
    weight_elements=134_515_008,
    weight_bytes=269_030_016,
    checkpoint_dtype="bfloat16",
    context_length=8192,
    eos_ids=[2, 7],
    has_tokenizer=True,
    has_chat_template=True,
)
PHI2 = Outline(
    architecture="PhiForCausalLM",
    base="model",
    vocab=51200,
    hidden=2560,
    attention=(GroupedQuery(32, 32, 80, 80**-0.5),) * 32,
    parameters=2_780_000_000,
    constant_bytes=1000,
    step={"bfloat16": StepBytes(5000, 40_000), "float32": StepBytes(9000, 80_000)},
    context=2048,
)
CPU = DeviceFacts("cpu", "Test CPU", 1, 24 * 10**9, 20 * 10**9, ["bfloat16", "float32"], 2)
GPU = DeviceFacts("cuda", "Test GPU", 1, 80 * 10**9, 78 * 10**9, ["bfloat16", "float16", "float32"], 8)
FILE = "/etc/test.toml"


def made(
    flags: dict[str, Any] | None = None, device: DeviceFacts = CPU, model: ModelFacts | None = MODEL, **facts: Any
) -> Plan:
    """`facts` replace facts of the model."""
    config = load(None, {"model_dir": "m"} | (flags or {}))
    changed = msgspec.structs.replace(model, **facts) if model else None
    return resolve(config, Facts(changed, device), FILE)


def refused(
    flags: dict[str, Any] | None = None, device: DeviceFacts = CPU, model: ModelFacts = MODEL, **facts: Any
) -> list[Problem]:
    with pytest.raises(ConfigInvalid) as raised:
        made(flags, device, model, **facts)
    return raised.value.problems


def reason(plan: Plan, name: str) -> str:
    return next(derived.reason for derived in plan.derived if derived.name == name)


def small(free: int) -> DeviceFacts:
    return msgspec.structs.replace(CPU, memory_free=free)


def architecture_of(plan: Plan) -> Architecture:
    """Of a plan of one of our families."""
    assert plan.model is not None
    architecture = plan.model.architecture
    assert isinstance(architecture, Architecture)
    return architecture
