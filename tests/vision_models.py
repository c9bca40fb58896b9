"""Tiny random image models of transformers on disk, images of odd sizes, and what transformers makes of both.

`embeddings` and `logits` are ours, `their_embeddings` and `their_logits` transformers': for each family
`tests/visual/test_towers_*.py` says that they are the same.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
from PIL import Image
from torch import Tensor

from lightllmd.architecture.vision.layout import PreparedImage
from lightllmd.config.plan import ModelFacts
from lightllmd.engine.runners.cpu import CpuRunner
from lightllmd.models.vision.encoder import ImageEncoder
from lightllmd.models.vision.loading import load_encoder
from lightllmd.probe.model import model_facts
from lightllmd.visual.pixels import prepare
from model_folders import TOKENIZER
from tiny_models import Driver, plan_for

CPU = torch.device("cpu")
# (width, height) of images: square, wide, tall, tiny, one of a single pixel's width.
SIZES = [(64, 64), (90, 41), (33, 101), (5, 7), (1, 60)]
TEXT: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 120,
    "max_position_embeddings": 2048,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    """Noise over a gradient: every pixel counts, and so does where it is."""
    drawn = np.random.default_rng((seed, width, height))
    noise = drawn.integers(0, 128, (height, width, 3))
    ramp = np.linspace(0, 127, width)[None, :, None] * np.linspace(0.2, 1, height)[:, None, None]
    return Image.fromarray((noise + ramp).astype(np.uint8))


def write_vision_model(
    folder: Path, model: Any, preprocessor: dict[str, Any] | None = None, *, native: bool = False, seed: int = 0
) -> Path:
    """A model of transformers with random weights that are large enough to tell mistakes. `native`: named as
    transformers 5 names its tensors; else as checkpoints on the hub are."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 and "position" not in name:
                parameter.normal_(0, 0.08)
            else:
                parameter.normal_(1.0 if "norm" in name and name.endswith("weight") else 0.0, 0.1)
    model.save_pretrained(folder, save_original_format=not native)
    (folder / "tokenizer.json").write_text(json.dumps(TOKENIZER))
    if preprocessor is not None:
        (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    return folder


def change(folder: Path, **entries: Any) -> None:
    """Entries of config.json; one that is None goes."""
    path = folder / "config.json"
    config = json.loads(path.read_text()) | entries
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


@dataclass
class VisionModel:
    """One of ours, from a folder."""

    facts: ModelFacts
    encoder: ImageEncoder

    @staticmethod
    def of(folder: Path, dtype: torch.dtype = torch.float32, **options: Any) -> VisionModel:
        facts = model_facts(str(folder), **options)
        return VisionModel(facts, load_encoder(facts, CPU, dtype, lambda done, total: None))

    def prepared(self, images: Sequence[Image.Image]) -> list[PreparedImage]:
        return [prepare(self.encoder.spec, image) for image in images]

    def driver(self) -> Driver:
        """Of its decoder."""
        runner = CpuRunner()
        plan = msgspec.structs.replace(
            plan_for(Path(self.facts.path), slots=2048, max_req_input_len=2000, max_req_total_len=2040),
            model=self.facts,
        )
        runner.load(plan, lambda done, total: None)
        return Driver(runner)

    def embeddings(self, images: Sequence[Image.Image]) -> list[Tensor]:
        """``[1 + deepstack, tokens, out_hidden]`` of each."""
        return self.encoder.encode(self.prepared(images))


def prompt_ids(model: VisionModel, images: Sequence[Image.Image], seed: int = 0) -> tuple[list[int], list[int]]:
    """Text, each image in its place, text; and where the image spans begin. The placeholder's tokens are all ids."""
    drawn = random.Random(seed)
    spec = model.encoder.spec
    place = spec.placeholder.resolved({}.get)
    ids, begins = [1, *(drawn.randrange(3, 90) for _ in range(4))], []
    for image in images:
        begin, span = place.of(spec.geometry.layout(image.width, image.height).tokens)
        begins.append(len(ids) + begin)
        ids += [*span, *(drawn.randrange(3, 90) for _ in range(3))]
    return ids, begins


def logits(
    driver: Driver,
    ids: Sequence[int],
    begins: Sequence[int],
    embeddings: Sequence[Tensor],
    *,
    bidirectional: bool = False,
) -> Tensor:
    """Ours ``[tokens, vocab]`` of one prompt, in one step, with embeddings in the place of those of the ids.
    `bidirectional`: the tokens of an image see each other."""
    decoder = driver.runner.decoder
    embed = decoder.embedding

    def placed(batch: Any) -> Tensor:
        x = embed(batch)
        for begin, rows in zip(begins, embeddings, strict=True):
            x[begin : begin + rows.shape[1]] = rows[0]
        return x

    vocab = driver.runner.decoder.spec.vocab
    decoder.embedding = placed
    try:
        row = driver.row(0, [min(one, vocab - 1) for one in ids])
        if bidirectional:
            row.bidirectional = [(begin, rows.shape[1]) for begin, rows in zip(begins, embeddings, strict=True)]
        return driver.logits(row)[0]
    finally:
        decoder.embedding = embed
        driver.release(0)
