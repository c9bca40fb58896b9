"""Images a second of the encoder, tower and connector, beside transformers' own on the same device, weights random, in
the shape of a known model; and of preprocessing, which runs elsewhere meanwhile.

    python tests/bench/images.py [--shape llava] [--batch 1 4 16] [--dtype bfloat16] [--layers 24] [--repeats 5]

Their model has its fastest attention that needs no package (SDPA) and gets pixels that are on the device already; ours
gets prepared bytes in host memory. The medians of `repeats`, taken in turns.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parents[2])]

from transformers import (  # noqa: E402
    AutoConfig,
    InternVLForConditionalGeneration,
    LlavaForConditionalGeneration,
    LlavaNextForConditionalGeneration,
    LlavaOnevisionForConditionalGeneration,
)

from lightllmd.architecture.vision.anyres import Anyres  # noqa: E402
from lightllmd.models.vision.layers import normalised  # noqa: E402
from lightllmd.models.vision.loading import load_encoder  # noqa: E402
from lightllmd.probe.model import model_facts  # noqa: E402
from lightllmd.visual.pixels import prepare  # noqa: E402
from vision_models import picture, write_vision_model  # noqa: E402

TEXT = {
    "hidden_size": 4096,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 32,
    "num_key_value_heads": 1,
    "vocab_size": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
CLIP = {
    "model_type": "clip_vision_model",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_attention_heads": 16,
    "num_hidden_layers": 24,
    "image_size": 336,
    "patch_size": 14,
}
SIGLIP = {
    "model_type": "siglip_vision_model",
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_attention_heads": 16,
    "num_hidden_layers": 26,
    "image_size": 384,
    "patch_size": 14,
    "vision_use_head": False,
}
INTERN = {
    "model_type": "internvl_vision",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_attention_heads": 16,
    "num_hidden_layers": 24,
    "image_size": [448, 448],
    "patch_size": [14, 14],
    "attention_bias": True,
}
SQUARE = {"size": {"shortest_edge": 336}, "crop_size": {"height": 336, "width": 336}}
# (model, its class, the tower, of the text part its type, the image processor's settings)
SHAPES: dict[str, tuple[type, dict[str, Any], str, dict[str, Any]]] = {
    "llava": (LlavaForConditionalGeneration, CLIP, "llama", SQUARE),
    "llava_next": (LlavaNextForConditionalGeneration, CLIP, "llama", {**SQUARE, "do_pad": True}),
    "llava_onevision": (
        LlavaOnevisionForConditionalGeneration,
        SIGLIP,
        "qwen2",
        {"size": {"height": 384, "width": 384}},
    ),
    "internvl": (InternVLForConditionalGeneration, INTERN, "qwen2", {"size": {"height": 448, "width": 448}}),
}


def timed(run: Callable[[], Any], device: torch.device) -> float:
    """Seconds."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    begun = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begun


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="llava")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--size", type=int, nargs=2, default=[640, 480], help="pixels of each image")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--layers", type=int, default=0, help="of the tower; 0: as the model has")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    device, dtype = torch.device(options.device), getattr(torch, options.dtype)
    made, tower, kind, settings = SHAPES[options.shape]
    if options.layers:
        tower = {**tower, "num_hidden_layers": options.layers}
    config = AutoConfig.for_model(options.shape, vision_config=tower, text_config={**TEXT, "model_type": kind})
    theirs = made(config).eval()
    with tempfile.TemporaryDirectory() as folder:
        write_vision_model(Path(folder), theirs, settings)
        encoder = load_encoder(model_facts(folder), device, dtype, lambda done, total: None)
    theirs = theirs.to(device, dtype)
    print(f"{options.shape}, {options.dtype}, {device.type}, {torch.get_num_threads()} threads, {os.uname().nodename}")
    for batch in options.batch:
        images = [picture(*options.size, seed=one) for one in range(batch)]
        begun = time.perf_counter()
        prepared = [prepare(encoder.spec, image) for image in images]
        preparing = time.perf_counter() - begun
        tiles = [torch.from_numpy(one.pixels.copy()) for one in prepared]
        pixels = [normalised(one, encoder.spec.norm, torch.float32).permute(0, 3, 1, 2) for one in tiles]
        inputs: dict[str, Any] = {"pixel_values": torch.cat(pixels).to(device, dtype)}
        if isinstance(encoder.spec.geometry, Anyres):
            inputs["pixel_values"] = torch.stack(pixels).to(device, dtype)
            inputs["image_sizes"] = torch.tensor([options.size[::-1]] * batch)

        @torch.inference_mode()
        def peer(inputs: dict[str, Any] = inputs) -> Any:
            return theirs.get_image_features(**inputs)

        def ours(prepared: Any = prepared) -> Any:
            return encoder.encode(prepared)

        for _ in range(2):
            peer(), ours()
        times: tuple[list[float], list[float]] = ([], [])
        for _ in range(options.repeats):
            times[0].append(timed(peer, device))
            times[1].append(timed(ours, device))
        their, our = (statistics.median(each) for each in times)
        counted = sum(one.layout.tiles for one in prepared)
        print(
            f"batch {batch:3} ({counted} tiles): ours {batch / our:8.2f} images/s, transformers {batch / their:8.2f}, "
            f"{their / our:.2f}x; prepared {batch / preparing:.1f} images/s by one thread"
        )


if __name__ == "__main__":
    main()
