"""The list of weights, and the fold over it that is the budget's row: by scheme, and by rank."""

from __future__ import annotations

import math

import pytest

from lightllmd.architecture.families import FAMILIES, architecture_of
from lightllmd.architecture.family import Architecture
from lightllmd.architecture.schemes import Scheme
from lightllmd.architecture.storage import weight_bytes
from lightllmd.architecture.weight_schemes import WeightSchemes
from lightllmd.architecture.weights import Role

CONFIG = {
    "hidden_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 32,
    "intermediate_size": 512,
    "vocab_size": 1000,
    "attention_bias": True,
    "tie_word_embeddings": False,
    "rope_scaling": {"mrope_section": [4, 6, 6]},
}
LINEARS: set[Role] = {"qkv", "attention_out", "gate_up", "down"}


@pytest.fixture(params=sorted(FAMILIES))
def architecture(request: pytest.FixtureRequest) -> Architecture:
    return architecture_of(request.param, CONFIG)


def test_each_tensor_of_a_checkpoint_is_read_once_and_each_weight_has_a_key(architecture: Architecture) -> None:
    names = [part.name for weight in architecture.weights for part in weight.stored]
    keys = [weight.key for weight in architecture.weights]
    assert len(set(names)) == len(names)
    assert len(set(keys)) == len(keys)


def test_matrices_of_the_layers_may_be_quantised_and_nothing_else(architecture: Architecture) -> None:
    assert {weight.role for weight in architecture.weights if weight.quantisable} == LINEARS
    assert all(len(part.shape) == 2 for weight in architecture.weights if weight.quantisable for part in weight.parts)


def test_on_one_rank_each_parameter_takes_its_item(architecture: Architecture) -> None:
    assert weight_bytes(architecture.weights, 2) == 2 * architecture.parameters


def test_a_scheme_stores_what_may_be_quantised_and_the_rest_stays_dense(architecture: Architecture) -> None:
    bytes_alone = Scheme("w8a16", values="int8", scales="float16")
    matrices = sum(math.prod(part.shape) for one in architecture.weights if one.quantisable for part in one.parts)
    dense = architecture.parameters - matrices
    rows = sum(part.shape[0] for one in architecture.weights if one.quantisable for part in one.parts)
    assert weight_bytes(architecture.weights, 2, WeightSchemes.all(bytes_alone)) == 2 * dense + matrices + 2 * rows
