"""LLaVA 1.5 beside transformers: pixels, image embeddings, logits of the whole model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lightllmd.models.vision.layers import normalised
from vision_cases import KINDS, PROCESSORS, model_of
from vision_models import SIZES, VisionModel, logits, picture, prompt_ids, write_vision_model


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
