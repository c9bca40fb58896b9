"""From texts and conversations to the token ids of prompts, refusing early what can't fit.

Called on the event loop for short texts and in a helper process for all others. Ids are arrays, which cross a process
border as they are; a prompt that will be cut anyway comes with its ends only, so that no result is long.
"""

from __future__ import annotations

import secrets
from array import array
from collections.abc import Callable, Sequence
from typing import Any

from lightllmd.errors import InvalidRequest
from lightllmd.requests.limits import RequestLimits
from lightllmd.text.image_places import ImageText, encode_parts
from lightllmd.text.interface import Tokenizer

FIRST_LOOK = 1 << 16  # characters of a long text that are tokenised to see whether all of it may fit


class Encoder:
    """`encode` and `encode_chat` raise InvalidRequest, naming `field`, for what is no valid Unicode or too long; with
    `cut` the caller cuts a longer prompt, as the plan's long_truncation_mode does."""

    def __init__(self, tokenizer: Tokenizer, limits: RequestLimits) -> None:
        self._tokenizer = tokenizer
        self._limits = limits

    def encode(
        self, texts: Sequence[str], fields: Sequence[str], add_special_tokens: bool, cut: bool
    ) -> list[array[int]]:
        """`fields`: the name of each text."""
        if sum(map(len, texts)) <= FIRST_LOOK:
            encoded = self._tokenizer.encode_batch(texts, add_special_tokens)
            return [self.checked(ids, field, cut) for ids, field in zip(encoded, fields, strict=True)]
        return [self._encode(text, field, add_special_tokens, cut) for text, field in zip(texts, fields, strict=True)]

    def encode_chat(
        self, messages: Sequence[dict[str, Any]], options: dict[str, Any], field: str, cut: bool
    ) -> array[int]:
        """`options` as `ChatTemplate.render`."""
        return self._encode(self.render(messages, options), field, False, cut)

    def render(self, messages: Sequence[dict[str, Any]], options: dict[str, Any]) -> str:
        """`options` as `ChatTemplate.render`. Raises InvalidRequest."""
        return self._tokenizer.render_chat(messages, **options)

    def encode_seeing(
        self, text: str, field: str, add_special_tokens: bool, cut: bool, image: ImageText, images: int
    ) -> tuple[array[int], list[int]]:
        """The ids of a text with the model's tag in the place of each of its `images`, an id for each, and the index
        of each among them. Raises InvalidRequest for another number of tags."""
        parts = image.parts(text)
        if len(parts) - 1 != images:
            raise InvalidRequest(
                f"{field}: it has {len(parts) - 1} image tags ({image.tag}), the request {images} images; each image "
                "has a tag in its place",
                param=field,
            )
        return self._seeing(parts, field, add_special_tokens, cut, image)

    def encode_chat_seeing(
        self,
        messages: Sequence[dict[str, Any]],
        options: dict[str, Any],
        field: str,
        cut: bool,
        image: ImageText,
        images: int,
    ) -> tuple[array[int], list[int]]:
        """The same of a conversation, of whose messages so many parts are images. A tag in a client's text is no
        image."""
        inside = secrets.token_hex(16)

        def broken(text: str) -> str:
            return image.pattern.sub(lambda tag: tag[0][:1] + inside + tag[0][1:], text)

        text = self.render(_texts(messages, broken), {**_texts(options, broken), "image_tag": image.tag})
        parts = image.parts(text)
        if len(parts) - 1 != images:
            raise InvalidRequest(
                f"{field}: the model's chat template shows {len(parts) - 1} of {images} images", param=field
            )
        return self._seeing([part.replace(inside, "") for part in parts], field, False, cut, image)

    def _seeing(
        self, parts: Sequence[str], field: str, add_special_tokens: bool, cut: bool, image: ImageText
    ) -> tuple[array[int], list[int]]:
        if not cut:
            self._refuse_long(sum(map(len, parts)), field)
        ids, places = encode_parts(self._tokenizer, parts, image, add_special_tokens)
        return array("i", ids), places

    def count(self, text: str, add_special_tokens: bool) -> int:
        """Tokens of a text of any length."""
        return len(self._tokenizer.encode(text, add_special_tokens))

    def _encode(self, text: str, field: str, add_special_tokens: bool, cut: bool) -> array[int]:
        return self.checked(self.bounded(text, field, add_special_tokens, cut), field, cut)

    def bounded(self, text: str, field: str, add_special_tokens: bool, cut: bool) -> list[int]:
        """A text that can't fit is refused before much time and memory went into it: a token takes about 100 bytes
        while it is made. What the beginning has beyond twice the bound is no artefact of where it was cut."""
        limits, encode = self._limits, self._tokenizer.encode
        size = max(FIRST_LOOK, 8 * limits.max_req_input_len)
        if len(text) > size and not cut and limits.long_truncation_mode is None:
            self._refuse_long(len(text), field)
            while size < len(text):
                limits.at_least(len(encode(text[:size], add_special_tokens)) // 2, field)
                size *= 2
        return encode(text, add_special_tokens)

    def _refuse_long(self, characters: int, field: str) -> None:
        longest = self._tokenizer.longest_token
        if longest is not None and self._limits.long_truncation_mode is None:
            self._limits.at_least(-(-characters // longest), field)

    def checked(self, ids: list[int], field: str, cut: bool) -> array[int]:
        """Ids that `bounded` gave, of a length that the plan allows."""
        if not cut:
            self._limits.prompt(ids, field)
        return self._limits.ends(array("i", ids))


def _texts(value: Any, change: Callable[[str], str]) -> Any:
    """JSON data with each text changed; names in objects stay."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {name: _texts(one, change) for name, one in value.items()}
    return [_texts(one, change) for one in value] if isinstance(value, list | tuple) else value
