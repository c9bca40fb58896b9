"""Where a prompt's text has images: the parts of the text between them, and their places among its tokens."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from lightllmd.text.interface import Tokenizer


@dataclass(frozen=True)
class ImageText:
    """How a model's prompts say that there is an image."""

    tag: str  # what a text has in an image's place
    tags: tuple[str, ...]  # all that is such a tag, a longer one before what is a part of it
    token: int  # the id that an image's tokens have
    around: tuple[str, str] = ("", "")  # see `Placeholder.around`

    @cached_property
    def pattern(self) -> re.Pattern[str]:
        """Matches one."""
        return re.compile("|".join(map(re.escape, self.tags)))

    def parts(self, text: str) -> list[str]:
        """The texts around the tags: one more than there are tags."""
        texts = self.pattern.split(text)
        if not any(self.around):
            return texts
        before, behind = self.around
        for number in range(1, len(texts)):
            texts[number - 1] += before.replace("{number}", str(number))
            texts[number] = behind + texts[number]
        return texts


def encode_parts(
    tokenizer: Tokenizer, parts: Sequence[str], image: ImageText, add_special_tokens: bool
) -> tuple[list[int], list[int]]:
    """The ids of a text with an image between every two of its `parts`, each image one id, and the index of each.

    The text is tokenised as a whole, with the image's own token in its place. What a client wrote may have that token,
    too, which is then no image. Where the tokenizer has no such token the parts are tokenised by themselves.
    """
    if image.token not in tokenizer.vocabulary.added_ids:
        return _one_by_one(tokenizer, parts, image.token, add_special_tokens)
    own = tokenizer.vocabulary.tokens[image.token] or ""
    ids = tokenizer.encode(own.join(parts), add_special_tokens)
    found = [index for index, token in enumerate(ids) if token == image.token]
    places, at = [], 0
    for part in parts[:-1]:
        at += part.count(own)
        places.append(found[at])
        at += 1
    return ids, places


def _one_by_one(
    tokenizer: Tokenizer, texts: Sequence[str], place: int, add_special_tokens: bool
) -> tuple[list[int], list[int]]:
    ids, places = tokenizer.encode(texts[0], add_special_tokens), []
    for text in texts[1:]:
        places.append(len(ids))
        ids += [place, *tokenizer.encode(text, False)]
    return ids, places
