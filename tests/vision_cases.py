"""The tiny image models that `vision_models` writes, by family."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import (
    InternVLConfig,
    InternVLForConditionalGeneration,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from vision_models import TEXT

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


# --- several squares of an image ---

TOWER = {
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 28,
    "patch_size": 7,
}
NEXT_CLIP = {**TOWER, "model_type": "clip_vision_model", "projection_dim": 16}
NEXT_SIGLIP = {**TOWER, "model_type": "siglip_vision_model", "vision_use_head": False}
INTERN = {**TOWER, "image_size": [28, 28], "patch_size": [7, 7]}
PINPOINTS = [[28, 56], [56, 28], [56, 56], [84, 28], [28, 84]]
MANY = [[28 * height, 28 * width] for height in range(1, 5) for width in range(1, 5)]
QWEN2, MISTRAL = {**TEXT, "model_type": "qwen2"}, {**TEXT, "model_type": "mistral", "sliding_window": 50}


@dataclass(frozen=True)
class Case:
    config: type
    model: type
    entries: dict[str, Any]
    processor: Callable[..., Any]
    settings: dict[str, Any]
    native: bool = False


NEXT_SETTINGS = {"size": {"shortest_edge": 28}, "crop_size": {"height": 28, "width": 28}}
CASES = {
    "llava_next": Case(
        LlavaNextConfig,
        LlavaNextForConditionalGeneration,
        {
            "vision_config": NEXT_CLIP,
            "text_config": MISTRAL,
            "image_grid_pinpoints": PINPOINTS,
            "image_token_index": 119,
        },
        LlavaNextImageProcessorPil,
        {**NEXT_SETTINGS, "image_grid_pinpoints": PINPOINTS, "do_pad": True},
    ),
    "llava_next, named as transformers 5 does": Case(
        LlavaNextConfig,
        LlavaNextForConditionalGeneration,
        {
            "vision_config": NEXT_SIGLIP,
            "text_config": TEXT,
            "image_grid_pinpoints": MANY,
            "image_token_index": 119,
            "vision_feature_layer": [-1, 1],
            "vision_feature_select_strategy": "full",
        },
        LlavaNextImageProcessorPil,
        {**NEXT_SETTINGS, "image_grid_pinpoints": MANY, "do_pad": True},
        native=True,
    ),
    "llava_onevision": Case(
        LlavaOnevisionConfig,
        LlavaOnevisionForConditionalGeneration,
        {
            "vision_config": NEXT_SIGLIP,
            "text_config": QWEN2,
            "image_grid_pinpoints": MANY,
            "image_token_index": 119,
            "video_token_index": 118,
            "vision_aspect_ratio": "anyres_max_3",
            "tie_word_embeddings": True,
        },
        LlavaOnevisionImageProcessorPil,
        {"size": {"height": 28, "width": 28}, "image_grid_pinpoints": MANY, "do_pad": True},
    ),
    "internvl": Case(
        InternVLConfig,
        InternVLForConditionalGeneration,
        {
            "vision_config": {**INTERN, "attention_bias": True},
            "text_config": QWEN2,
            "image_token_id": 119,
            "tie_word_embeddings": False,
        },
        GotOcr2ImageProcessorPil,
        {"size": {"height": 28, "width": 28}, "max_patches": 5, "min_patches": 1},
    ),
    "internvl with all its norms, named as transformers 5 does": Case(
        InternVLConfig,
        InternVLForConditionalGeneration,
        {
            "vision_config": {**INTERN, "use_qk_norm": True, "norm_type": "rms_norm", "use_mean_pooling": False},
            "text_config": {**TEXT, "model_type": "qwen3", "head_dim": 12, "tie_word_embeddings": True},
            "image_token_id": 119,
        },
        GotOcr2ImageProcessorPil,
        {"size": {"height": 28, "width": 28}, "max_patches": 12, "min_patches": 2},
        native=True,
    ),
}


def theirs_of(case: Case) -> Any:
    torch.manual_seed(0)
    return case.model(case.config(**case.entries)).eval()
