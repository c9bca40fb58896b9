"""What several ranks compute is what one computes."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from gguf import GGMLQuantizationType
from torch import Tensor

from deepspeed_layout import write_deepspeed
from embedding_models import Engine as EmbeddingEngine
from embedding_models import embedding_plan
from gguf_files import WIDE, write_gguf
from lightllmd.architecture.kv_schemes import KV_SCHEMES
from lightllmd.architecture.schemes import SCHEMES, scheme_of
from lightllmd.architecture.weight_schemes import WeightSchemes
from lightllmd.config.plan import Plan
from lightllmd.engine.runners.cpu import CpuRunner
from lightllmd.ipc.messages import PoolingParams
from lightllmd.probe.model import model_facts
from quantised_checkpoints import Case, awq, float_quantized, gptq, int_quantized, planned, write_quantised
from rank_models import OnAll, load_rank, ranks
from scored_models import HEADS, MARKER, scored_plan, write_scored
from scored_models import Engine as ScoreEngine
from tiny_models import BASE, VARIANTS, Driver, plan_for, write_model

IDS = random.Random(1).choices(range(128), k=40)
TOLERANCE = 1e-4
# Sums in another order may round an input, a key or a value to its other neighbour: then logits differ by more from
# that token on. With these weights that happens in one model of fifty.
ROUNDED = 0.1

# A model of each family, with what is hard to share out: 2 KV heads of 3 ranks, 5 of 2, 14 query heads, odd
# vocabularies and intermediate sizes.
UNEVEN: dict[str, Any] = {"num_attention_heads": 14, "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 131}
FIVE: dict[str, Any] = {"num_attention_heads": 10, "num_key_value_heads": 5, "head_dim": 8, "intermediate_size": 101}
FAMILIES = {
    "llama": UNEVEN,
    "llama, biases": VARIANTS["biases"] | FIVE,
    "llama, tied": VARIANTS["tied"] | {"vocab_size": 130},
    "internlm2": UNEVEN | {"model_type": "internlm2", "bias": True},
    "internlm2, five": FIVE | {"model_type": "internlm2", "bias": False},
    "qwen2": VARIANTS["qwen2"] | UNEVEN,
    "qwen3": VARIANTS["qwen3"] | FIVE,
    "olmo2": VARIANTS["olmo2"] | UNEVEN,
    "olmo2, five": VARIANTS["olmo2"] | FIVE,
    "gemma2": VARIANTS["gemma2"] | UNEVEN,
    "gemma3": VARIANTS["gemma3"] | UNEVEN,
}
WEIGHT_SCHEMES = {
    **{name: scheme for name, scheme in SCHEMES.items() if not scheme.dense},
    "w4a16 in groups that are cut": scheme_of("w4a16", 32),
}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": True}
ORDERED = GPTQ | {"desc_act": True}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}
FP8 = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
INT8 = {"num_bits": 8, "type": "int", "symmetric": True, "dynamic": False}
PER_CHANNEL, PER_TENSOR = INT8 | {"strategy": "channel"}, INT8 | {"strategy": "tensor"}
STATIC = {
    "quant_method": "compressed-tensors",
    "format": "int-quantized",
    "config_groups": {"a": {"targets": ["Linear"], "weights": PER_CHANNEL, "input_activations": PER_TENSOR}},
    "ignore": ["lm_head"],
    "quantization_status": "compressed",
}
QUANTISED = {
    "gptq in an order": Case(ORDERED, gptq(shuffled=True)),
    "gptq in an order, with zeros": Case(ORDERED | {"sym": False}, gptq(symmetric=False, shuffled=True)),
    "gptq of 8 bits in an order": Case(ORDERED | {"bits": 8}, gptq(bits=8, shuffled=True)),
    "gptq, the head, too, and a module as it is": Case(
        GPTQ | {"lm_head": True, "dynamic": {r"-:model\.layers\.0\.self_attn\.[qo]_proj": {}}},
        gptq(),
        {"lm_head": gptq(), "layers.0.self_attn.q_proj": None, "layers.0.self_attn.o_proj": None},
        changes={"vocab_size": 136},
    ),
    "awq": Case(AWQ, awq()),
    "int8, static": Case(STATIC, int_quantized(inputs="static")),
    "float8 in blocks": Case(FP8, float_quantized("block", scale="weight_scale_inv")),
}


@pytest.fixture(scope="module")
def groups() -> Iterator[dict[int, OnAll[Any]]]:
    with ExitStack() as held:
        yield {count: held.enter_context(ranks(count)) for count in (2, 3)}


def walk(runner: CpuRunner) -> Tensor:
    """The logits after each of 32 tokens: whole, in blocks, behind a cached prefix and decoded, in one row and with
    others around it."""
    driver = Driver(runner, scattered=True, poisoned=runner.caches[0].scheme.dense)
    logits = driver.logits(driver.row(3, IDS[5:18]), driver.row(0, IDS[:17], prompt_length=29))
    logits += driver.logits(driver.row(3, [7], 1), driver.row(0, IDS[17:29], prompt_length=29))
    for place, token in enumerate(IDS[29:32]):
        logits += driver.logits(driver.row(3, [9], 2 + place), driver.row(0, [token], 1 + place))
    return torch.cat(logits)


def compare(groups: dict[int, OnAll[Any]], plan: Plan, compute: Callable[[CpuRunner], Tensor] = walk) -> list[Tensor]:
    """How far each number of each count of ranks is from that of one."""
    truth = compute(load_rank(None, plan))
    assert truth.std() > 0.05
    differences = []
    for on_all in groups.values():
        first, *others = on_all(lambda group: compute(load_rank(group, plan)))
        for found in others:
            assert torch.equal(found, first)  # every rank samples from the same
        differences.append((first - truth).abs())
    return differences


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_one_rank(family: str, tmp_path: Path, groups: dict[int, OnAll[Any]]) -> None:
    for difference in compare(groups, plan_for(write_model(tmp_path, FAMILIES[family]))):
        assert difference.max() < TOLERANCE


@pytest.mark.parametrize("name", WEIGHT_SCHEMES)
def test_quantised_weights_and_inputs_are_those_of_one_rank(
    name: str, tmp_path: Path, groups: dict[int, OnAll[Any]]
) -> None:
    scheme = WEIGHT_SCHEMES[name]
    plan = plan_for(write_model(tmp_path, FAMILIES["llama, biases"]), schemes=WeightSchemes.all(scheme))
    for difference in compare(groups, plan):
        assert difference.median() < TOLERANCE / 10
        assert difference.max() < (ROUNDED if scheme.inputs else TOLERANCE)


@pytest.mark.parametrize("name", [name for name in KV_SCHEMES if name != "dense"])
def test_a_quantised_kv_cache_holds_what_that_of_one_rank_holds(
    name: str, tmp_path: Path, groups: dict[int, OnAll[Any]]
) -> None:
    for difference in compare(groups, plan_for(write_model(tmp_path, UNEVEN), kv_scheme=name)):
        assert difference.median() < TOLERANCE / 10
        assert difference.max() < ROUNDED


@pytest.mark.parametrize("name", QUANTISED)
def test_quantised_checkpoints_are_cut(name: str, tmp_path: Path, groups: dict[int, OnAll[Any]]) -> None:
    plan = planned(write_quantised(tmp_path, QUANTISED[name])[0])
    for difference in compare(groups, plan):
        assert difference.median() < TOLERANCE / 10
        assert difference.max() < (ROUNDED if "8" in name else TOLERANCE)


@pytest.mark.parametrize("kind", ["F32", "Q4_0", "Q8_0", "Q4_1"])
def test_gguf_files_are_cut(
    kind: str, tmp_path: Path, groups: dict[int, OnAll[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lightllmd.weights.gguf.CHUNK_ELEMENTS", 20_000)  # of a rank's rows, too, there are several
    config = {**BASE, **WIDE, "vocab_size": 131, "num_attention_heads": 6, "head_dim": 64}
    plan = planned(write_gguf(tmp_path / "m.gguf", config, GGMLQuantizationType[kind]))
    for difference in compare(groups, plan):
        assert difference.max() < TOLERANCE


def test_deepspeed_files_are_cut(tmp_path: Path, groups: dict[int, OnAll[Any]]) -> None:
    folder = write_deepspeed(tmp_path, UNEVEN | {"vocab_size": 132}, ranks=2, stages=2, split_vocabulary=True)
    for difference in compare(groups, plan_for(folder)):
        assert difference.max() < TOLERANCE


@pytest.mark.parametrize("name", ["dense", "w4a16", "w8a8"])
def test_random_weights_are_those_of_one_rank(name: str, tmp_path: Path, groups: dict[int, OnAll[Any]]) -> None:
    (tmp_path / "config.json").write_text(json.dumps(BASE | FIVE | {"model_type": "qwen2"}))
    facts = model_facts(str(tmp_path), load_way="DUMMY")
    schemes = WeightSchemes.all(SCHEMES[name])
    plan = msgspec.structs.replace(plan_for(tmp_path, load_way="DUMMY", schemes=schemes), model=facts)
    for difference in compare(groups, plan):
        assert difference.max() < TOLERANCE


@pytest.mark.parametrize("head", HEADS)
def test_scores_are_those_of_one_rank(head: str, tmp_path: Path, groups: dict[int, OnAll[Any]]) -> None:
    plan = scored_plan(write_scored(tmp_path, HEADS[head]))
    prompts = [[*IDS[:19], MARKER], [*IDS[3:9], MARKER, *IDS[20:28], MARKER]]

    def scores(runner: CpuRunner) -> Tensor:
        vectors = ScoreEngine(plan, runner).ask(prompts)
        return torch.tensor([value for of in vectors for vector in of for value in vector])

    for difference in compare(groups, plan, scores):
        assert difference.max() < TOLERANCE


@pytest.mark.parametrize("family", ["qwen3", "olmo2"])
def test_embeddings_are_those_of_one_rank(family: str, tmp_path: Path, groups: dict[int, OnAll[Any]]) -> None:
    plan = embedding_plan(write_model(tmp_path, FAMILIES[family]))

    def vectors(runner: CpuRunner) -> Tensor:
        return torch.cat(EmbeddingEngine(plan, runner).ask([IDS[:17], IDS[5:9]], PoolingParams(mean=True, unit=True)))

    for difference in compare(groups, plan, vectors):
        assert difference.max() < TOLERANCE
