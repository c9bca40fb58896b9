"""Images in prompts: where the tokens of a text have them, and how chat templates of all kinds show them."""

from __future__ import annotations

from typing import Any

import pytest
import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers

from lightllmd.errors import InvalidRequest
from lightllmd.requests.asked import Chat
from lightllmd.requests.encoding import Encoder
from lightllmd.requests.images import AskedImage
from lightllmd.requests.shortening import without_oldest
from lightllmd.text import ByteTokenizer
from lightllmd.text.chat_template import ChatTemplate
from lightllmd.text.fast import FastTokenizer
from lightllmd.text.image_places import ImageText, encode_parts

TAG, PAD = "<image>", "<|vision_start|><|image_pad|><|vision_end|>"
STRINGS = "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
# As LLaVA's of transformers: parts alone, images first.
PARTS = (
    "{% for message in messages %}{{ message['role'] + ': ' }}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ content['text'] }}{% endfor %}"
    "{% endfor %}"
)
# As Qwen2-VL's: parts and strings.
BOTH = (
    "{% for message in messages %}{{ message['role'] + ': ' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for content in message['content'] %}{% if content['type'] == 'image' or 'image' in content %}"
    "{{ '" + PAD + "' }}{% elif 'text' in content %}{{ content['text'] }}{% endif %}{% endfor %}{% endif %}{% endfor %}"
)
IMAGE = {"type": "image"}


def text(words: str) -> dict[str, Any]:
    return {"type": "text", "text": words}


def user(*parts: Any) -> dict[str, Any]:
    return {"role": "user", "content": parts[0] if isinstance(parts[0], str) else list(parts)}


@pytest.mark.parametrize(
    ("source", "tag", "shown"),
    [
        (STRINGS, TAG, "user: look\n<image>\nthere\nuser: hello\n"),
        (PARTS, TAG, "user: <image>\nlookthereuser: hello"),
        (BOTH, PAD, f"user: look{PAD}thereuser: hello"),
    ],
)
def test_a_template_gets_images_in_the_form_that_it_takes(source: str, tag: str, shown: str) -> None:
    messages = [user(text("look"), IMAGE, text("there")), user("hello")]
    assert ChatTemplate(source).render(messages, add_generation_prompt=False, image_tag=tag) == shown


@pytest.mark.parametrize("source", [STRINGS, PARTS, BOTH])
def test_a_chat_without_images_is_shown_by_each_kind_of_template(source: str) -> None:
    shown = ChatTemplate(source).render([user("hello")], add_generation_prompt=False)
    assert shown.strip() == "user: hello"
    assert (
        ChatTemplate(source).render([user(text("a"), text("b"))], add_generation_prompt=False).strip() == "user: a\nb"
    )


def test_images_are_refused_where_no_tag_is_known() -> None:
    with pytest.raises(InvalidRequest, match=r"messages\[0\]\.content\[0\].*'image'"):
        ChatTemplate(STRINGS).render([user(IMAGE)])


@pytest.mark.parametrize("source", [STRINGS, PARTS, BOTH])
def test_images_of_a_tool_s_result_are_shown_by_templates_without_tools(source: str) -> None:
    call = {"role": "assistant", "content": None, "tool_calls": [_call("look")]}
    result = {"role": "tool", "tool_call_id": "1", "content": [text("seen"), IMAGE]}
    shown = ChatTemplate(source).render([user("look"), call, result], add_generation_prompt=False, image_tag=TAG)
    assert "<tool_response>\nseen\n<image>\n</tool_response>" in shown


def _call(name: str) -> dict[str, Any]:
    return {"id": "1", "type": "function", "function": {"name": name, "arguments": "{}"}}


@pytest.mark.parametrize("source", [STRINGS, PARTS])
def test_an_answer_is_continued_behind_an_image(source: str) -> None:
    messages = [user(IMAGE, text("what?")), {"role": "assistant", "content": "a red"}]
    shown = ChatTemplate(source).render(messages, continue_final_message=True, image_tag=TAG)
    assert shown.endswith("assistant: a red")
    assert shown.count(TAG) == 1


# --- places in tokens -----------------------------------------------------------------------------------------------


def bpe(special: str = TAG) -> FastTokenizer:
    """Bytes, and one token for an image."""
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend = tokenizers.Tokenizer(models.BPE({letter: index for index, letter in enumerate(sorted(alphabet))}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(special)])
    return FastTokenizer(backend)


def own(tokenizer: FastTokenizer) -> int:
    return max(tokenizer.vocabulary.added_ids)


def test_each_image_is_one_token_in_its_place() -> None:
    tokenizer = bpe()
    image = ImageText(TAG, (TAG,), own(tokenizer))
    ids, places = encode_parts(tokenizer, image.parts("a <image>b<image>"), image, False)
    assert ids == tokenizer.encode("a <image>b<image>", False)
    assert [ids[place] for place in places] == [image.token] * 2
    assert places == [2, 4]


def test_a_tag_may_be_another_text_than_the_token_and_a_client_may_write_the_token() -> None:
    tokenizer = bpe("<IMG_CONTEXT>")
    image = ImageText(TAG, ("<IMG_CONTEXT>", TAG), own(tokenizer))
    parts = ["<IMG_CONTEXT> is ", " and <IMG_CONTEXT>", "<IMG_CONTEXT>"]
    ids, places = encode_parts(tokenizer, parts, image, False)
    found = [index for index, token in enumerate(ids) if token == image.token]
    assert places == [found[1], found[3]]
    assert len(found) == 5


def test_text_that_belongs_to_images_is_a_part_of_the_prompts_own() -> None:
    image = ImageText(TAG, (TAG,), 0, ("Picture {number}: ", "\n"))
    assert image.parts("a<image>b<image>") == ["aPicture 1: ", "\nbPicture 2: ", "\n"]
    assert image.parts("{number}") == ["{number}"]


def test_without_a_token_of_its_own_the_parts_are_tokenised_by_themselves() -> None:
    image = ImageText(TAG, (TAG,), 0)
    assert encode_parts(ByteTokenizer(), ["ab", "c"], image, True) == ([*b"ab", 0, *b"c"], [2])


class Chats(ByteTokenizer):
    def __init__(self, source: str) -> None:
        super().__init__()
        self.chat_template = ChatTemplate(source)


class NoLimits:
    max_req_input_len = 1 << 20
    long_truncation_mode = None

    def at_least(self, tokens: int, field: str) -> None:
        assert tokens < 1 << 20


@pytest.mark.parametrize("source", [STRINGS, PARTS])
def test_tags_that_a_client_writes_are_no_images(source: str) -> None:
    encoder = Encoder(Chats(source), NoLimits())  # type: ignore[arg-type]
    image = ImageText(TAG, (TAG,), 0)
    messages = [user("an <image> tag"), user(text("<image>"), IMAGE, text("x"))]
    ids, places = encoder.encode_chat_seeing(messages, {"add_generation_prompt": False}, "messages", True, image, 1)
    (place,) = places
    assert ids[place] == 0
    shown = bytes(ids.tolist()).replace(b"\0", b"[]").decode()
    assert "user: an <image> tag" in shown
    assert shown.count("<image>") == 2
    assert shown.count("[]") == 1


def test_a_template_that_loses_an_image_is_told_of() -> None:
    encoder = Encoder(Chats("{{ messages[0].content }}"), NoLimits())  # type: ignore[arg-type]
    with pytest.raises(InvalidRequest, match="the model's chat template shows 1 of 2 images"):
        encoder.encode_chat_seeing([user(IMAGE), user(IMAGE)], {}, "messages", True, ImageText(TAG, (TAG,), 0), 2)


def test_images_go_with_the_messages_that_are_left_out() -> None:
    images = [AskedImage(f"{number}", "url", f"http://x/{number}") for number in range(4)]
    messages = [
        {"role": "system", "content": [text("s"), images[0]]},
        user(images[1], text("first")),
        {"role": "assistant", "content": "yes"},
        user(images[2], text("second"), images[3]),
    ]
    chat = Chat.of(messages, {})
    assert chat.images == images
    shorter = without_oldest(chat, 1)
    assert shorter is not None
    assert [image.field for image in shorter.images] == ["0", "2", "3"]
    assert "x/0" not in repr(images[0])
