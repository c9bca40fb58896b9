"""What is said of image models: what is refused, and by which name; layouts, prefixes, loading."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from lightllmd.architecture.families import architecture_of
from lightllmd.architecture.vision import text_config, vision_of
from lightllmd.architecture.vision.placeholder import Placeholder
from lightllmd.architecture.weight_schemes import ALL_DENSE
from lightllmd.errors import ConfigInvalid, WeightsInvalid
from lightllmd.probe.model import model_facts
from lightllmd.visual.pixels import prepare
from model_folders import TOKENIZER
from vision_cases import CASES, CLIP, KINDS, PADDING, model_of, theirs_of
from vision_models import CPU, TEXT, VisionModel, change, picture, write_vision_model

LLAVA: dict[str, Any] = {"model_type": "llava", "vision_config": CLIP, "text_config": TEXT}
INTERN = {"model_type": "intern_vit_6b", "image_size": 448, "num_hidden_layers": 2, "norm_type": "layer_norm"}
CHAT: dict[str, Any] = {
    "model_type": "internvl_chat",
    "ps_version": "v2",
    "dynamic_image_size": True,
    "use_thumbnail": True,
    "vision_config": INTERN,
    "llm_config": TEXT,
}
NEXT = {**LLAVA, "model_type": "llava_next", "vision_config": {**CLIP, "image_size": 28}}
SQUARE = {"size": {"height": 30, "width": 30}, "do_center_crop": False}


@pytest.mark.parametrize(
    ("config", "settings", "said"),
    [
        ({**LLAVA, "vision_config": {**CLIP, "model_type": "pixtral"}}, {}, '"pixtral" are not available yet'),
        ({**LLAVA, "vision_feature_layer": 4}, {}, "vision_feature_layer is 4, the tower's hidden states are 0 to 3"),
        ({**LLAVA, "vision_feature_layer": []}, {}, "vision_feature_layer is empty"),
        ({**LLAVA, "vision_feature_select_strategy": "cls"}, {}, "vision_feature_select_strategy"),
        ({**LLAVA, "vision_config": {**CLIP, "image_size": [28, 56]}}, {}, "which is no square"),
        ({**LLAVA, "vision_config": {**CLIP, "patch_size": 0}}, {}, "patch_size is 0, an integer from 1"),
        ({**LLAVA, "vision_config": {**CLIP, "hidden_size": 33}}, {}, "no multiple of num_attention_heads"),
        ({**LLAVA, "vision_config": "CLIP"}, {}, "vision_config"),
        ({**LLAVA, "projector_hidden_act": "mish"}, {}, 'projector_hidden_act "mish" is not available yet'),
        ({**LLAVA, "image_token_index": -1}, {}, "image_token_index is -1"),
        (LLAVA, {"size": {"height": 30, "width": 40}, "do_center_crop": False}, "makes images of 40x30 pixels"),
        (LLAVA, {"size": {"shortest_edge": 30}, "do_center_crop": False}, "makes images of their own shapes"),
        (LLAVA, {"do_resize": False}, "do_resize = false"),
        (LLAVA, {**SQUARE, "resample": 9}, "resample is 9"),
        (LLAVA, {**SQUARE, "image_std": [0, 1, 1]}, "image_std"),
        (LLAVA, {**SQUARE, "image_mean": [0.5]}, "image_mean"),
        (LLAVA, {**SQUARE, "rescale_factor": -1}, "rescale_factor is -1"),
        ({**NEXT, "image_grid_pinpoints": [[28, 30]]}, {}, "has 28x30, up to 1024 whole squares of 28 pixels"),
        ({**NEXT, "image_grid_pinpoints": []}, {}, "image_grid_pinpoints is"),
        ({**NEXT, "image_grid_pinpoints": [[28, 56]], "vision_feature_select_strategy": "full"}, {}, "17 features of"),
        ({**NEXT, "model_type": "llava_onevision", "vision_aspect_ratio": "pad"}, {}, 'vision_aspect_ratio "pad"'),
        ({**CHAT, "ps_version": "v1"}, {}, 'ps_version "v1"'),
        ({**CHAT, "force_image_size": 224}, {}, "force_image_size 224"),
        ({**CHAT, "downsample_ratio": 0.3}, {}, "downsample_ratio 0.3"),
        ({**CHAT, "max_dynamic_patch": 1000}, {}, "max_dynamic_patch is 1000"),
        ({**CHAT, "min_dynamic_patch": 13}, {}, "min_dynamic_patch 13 is above max_dynamic_patch 12"),
    ],
)
def test_what_is_not_built_is_refused_by_name(config: dict[str, Any], settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigInvalid) as refused:
        vision_of(config, settings or None)
    assert said in str(refused.value)


def test_a_published_config_that_leaves_out_what_its_classes_have() -> None:
    """As llava-1.5-7b's: of its decoder and tower it says what is unlike theirs."""
    config = {
        "model_type": "llava",
        "image_token_index": 32000,
        "text_config": {"model_type": "llama", "max_position_embeddings": 4096, "vocab_size": 32064},
        "vision_config": {
            "model_type": "clip_vision_model",
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_attention_heads": 16,
            "num_hidden_layers": 24,
            "image_size": 336,
            "patch_size": 14,
        },
    }
    spec = vision_of(config)
    assert spec is not None
    assert (spec.geometry.layout(640, 480).tokens, spec.out_hidden, spec.tower.layers) == (576, 4096, 23)
    assert architecture_of("llava", config).parameters == 6_738_415_616 + 2 * 64 * 4096  # Vicuna's, 64 more tokens
    assert text_config(config)["num_hidden_layers"] == 32


def test_a_text_model_is_no_image_model() -> None:
    assert vision_of({**TEXT, "model_type": "llama"}) is None
    assert vision_of({"model_type": ["llava"]}) is None


def test_tokens_of_internvl_are_those_of_its_tiles() -> None:
    spec = vision_of(CHAT)
    assert spec is not None
    found = {size: spec.geometry.layout(*size).tokens for size in ((448, 448), (896, 448), (4000, 10), (1000, 1000))}
    assert found == {(448, 448): 256, (896, 448): 3 * 256, (4000, 10): 13 * 256, (1000, 1000): 10 * 256}
    fixed = vision_of({**CHAT, "dynamic_image_size": False})
    assert fixed is not None
    assert fixed.geometry.layout(4000, 10).tokens == 256


def test_tags_and_ids_of_a_placeholder() -> None:
    place = Placeholder("<image>", "<ctx>", ("<img>",), (7,), also=("<image> ",))
    assert place.tags == ("<image> ", "<image>")
    assert place.resolved({"<ctx>": 5, "<img>": 6}.get).of(3) == (1, [6, 5, 5, 5, 7])
    with pytest.raises(ConfigInvalid, match="the tokenizer has none"):
        place.resolved({"<img>": 6}.get)


@pytest.mark.parametrize("size", [(100_000, 1), (1, 100_000), (30_000, 150)])
@pytest.mark.parametrize("settings", [PADDING, {}])
def test_long_images_are_prepared_without_what_their_squares_would_take(
    size: tuple[int, int], settings: dict[str, Any]
) -> None:
    spec = vision_of(LLAVA, settings or None)
    assert spec is not None
    made = prepare(spec, picture(*size)).pixels
    assert (made.shape, made.dtype) == ((1, 30, 30, 3), np.uint8)


# --- checkpoints --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_vision_model(tmp_path_factory.mktemp("llava"), model_of("CLIP"), KINDS["CLIP"][1])


def changed(folder: Path, llava: Path, change_: Any) -> Path:
    """A copy with other tensors."""
    for path in llava.iterdir():
        if path.suffix == ".json":
            (folder / path.name).write_bytes(path.read_bytes())
    tensors = load_file(llava / "model.safetensors")
    change_(tensors)
    save_file(tensors, folder / "model.safetensors")
    return folder


def tower_name(tensors: dict[str, torch.Tensor]) -> str:
    return next(name for name in tensors if name.endswith("embeddings.class_embedding"))


def test_a_tower_without_a_tensor_is_refused_by_its_name(tmp_path: Path, llava: Path) -> None:
    folder = changed(tmp_path, llava, lambda tensors: tensors.pop(tower_name(tensors)))
    with pytest.raises(WeightsInvalid, match=r"embeddings.class_embedding is missing; expected shape \[32\]"):
        model_facts(str(folder))


def test_a_tower_with_a_tensor_too_many_is_refused_by_its_name(tmp_path: Path, llava: Path) -> None:
    def more(tensors: dict[str, torch.Tensor]) -> None:
        tensors["multi_modal_projector.linear_3.weight"] = torch.zeros(2, 2)

    with pytest.raises(WeightsInvalid, match=r"linear_3.weight \[2, 2\] is in the checkpoint, but the config has no"):
        model_facts(str(changed(tmp_path, llava, more)))


def test_a_head_of_its_own_counts_where_only_the_decoder_says_that_it_is_tied(tmp_path: Path, llava: Path) -> None:
    folder = changed(tmp_path, llava, lambda tensors: None)
    change(folder, text_config={**TEXT, "tie_word_embeddings": True}, tie_word_embeddings=False)
    assert model_facts(str(folder)).architecture.spec.tied is False
    change(folder, tie_word_embeddings=True)
    assert model_facts(str(folder)).architecture.spec.tied is True


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_tower_computes_in_the_data_type_whatever_the_mode(llava: Path, dtype: torch.dtype) -> None:
    ours, truth = VisionModel.of(llava, dtype), VisionModel.of(llava)
    images = [picture(50, 40), picture(33, 66)]
    for one, other in zip(ours.embeddings(images), truth.embeddings(images), strict=True):
        assert one.dtype == dtype
        torch.testing.assert_close(one.float(), other, atol=0.1, rtol=0.1)
    assert all(ALL_DENSE.of(weight).dense and not weight.quantisable for weight in ours.encoder.spec.weights)


@pytest.mark.parametrize("kind", ["llava_next", "llava_onevision", "internvl"])
def test_a_directory_with_a_config_alone_has_an_encoder_of_random_weights(tmp_path: Path, kind: str) -> None:
    theirs_of(CASES[kind]).config.save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(CASES[kind].settings))
    (tmp_path / "tokenizer.json").write_text(json.dumps(TOKENIZER))
    ours = VisionModel.of(tmp_path, load_way="DUMMY")
    image = picture(70, 40)
    (found,) = ours.embeddings([image])
    layout = ours.encoder.spec.geometry.layout(70, 40)
    assert found.shape == (1, layout.tokens, TEXT["hidden_size"])
    assert found.isfinite().all()
    assert found.device == CPU
    again = VisionModel.of(tmp_path, load_way="DUMMY").embeddings([image])[0]
    assert torch.equal(found, again)


def test_megatrons_checkpoints_of_image_models_are_refused(llava: Path) -> None:
    with pytest.raises(ConfigInvalid, match='load_way = "DS" is not available for models with vision'):
        model_facts(str(llava), load_way="DS")


def test_a_vision_tower_in_a_gguf_file_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "mmproj.gguf"
    writer = gguf.GGUFWriter(path, "clip")
    writer.add_tensor("v.class_embd", np.zeros(8, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(WeightsInvalid, match=r"\(mmproj\); vision from GGUF files is not available yet"):
        model_facts(str(path))
