"""The models of the simulation, and the configuration that names them."""

from __future__ import annotations

from functools import cache
from typing import Any

import msgspec

from lightllmd.architecture.families import architecture_of
from lightllmd.config.load import load
from lightllmd.config.parameters import Config
from lightllmd.config.plan import ModelFacts

GOOD = ("first", "second", "large")  # "large" does not fit beside another
BAD = ("broken", "crashing", "hanging", "untokenized")  # found out by starting it
UNPLANNABLE = ("huge", "missing")
SHAPE = {
    "model_type": "llama",
    "hidden_size": 1024,
    "intermediate_size": 2048,
    "num_attention_heads": 16,
    "num_hidden_layers": 8,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "vocab_size": 32000,
    "max_position_embeddings": 4096,
}
_DEEP = {"hidden_size": 4096, "intermediate_size": 6144, "num_key_value_heads": 2}
_SHAPES = {  # of about 6 and 40 GB
    "/models/large": SHAPE | _DEEP | {"num_hidden_layers": 32},
    "/models/huge": SHAPE | _DEEP | {"num_hidden_layers": 234},
}
_FLAGS = {
    "model_dir": "/models/first",
    "load_way": "DUMMY",
    "max_total_token_num": 6144,
    "engine.cuda_graphs": False,
    "running_max_req_size": 16,
    "max_req_total_len": 1024,
    "max_req_input_len": 512,
    "batch_max_tokens": 2048,
    "http.workers": 2,
    "supervisor.hang_timeout": 3,
    "supervisor.boot_timeout": 6,
    "supervisor.load_timeout": 6,
    "supervisor.warmup_timeout": 6,
    "supervisor.abort_grace": 1,
    "supervisor.stop_timeout": 4,
    "supervisor.drain_timeout": 20,
    "supervisor.memory_timeout": 5,
    "supervisor.backoff_max": 4,
    "supervisor.start_limit_burst": 3,
    "supervisor.retry_interval": 8,
    "supervisor.health_interval": 5,
    "supervisor.health_timeout": 5,
}


def configuration(**flags: Any) -> Config:
    config = load(None, _FLAGS | {key.replace("__", "."): value for key, value in flags.items()})
    named = {name: {"model_dir": f"/models/{name}"} for name in (*GOOD, *BAD, *UNPLANNABLE)}
    return msgspec.structs.replace(config, models=named)


@cache
def model_facts(path: str) -> ModelFacts:
    """What the probe would read in its folder."""
    shape = _SHAPES.get(path, SHAPE)
    size = architecture_of("llama", shape).parameters
    return ModelFacts(path, "dummy", "llama", shape, [], size, 0, "bfloat16", 4096, [2], False, False)
