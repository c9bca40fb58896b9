"""A LLaVA that names colours: the demo model, a random CLIP tower, and a connector that is fitted in closed form to the
demo model's own embeddings of the colours' names. Made in about 10 s, always the same."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from lightllmd.text.gguf_vocab import open_metadata
from lightllmd.weights.gguf_header import read_gguf_header
from transformers_gguf import load_gguf

COLOURS = {
    "red": (255, 0, 0),
    "green": (0, 160, 0),
    "blue": (0, 0, 255),
    "yellow": (255, 255, 0),
    "black": (0, 0, 0),
    "white": (255, 255, 255),
    "orange": (255, 140, 0),
    "purple": (128, 0, 128),
}
QUESTION = "My car is"  # the image stands behind it
COMMAND = ". Which colour has my car?"
SIDE, TOKENS = 28, 4  # pixels of an image that the tower sees, tokens that it becomes
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PROCESSOR = {
    "image_processor_type": "CLIPImageProcessor",
    "size": {"shortest_edge": SIDE},
    "crop_size": {"height": SIDE, "width": SIDE},
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
}


def picture(colour: str, number: int = 0, size: tuple[int, int] = (64, 48)) -> Image.Image:
    """Of that colour, with noise by its number."""
    noise = np.random.default_rng(number).normal(0, 12, (size[1], size[0], 3))
    return Image.fromarray(np.clip(np.array(COLOURS[colour]) + noise, 0, 255).astype(np.uint8))


def png(colour: str, number: int = 0, size: tuple[int, int] = (64, 48)) -> bytes:
    file = io.BytesIO()
    picture(colour, number, size).save(file, "PNG")
    return file.getvalue()


def prompt() -> str:
    """As text, with the tag in the image's place."""
    return f"<|im_start|>user\n{QUESTION}<image>{COMMAND}<|im_end|>\n<|im_start|>assistant\n"


def write_llava(file: Path, folder: Path) -> Path:
    """`file`: the demo model. A Hugging Face directory in fp32."""
    from transformers import CLIPVisionConfig, LlavaConfig, LlavaForConditionalGeneration

    torch.manual_seed(0)
    text = load_gguf(file, torch.float32)
    tokenizer = open_metadata(read_gguf_header(file).metadata, "fast")
    words = text.get_input_embeddings().weight.detach()
    vision = CLIPVisionConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=SIDE,
        patch_size=14,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text.config,
        image_token_index=len(words),
        vision_feature_select_strategy="default",
        vision_feature_layer=-1,
        projector_hidden_act="gelu",
        tie_word_embeddings=True,
    )
    model = LlavaForConditionalGeneration(config).eval()
    model.model.language_model.load_state_dict(text.model.state_dict())
    model.tie_weights()
    _fit(model, tokenizer, words)
    model.save_pretrained(folder)
    _write_tokenizer(file, folder, len(words))
    (folder / "preprocessor_config.json").write_text(json.dumps(PROCESSOR))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


@torch.inference_mode()
def _fit(model: Any, tokenizer: Any, words: Tensor) -> None:
    """The connector's first layer stays random, its second is a ridge regression."""
    features, targets = [], []
    drawn = torch.Generator().manual_seed(0)
    for name, colour in COLOURS.items():
        (token,) = tokenizer.encode(f" {name}", False)
        for _ in range(16):
            plain = torch.tensor(colour, dtype=torch.float32)[:, None, None].expand(3, SIDE, SIDE) / 127.5 - 1
            pixels = (plain + 0.15 * torch.randn(3, SIDE, SIDE, generator=drawn)).clamp(-1, 1)
            states = model.model.vision_tower(pixels[None], output_hidden_states=True).hidden_states
            features.append(states[-1][0, 1:])
            targets.append(words[token].expand(TOKENS, -1))
    connector, goal = model.model.multi_modal_projector, torch.cat(targets)
    inner = connector.act(connector.linear_1(torch.cat(features)))
    inner = torch.cat([inner, torch.ones(len(inner), 1)], 1)
    solved = torch.linalg.solve(inner.T @ inner + 1e-3 * torch.eye(inner.shape[1]), inner.T @ goal)
    connector.linear_2.weight.copy_(solved[:-1].T)
    connector.linear_2.bias.copy_(solved[-1])


def _write_tokenizer(file: Path, folder: Path, image: int) -> None:
    from tokenizers import AddedToken, Tokenizer

    tokenizer = open_metadata(read_gguf_header(file).metadata, "fast")
    backend: Tokenizer = tokenizer._backend
    backend.add_special_tokens([AddedToken("<image>", normalized=False)])
    assert backend.token_to_id("<image>") == image
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"eos_token": "<|im_end|>", "bos_token": "<|im_start|>", "additional_special_tokens": ["<image>"]})
    )
    generation = {"eos_token_id": tokenizer.eos_ids, "bos_token_id": tokenizer.bos_id}
    (folder / "generation_config.json").write_text(json.dumps(generation))
