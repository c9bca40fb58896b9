"""Image models that see several squares of an image, beside transformers: pixels, image embeddings, logits."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import InternVLForConditionalGeneration
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil

from lightllmd.models.vision.layers import normalised
from vision_cases import CASES, TOWER, Case, theirs_of
from vision_models import SIZES, VisionModel, logits, picture, prompt_ids, write_vision_model


def inputs_of(case: Case, images: list[Any]) -> tuple[dict[str, Any], list[torch.Tensor]]:
    """For their model; and the pixels of each image ``[tiles, 3, height, width]``."""
    processor = case.processor(**case.settings)
    if case.processor is GotOcr2ImageProcessorPil:  # as InternVL's processor calls it
        made = processor(images, return_tensors="pt", crop_to_patches=True)
        return {"pixel_values": made["pixel_values"]}, list(made["pixel_values"].split(made["num_patches"].tolist()))
    made = processor(images, return_tensors="pt")
    return {"pixel_values": made["pixel_values"], "image_sizes": made["image_sizes"]}, list(made["pixel_values"])


def features_of(case: Case, theirs: Any, inputs: dict[str, Any], tiles: list[torch.Tensor]) -> list[torch.Tensor]:
    found = theirs.get_image_features(**inputs).pooler_output
    if case.processor is GotOcr2ImageProcessorPil:
        return [one.flatten(0, 1) for one in found.split([len(each) for each in tiles])]
    return list(found)


@pytest.mark.parametrize("kind", CASES)
@torch.inference_mode()
def test_pixels_embeddings_and_logits_are_those_of_transformers(tmp_path: Path, kind: str) -> None:
    case = CASES[kind]
    theirs = theirs_of(case)
    write_vision_model(tmp_path, theirs, case.settings, native=case.native)
    ours = VisionModel.of(tmp_path)
    images = [picture(*size) for size in (*SIZES, (200, 150), (130, 28))]
    inputs, tiles = inputs_of(case, images)
    for one, truth in zip(ours.prepared(images), tiles, strict=True):
        made = normalised(torch.tensor(one.pixels), ours.encoder.spec.norm, torch.float32).permute(0, 3, 1, 2)
        torch.testing.assert_close(made, truth[: len(made)].float(), atol=1e-5, rtol=0)
        assert not truth[len(made) :].any()  # what they pad
        assert one.layout.tiles == len(made)
    truth = features_of(case, theirs, inputs, tiles)
    embeddings = ours.embeddings(images)
    for made, one in zip(embeddings, truth, strict=True):
        torch.testing.assert_close(made[0], one, atol=1e-4, rtol=1e-4)
    geometry = ours.encoder.spec.geometry
    layouts = [geometry.layout(image.width, image.height) for image in images]
    assert [layout.tokens for layout in layouts] == [len(one) for one in truth]
    assert all(layout.tokens <= geometry.most.tokens and layout.tiles <= geometry.most.tiles for layout in layouts)
    if case.model is InternVLForConditionalGeneration:  # their ids are not in config.json
        place = ours.encoder.spec.placeholder
        object.__setattr__(place, "before", (100,))
        object.__setattr__(place, "behind", (101,))
    ids, begins = prompt_ids(ours, images)
    expected = theirs(input_ids=torch.tensor([ids]), **inputs).logits[0]
    torch.testing.assert_close(logits(ours.driver(), ids, begins, embeddings), expected, atol=1e-4, rtol=1e-4)
    alone = ours.embeddings(images[-1:])[0]
    torch.testing.assert_close(alone, embeddings[-1], atol=1e-5, rtol=1e-5)


# --- InternVL as it was published ---------------------------------------------------------------------------------


def chat_names(tensors: dict[str, torch.Tensor], layers: int) -> Iterator[tuple[str, torch.Tensor]]:
    """Of a checkpoint in transformers' form, those of the published one."""
    tower = "vision_tower."
    plain = {
        "embeddings.cls_token": "embeddings.class_embedding",
        "embeddings.position_embeddings": "embeddings.position_embedding",
        "embeddings.patch_embeddings.projection.weight": "embeddings.patch_embedding.weight",
        "embeddings.patch_embeddings.projection.bias": "embeddings.patch_embedding.bias",
    }
    for theirs, ours in plain.items():
        yield f"vision_model.{ours}", tensors[tower + theirs]
    for layer in range(layers):
        old, new = f"{tower}encoder.layer.{layer}.", f"vision_model.encoder.layers.{layer}."
        for kind in ("weight", "bias"):
            parts = [tensors[f"{old}attention.{one}_proj.{kind}"] for one in "qkv"]
            yield f"{new}attn.qkv.{kind}", torch.cat(parts)
            for theirs, ours in (
                ("attention.projection_layer", "attn.proj"),
                ("layernorm_before", "norm1"),
                ("layernorm_after", "norm2"),
                ("mlp.fc1", "mlp.fc1"),
                ("mlp.fc2", "mlp.fc2"),
            ):
                yield f"{new}{ours}.{kind}", tensors[f"{old}{theirs}.{kind}"]
        yield f"{new}ls1", tensors[f"{old}lambda_1"]
        yield f"{new}ls2", tensors[f"{old}lambda_2"]
    for theirs, ours in (("layer_norm", "0"), ("linear_1", "1"), ("linear_2", "3")):
        for kind in ("weight", "bias"):
            yield f"mlp1.{ours}.{kind}", tensors[f"multi_modal_projector.{theirs}.{kind}"]
    yield from ((name, tensor) for name, tensor in tensors.items() if name.startswith("language_model."))


def as_published(folder: Path, max_tiles: int) -> None:
    """The same model as InternVL 2 to 3 were published."""
    config = json.loads((folder / "config.json").read_text())
    tower = config["vision_config"]
    file = folder / "model.safetensors"
    tensors = {name: tensor.contiguous() for name, tensor in chat_names(load_file(file), tower["num_hidden_layers"])}
    save_file(tensors, file)
    written = {
        "model_type": "internvl_chat",
        "architectures": ["InternVLChatModel"],
        "downsample_ratio": 0.5,
        "dynamic_image_size": True,
        "force_image_size": 28,
        "llm_config": {**config["text_config"], "architectures": ["Qwen2ForCausalLM"]},
        "max_dynamic_patch": max_tiles,
        "min_dynamic_patch": 1,
        "ps_version": "v2",
        "select_layer": -1,
        "use_thumbnail": True,
        "vision_config": {
            **{key: tower[key] for key in TOWER},
            "image_size": 28,
            "patch_size": 7,
            "model_type": "intern_vit_6b",
            "norm_type": "layer_norm",
            "qk_normalization": False,
            "qkv_bias": True,
            "layer_norm_eps": 1e-6,
        },
    }
    (folder / "config.json").write_text(json.dumps(written))
    settings = {"crop_size": 28, "size": 28, "do_center_crop": True, "resample": 3}
    settings |= {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))


@torch.inference_mode()
def test_internvl_as_it_was_published_computes_what_its_form_in_transformers_does(tmp_path: Path) -> None:
    case = CASES["internvl"]
    theirs = theirs_of(case)
    write_vision_model(tmp_path, theirs, case.settings)
    as_published(tmp_path, max_tiles=5)
    ours = VisionModel.of(tmp_path)
    images = [picture(*size) for size in (*SIZES, (200, 150))]
    mean, std = ours.encoder.spec.norm.mean, ours.encoder.spec.norm.std
    processor = case.processor(**case.settings, image_mean=mean, image_std=std)
    made = processor(images, return_tensors="pt", crop_to_patches=True)
    found = theirs.get_image_features(pixel_values=made["pixel_values"]).pooler_output
    truth = [one.flatten(0, 1) for one in found.split(made["num_patches"].tolist())]
    embeddings = ours.embeddings(images)
    for mine, one in zip(embeddings, truth, strict=True):
        torch.testing.assert_close(mine[0], one, atol=1e-4, rtol=1e-4)
    place = ours.encoder.spec.placeholder.resolved({"<img>": 100, "<IMG_CONTEXT>": 119, "</img>": 101}.get)
    ids, begins = [1, 5], []
    for rows in embeddings:
        begin, span = place.of(rows.shape[1])
        begins.append(len(ids) + begin)
        ids += [*span, 7]
    expected = theirs(input_ids=torch.tensor([ids]), pixel_values=made["pixel_values"]).logits[0]
    torch.testing.assert_close(logits(ours.driver(), ids, begins, embeddings), expected, atol=1e-4, rtol=1e-4)
