"""LLaVA 1.5 beside transformers: pixels, image embeddings, logits of the whole model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlavaConfig, LlavaForConditionalGeneration
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from lightllmd.models.vision.layers import normalised
from vision_models import SIZES, TEXT, VisionModel, logits, picture, prompt_ids, write_vision_model

CLIP = {
    "model_type": "clip_vision_model",
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 30,  # no multiple of the patch: what is left over is not seen
    "patch_size": 7,
    "projection_dim": 16,
}
SIGLIP = {**CLIP, "model_type": "siglip_vision_model", "hidden_act": "gelu_pytorch_tanh", "vision_use_head": True}
CLIP_PROCESSOR = {
    "image_processor_type": "CLIPImageProcessor",
    "size": {"shortest_edge": 30},
    "crop_size": {"height": 30, "width": 30},
}
SIGLIP_PROCESSOR = {"image_processor_type": "SiglipImageProcessor", "size": {"height": 30, "width": 30}}
PADDING = {**CLIP_PROCESSOR, "image_processor_type": "LlavaImageProcessor", "do_pad": True}
PROCESSORS = {
    "CLIPImageProcessor": CLIPImageProcessorPil,
    "SiglipImageProcessor": SiglipImageProcessorPil,
    "LlavaImageProcessor": LlavaImageProcessorPil,
}
KINDS: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any], bool]] = {
    "CLIP": ({"vision_config": CLIP}, CLIP_PROCESSOR, TEXT, False),
    "CLIP, all features of three layers, named as transformers 5 does": (
        {
            "vision_config": CLIP,
            "vision_feature_layer": [-2, 0, -1],
            "vision_feature_select_strategy": "full",
            "multimodal_projector_bias": False,
        },
        CLIP_PROCESSOR,
        {**TEXT, "model_type": "qwen2"},
        True,
    ),
    "SigLIP, tied": (
        {
            "vision_config": SIGLIP,
            "vision_feature_layer": -1,
            "vision_feature_select_strategy": "full",
            "projector_hidden_act": "gelu_pytorch_tanh",
            "tie_word_embeddings": True,
        },
        SIGLIP_PROCESSOR,
        {**TEXT, "tie_word_embeddings": True},
        False,
    ),
    "SigLIP, without its first patch": ({"vision_config": SIGLIP}, SIGLIP_PROCESSOR, TEXT, True),
    "padded to a square": ({"vision_config": CLIP}, PADDING, TEXT, False),
}


def model_of(kind: str) -> LlavaForConditionalGeneration:
    entries, _, text, _ = KINDS[kind]
    torch.manual_seed(0)
    return LlavaForConditionalGeneration(LlavaConfig(text_config=text, image_token_index=119, **entries)).eval()


@pytest.mark.parametrize("kind", KINDS)
@torch.inference_mode()
def test_pixels_embeddings_and_logits_are_those_of_transformers(tmp_path: Path, kind: str) -> None:
    settings, theirs = KINDS[kind][1], model_of(kind)
    write_vision_model(tmp_path, theirs, settings, native=KINDS[kind][3])
    ours = VisionModel.of(tmp_path)
    images = [picture(*size) for size in SIZES]
    words = {key: value for key, value in settings.items() if key != "image_processor_type"}
    processor = PROCESSORS[settings["image_processor_type"]](**words)
    pixels = processor(images, return_tensors="pt")["pixel_values"]
    for one, truth in zip(ours.prepared(images), pixels, strict=True):
        made = normalised(torch.from_numpy(one.pixels), ours.encoder.spec.norm, torch.float32)
        torch.testing.assert_close(made[0].permute(2, 0, 1), truth.float(), atol=1e-5, rtol=0)
    truth = theirs.get_image_features(pixel_values=pixels).pooler_output
    embeddings = ours.embeddings(images)
    for made, one in zip(embeddings, truth, strict=True):
        torch.testing.assert_close(made[0], one, atol=1e-4, rtol=1e-4)
    layouts = [ours.encoder.spec.geometry.layout(image.width, image.height) for image in images]
    assert [layout.tokens for layout in layouts] == [len(one) for one in truth]
    ids, begins = prompt_ids(ours, images)
    expected = theirs(input_ids=torch.tensor([ids]), pixel_values=pixels).logits[0]
    torch.testing.assert_close(logits(ours.driver(), ids, begins, embeddings), expected, atol=1e-4, rtol=1e-4)
