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
    # What stands around the one token that is an image's place, as text; of the n-th one `{number}` is n.
    before: str = ""
    behind: str = ""
    token: int | None = None  # the id of that token; None: no text has such a token
    pattern: str = ""  # of all that is such a tag; empty: `tag` alone

    @cached_property
    def tags(self) -> re.Pattern[str]:
        """Matches one."""
        return re.compile(self.pattern or re.escape(self.tag))

    def parts(self, text: str) -> list[str]:
        """The texts around the tags: one more than there are tags."""
        parts, end = [], 0
        for found in self.tags.finditer(text):
            parts.append(text[end : found.start()])
            end = found.end()
        return [*parts, text[end:]]

    def around(self, number: int) -> tuple[str, str]:
        """What stands before and behind the place of the image of that number, from 1 on."""
        return self.before.replace("{number}", str(number)), self.behind.replace("{number}", str(number))


def encode_parts(
    tokenizer: Tokenizer, parts: Sequence[str], image: ImageText, add_special_tokens: bool
) -> tuple[list[int], list[int]]:
    """The ids of a text with an image between every two of its `parts`, each image one id, and the index of each.

    The text is tokenised as a whole, with the image's own token in its place. What a client wrote may have that token,
    too, which is then no image. Where the tokenizer has no such token the parts are tokenised by themselves.
    """
    texts = [parts[0]]
    for number, part in enumerate(parts[1:], 1):
        before, behind = image.around(number)
        texts[-1] += before
        texts.append(behind + part)
    if image.token is None or image.token not in tokenizer.vocabulary.added_ids:
        return _one_by_one(tokenizer, texts, image.token or 0, add_special_tokens)
    own = tokenizer.vocabulary.tokens[image.token] or ""
    ids = tokenizer.encode(own.join(texts), add_special_tokens)
    found = [index for index, token in enumerate(ids) if token == image.token]
    places, at = [], 0
    for text in texts[:-1]:
        at += text.count(own)
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
