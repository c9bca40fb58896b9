"""Qwen2-VL, 2.5 and 3 beside transformers: pixels, image embeddings, and what their configs may not say."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch

from lightllmd.architecture.vision import vision_of
from lightllmd.architecture.vision.grid import GridGeometry
from lightllmd.errors import ConfigInvalid, InvalidRequest
from lightllmd.models.vision.grids import Grids
from qwen_vl_models import END, IMAGE, PROCESSORS, START, VISION, config_of, processor_of, write_qwen_vl
from vision_models import VisionModel, change, picture

# Beyond those of others: as many pixels as there may be at least and at most, and grids of one row or column.
SIZES = [(64, 64), (90, 41), (33, 101), (5, 7), (400, 300), (300, 12), (12, 300), (28, 28), (64, 64)]


@pytest.mark.parametrize("native", [False, True])
@pytest.mark.parametrize("kind", VISION)
@torch.inference_mode()
def test_pixels_and_embeddings_are_those_of_transformers(tmp_path: Path, kind: str, native: bool) -> None:
    theirs = write_qwen_vl(tmp_path, kind, native=native)
    ours = VisionModel.of(tmp_path)
    images = [picture(*size) for size in SIZES]
    truth = processor_of(kind)(images, return_tensors="pt")
    grids, tower = truth["image_grid_thw"], ours.encoder._tower
    prepared = ours.prepared(images)
    assert [one.layout.grid for one in prepared] == [
        (1, int(rows) // 2, int(columns) // 2) for _, rows, columns in grids
    ]
    assert isinstance(tower, Grids)
    for one, patches in zip(prepared, truth["pixel_values"].split(grids.prod(1).tolist()), strict=True):
        torch.testing.assert_close(tower._patches(one), patches, atol=1e-5, rtol=0)
    out = theirs.model.get_image_features(truth["pixel_values"], grids)
    layers = [out.pooler_output, *(getattr(out, "deepstack_features", None) or [])]
    assert ours.encoder.spec.deepstack == len(layers) - 1
    for number, made in enumerate(ours.embeddings(images)):
        wanted = torch.stack([layer[number] for layer in layers])
        assert wanted.abs().max() > 0.1
        torch.testing.assert_close(made, wanted, atol=1e-4, rtol=1e-4)


def test_a_config_of_the_hub_has_its_decoders_entries_beside_the_towers(tmp_path: Path) -> None:
    write_qwen_vl(tmp_path, "qwen2_vl")
    spread = config_of("qwen2_vl")["text_config"]
    rope = {
        "rope_parameters": None,
        "rope_theta": 10000.0,
        "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]},
    }
    change(tmp_path, text_config=None, **{**spread, **rope}, tie_word_embeddings=False)
    spec = VisionModel.of(tmp_path).encoder.spec
    assert (spec.out_hidden, spec.positions) == (64, "grid")
    assert (spec.placeholder.image, spec.placeholder.before, spec.placeholder.behind) == (IMAGE, (START,), (END,))


def test_no_image_has_more_tokens_than_the_most_and_any_may_be_a_strip() -> None:
    draw = random.Random(0)
    for _ in range(300):
        least = draw.choice([1, 800, 5000, 60000])
        geometry = GridGeometry(14, 2, least, max(least, draw.choice([784, 9000, 100000])), 3)
        for _ in range(20):
            width = int(10 ** draw.uniform(0, 4))
            height = max(1, min(int(10 ** draw.uniform(0, 4)), width * 200, 10000))
            if width / height <= 200:
                assert geometry.layout(width, height).tokens <= geometry.most.tokens


def test_a_strip_is_refused_and_a_large_image_has_its_tokens_at_once() -> None:
    geometry = GridGeometry(14, 2, 3136, 28 * 28 * 1280, 3)
    with pytest.raises(InvalidRequest, match=r"20000 x 10 pixels: its longer side is 2000 times .* at most 200"):
        geometry.layout(20000, 10)
    assert geometry.layout(10**7, 10**7).tokens <= 1280


@pytest.mark.parametrize(
    ("kind", "vision", "processor", "words"),
    [
        ("qwen2_vl", {"num_heads": 3}, {}, "embed_dim 32 and num_heads 3 make no heads of a multiple of 4"),
        ("qwen2_vl", {"hidden_size": 48}, {}, "embeddings of 48 elements, the decoder takes 64"),
        ("qwen2_vl", {"in_channels": 1}, {}, "in_channels other than 3 is not available yet"),
        ("qwen2_vl", {"patch_size": 0}, {}, "patch_size is 0"),
        ("qwen2_vl", {}, {"patch_size": 16}, "patch_size of the image processor is 16, the tower's is 14"),
        ("qwen2_vl", {}, {"min_pixels": 9**6}, "min_pixels 531441 of the image processor is above its max_pixels"),
        ("qwen2_vl", {}, {"max_pixels": "x"}, "max_pixels of the image processor is"),
        ("qwen2_vl", {}, {"do_resize": False}, "do_resize = false of an image processor is not available yet"),
        ("qwen2_5_vl", {"window_size": 8}, {}, "window_size 8 is smaller than what becomes a token"),
        ("qwen2_5_vl", {"fullatt_block_indexes": [3]}, {}, r"fullatt_block_indexes is \[3\], layers from 0 to 2"),
        ("qwen3_vl", {"num_position_embeddings": 15}, {}, "num_position_embeddings 15 is no square number"),
        ("qwen3_vl", {"deepstack_visual_indexes": [1, 0]}, {}, "deepstack_visual_indexes .* are not in order"),
        ("qwen3_vl", {"deepstack_visual_indexes": "x"}, {}, "deepstack_visual_indexes is"),
    ],
)
def test_what_a_config_cannot_ask_for_is_refused_by_name(
    kind: str, vision: dict[str, Any], processor: dict[str, Any], words: str
) -> None:
    config = config_of(kind)
    config["vision_config"] = {**config["vision_config"], **vision}
    with pytest.raises(ConfigInvalid, match=words):
        vision_of(config, {**PROCESSORS[kind], **processor})


def test_experts_are_refused_by_name() -> None:
    with pytest.raises(ConfigInvalid, match=r"'qwen3_vl_moe' are not available yet: .*mixture of experts"):
        vision_of({"model_type": "qwen3_vl_moe"})
