"""Random weights: the architecture's shapes, the same numbers at every start, and a decoder that runs on them."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from lightllmd.architecture.families import FAMILIES, architecture_of
from lightllmd.engine.runners.cpu import CpuRunner
from lightllmd.probe.model import model_facts
from lightllmd.weights import dummy
from tiny_models import BASE, IN_GRIDS, VARIANTS, Driver, plan_for

CPU = torch.device("cpu")


def drawn(config: dict, dtype: torch.dtype = torch.float32) -> tuple[dict, list[tuple[int, int]]]:
    weights = architecture_of(config["model_type"], config).weights
    seen: list[tuple[int, int]] = []
    stream = dummy.stream(weights, dtype, CPU, lambda *at: seen.append(at))
    return {weight.key: (tensor, bias) for weight, tensor, bias in stream}, seen


def test_every_start_draws_the_same_numbers_whatever_the_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    (first, seen), (second, _) = drawn(BASE), drawn(BASE)
    assert all(torch.equal(first[key][0], second[key][0]) for key in first)
    held = sum(tensor.nbytes for tensor, _ in first.values())
    assert seen[-1] == (held, held)
    assert seen == sorted(seen)
    monkeypatch.setattr(dummy, "CHUNK_ELEMENTS", 1024)
    _, finer = drawn(BASE)
    assert len(finer) > len(seen)
    assert finer[-1] == (held, held)


def test_matrices_are_around_0_and_norms_around_1_and_no_two_are_alike() -> None:
    tensors, _ = drawn(BASE | VARIANTS["biases"])
    assert abs(tensors["0.qkv"][0].std() - 0.02) < 1e-3
    assert abs(tensors["0.qkv"][1]).max() < 0.1
    assert abs(tensors["norm"][0] - 1).max() < 0.1
    assert not torch.equal(tensors["0.qkv"][0], tensors["1.qkv"][0])
    q, k, _ = tensors["0.qkv"][0].split([64, 32, 32])
    assert not torch.equal(q[:32], k)


@pytest.mark.parametrize("model_type", sorted(FAMILIES.keys() - {"internlm2", *IN_GRIDS}))  # which transformers has not
@pytest.mark.parametrize("variant", ["plain", "biases", "tied", "head_dim given", "three heads"])
def test_the_config_alone_says_how_many_parameters_there_are(model_type: str, variant: str) -> None:
    config = {**BASE, "head_dim": 16, **VARIANTS[variant], "model_type": model_type}
    theirs = config
    if model_type == "internlm2":  # of which transformers has no model: a Llama but for how its weights are cut
        theirs = config | {"model_type": "llama", "attention_bias": False, "mlp_bias": False}
    with torch.device("meta"):
        truth = AutoModelForCausalLM.from_config(AutoConfig.for_model(**theirs))
    assert architecture_of(model_type, config).parameters == truth.num_parameters()


@pytest.mark.parametrize("model_type", sorted(FAMILIES))
def test_a_directory_with_a_config_alone_computes(tmp_path: Path, model_type: str) -> None:
    turned = {"rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]}, "head_dim": 16}
    grids = turned if model_type in IN_GRIDS else {}
    (tmp_path / "config.json").write_text(json.dumps(BASE | {"model_type": model_type} | grids))
    facts = model_facts(str(tmp_path), load_way="DUMMY")
    runner = CpuRunner()
    runner.load(msgspec.structs.replace(plan_for(tmp_path, load_way="DUMMY"), model=facts), lambda done, total: None)
    driver = Driver(runner)
    logits = driver.logits(driver.row(0, [5, 77, 3]))[0]
    assert logits.shape == (3, 128)
    assert torch.isfinite(logits).all()
