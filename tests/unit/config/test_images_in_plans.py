"""What a plan says of images: who serves them, what the visual worker takes and where, how many are kept."""

from __future__ import annotations

import re
from typing import Any

import msgspec
import pytest

from lightllmd.architecture.vision.unbuilt import unbuilt
from lightllmd.config.load import load
from lightllmd.config.plan import VISION_ROWS, Facts, Other, Plan
from lightllmd.config.report import report
from lightllmd.config.resolve import resolve
from resolved import CPU, MODEL, SMOLLM2, made, reason, refused, small
from several_devices import GB, gpus

TOWER = {
    "model_type": "clip_vision_model",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
}
LLAVA = {
    "model_type": "llava",
    "text_config": SMOLLM2,
    "vision_config": TOWER,
    "image_token_index": 49151,
    "projector_hidden_act": "gelu",
}
SEEING = msgspec.structs.replace(
    MODEL,
    model_type="llava",
    hf_config=LLAVA,
    preprocessor={"size": 336, "crop_size": 336},
    path="/models/llava",
    sees=True,
)
IMAGE = 576 * 576 * 2  # bytes of an image's embeddings: as many tokens as the model's hidden size
ON = {"enable_multimodal": True}


def seeing(flags: dict[str, Any] | None = None, device: Any = CPU) -> Plan:
    return made(flags, device, SEEING)


def test_a_model_that_sees_serves_its_text_unless_images_are_switched_on() -> None:
    plans = [seeing({"enable_multimodal": value}) for value in (False, True, "auto")]
    assert [plan.vision is not None for plan in plans] == [False, True, True]
    off, on, auto = plans
    assert off.vocab_size == on.vocab_size == SMOLLM2["vocab_size"]
    assert on.vision == auto.vision
    assert made({"enable_multimodal": "auto"}).vision is None


def test_images_of_a_model_of_text_are_refused_by_name() -> None:
    (problem,) = refused(ON)
    assert problem.key == "enable_multimodal"
    assert problem.message == "enable_multimodal = true, but /models/smollm2 is a model of text (llama)"


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"model_type": "qwen", "visual": {"width": 1664}}, 'of type "qwen" are not available yet .*resampler'),
        ({"model_type": "phi3_v"}, 'of type "phi3_v" are not available yet .*tiles'),
        ({"model_type": "phi4mm"}, 'of type "phi4mm" are not available yet .*low-rank'),
        ({"model_type": "phi4_multimodal"}, "low-rank parts for images"),
        (
            {"model_type": "internlm", "architectures": ["InternLMXComposer2ForCausalLM"]},
            'of type "internlmxcomposer2" are not available yet .*low-rank',
        ),
        ({"model_type": "mllama", "vision_config": {"image_size": 448}}, 'of type "mllama" are not available yet'),
    ],
)
def test_models_whose_images_are_not_built_are_refused_by_name(config: dict[str, Any], words: str) -> None:
    assert re.search(words, unbuilt(config) or "")
    model = msgspec.structs.replace(MODEL, hf_config={**MODEL.hf_config, "visual": {"width": 1664}})
    (problem,) = refused(ON, model=model)
    assert problem.key == "enable_multimodal"
    assert "not available yet" in problem.message
    assert "enable_multimodal = false serves its text" in problem.message


@pytest.mark.parametrize("config", [SMOLLM2, LLAVA, {"model_type": "qwen"}])
def test_models_of_text_and_those_that_see_are_not_unbuilt(config: dict[str, Any]) -> None:
    assert unbuilt({"model_type": "llama", **config}) is None


def test_the_visual_worker_is_in_the_budget_and_what_it_takes_is_no_slot() -> None:
    off, on = seeing({"max_total_token_num": 5000}), seeing({"max_total_token_num": 5000} | ON)
    assert on.vision is not None
    taken = {row.name: row.bytes for row in on.vision.rows}
    assert tuple(taken) == VISION_ROWS
    assert taken["vision weights"] == 2 * sum(weight.elements for weight in SEEING.vision.weights)  # type: ignore[union-attr]
    own = on.budget.row("image embeddings")
    assert on.budget.vision == on.budget.needed - off.budget.needed - own == sum(taken.values())
    assert on.budget.taken == off.budget.taken + own
    room = small(4 * GB)
    slots = [seeing(flags, room).max_total_token_num for flags in ({}, ON)]
    assert 0 < slots[1] < slots[0]


def test_more_images_at_a_time_take_more_memory() -> None:
    rows = [seeing(ON | {"images.batch": batch}).budget.row("vision activations") for batch in (1, 8, 64)]
    assert rows == sorted(set(rows))


def test_the_report_says_what_an_image_is_and_how_many_are_kept() -> None:
    plan = seeing(ON)
    assert plan.vision is not None
    assert (plan.vision.most_tokens, plan.vision.token_bytes, plan.vision.capacity) == (576, 576 * 2, 200)
    assert plan.vision.kept_bytes == 200 * IMAGE
    assert reason(plan, "images") == (
        "llava: up to 576 tokens and 664 kB an image, encoded on the CPU; 200 are kept, in up to 133 MB of host memory"
    )
    assert "vision weights" in report(plan)


def test_more_images_than_host_memory_has_room_for_are_refused_if_written_and_fewer_are_kept_if_not() -> None:
    device = small(4 * GB)
    fit = 2 * GB // IMAGE
    (problem,) = refused(ON | {"cache_capacity": fit + 1}, device, SEEING)
    assert problem.key == "cache_capacity"
    assert f"at most cache_capacity = {fit} fits" in problem.message
    assert seeing(ON | {"cache_capacity": fit}, device).vision.capacity == fit  # type: ignore[union-attr]
    host = msgspec.structs.replace(gpus(80), host_free=100 * IMAGE)
    fewer = seeing(ON, host)
    assert fewer.vision is not None
    assert fewer.vision.capacity == 50
    assert "which is less than 200" in reason(fewer, "cache_capacity")


@pytest.mark.parametrize(("ranks", "replicas"), [(1, 1), (2, 1), (1, 2), (2, 2)])
def test_the_visual_worker_is_on_the_first_device(ranks: int, replicas: int) -> None:
    heads = {"num_attention_heads": 8, "num_key_value_heads": 2, "hidden_size": 512}
    model = msgspec.structs.replace(SEEING, hf_config=LLAVA | {"text_config": SMOLLM2 | heads})
    flags = ON | {"tp": ranks, "engine.replicas": replicas}
    plan = made(flags, gpus(*[80] * (ranks * replicas)), model)
    assert plan.vision is not None
    assert plan.vision.devices == [0]
    budgets = plan.device_budgets or [plan.budget]
    assert [index for index, budget in enumerate(budgets) if budget.vision] == [0]


def test_replicas_on_a_cpu_share_a_visual_worker() -> None:
    one, two = (seeing(ON | {"engine.replicas": count}).budget.vision for count in (1, 2))
    assert two == one


def test_images_that_are_encoded_on_the_cpu_take_nothing_of_a_gpu() -> None:
    plan = seeing(ON | {"images.device": "cpu"}, gpus(80))
    assert plan.vision is not None
    assert (plan.vision.devices, plan.budget.vision) == ([], 0)
    assert plan.vision.rows


def test_room_for_a_model_that_sees_has_room_for_its_visual_worker() -> None:
    def reserve(model: Any, **params: Any) -> int:
        config = load(None, {"model_dir": "m", "supervisor.swap": "beside", "max_total_token_num": 5000})
        other = Other(msgspec.structs.replace(config.params, **params), model)
        return resolve(config, Facts(MODEL, CPU, {"other": other})).budget.reserve

    plan = seeing(ON)
    own = 3072 * 576 * 2  # of the other's steps
    assert reserve(SEEING, enable_multimodal=True) - reserve(SEEING) == plan.budget.vision + own > own > 0


def test_a_step_of_images_is_in_the_engines_budget() -> None:
    plan = seeing(ON)
    row = plan.budget.row("image embeddings")
    assert plan.vision is not None
    assert row == plan.batch_max_tokens * plan.vision.token_bytes
    assert seeing({"enable_multimodal": False}).budget.row("image embeddings") == 0
