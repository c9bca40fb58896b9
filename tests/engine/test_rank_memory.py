"""What the budget plans for a rank's weights and KV cache is what the rank then holds."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lightllmd.architecture.families import architecture_of
from lightllmd.architecture.kv_layout import KvLayout
from lightllmd.architecture.ranks import Rank, architecture_of_rank
from lightllmd.architecture.schemes import scheme_of
from lightllmd.architecture.weight_schemes import ALL_DENSE, WeightSchemes
from lightllmd.config.weight_budget import weights_row
from rank_models import OnAll, load_rank, ranks
from tiny_models import BASE, VARIANTS, plan_for, write_model

# Three KV heads of two ranks, and matrices that fill blocks of 64 rows.
UNEVEN: dict[str, Any] = {
    "hidden_size": 256,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 64,
    "intermediate_size": 640,
    "vocab_size": 1024,
}
SLOTS = 48


@pytest.fixture(scope="module")
def pair() -> Iterator[OnAll[Any]]:
    with ranks(2) as on_all:
        yield on_all


@pytest.mark.parametrize(
    ("family", "scheme"),
    [("tied", "dense"), ("qwen3", "w8a16"), ("llama", "w4a16")],
)
def test_a_rank_holds_the_bytes_that_are_planned_for_it(
    family: str, scheme: str, tmp_path: Path, pair: OnAll[Any]
) -> None:
    written = VARIANTS.get(family, {}) | UNEVEN
    schemes = ALL_DENSE if scheme == "dense" else WeightSchemes.all(scheme_of(scheme, 32))
    model = write_model(tmp_path, written)
    plan = plan_for(model, slots=SLOTS, schemes=schemes)
    runners = pair(lambda group: load_rank(group, plan))
    kind = str(written.get("model_type", "llama"))
    whole = architecture_of(kind, BASE | written)
    for index, runner in enumerate(runners):
        rank = architecture_of_rank(whole, schemes, Rank(index, 2))
        tensors = runner.decoder.tensors()
        held = sum(tensor.nbytes for tensor in tensors.values())
        planned = weights_row(rank, "float32", schemes, on_cpu=True).bytes  # a tied head's second form is no tensor
        assert held == pytest.approx(planned, rel=0.02)
        slot_bytes = KvLayout.of(rank.spec.attention, "float32").slot_bytes
        layers = [tensor for cache in runner.caches for tensor in vars(cache).values() if hasattr(tensor, "nbytes")]
        assert sum(tensor.nbytes for tensor in layers) == SLOTS * slot_bytes
