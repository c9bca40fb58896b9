"""Where a prompt has an image, and what stands there when it is token ids."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from lightllmd.architecture.entries import invalid
from lightllmd.errors import show

Token = int | str  # its id, or its text where only the tokenizer knows the id


@dataclass(frozen=True)
class ImageTokens:
    """A `Placeholder` with ids."""

    image: int  # of each token of the span; may lie outside the vocabulary, it is never embedded
    before: tuple[int, ...] = ()
    behind: tuple[int, ...] = ()

    def of(self, tokens: int) -> tuple[int, list[int]]:
        """Where the span begins, and the ids of an image of so many tokens."""
        return len(self.before), [*self.before, *(self.image,) * tokens, *self.behind]


@dataclass(frozen=True)
class Placeholder:
    """An image in a prompt: `before`, the `image` token as often as the image has tokens, `behind`."""

    tag: str  # what a prompt's text has in the place of the image
    image: Token
    before: tuple[Token, ...] = ()
    behind: tuple[Token, ...] = ()
    also: tuple[str, ...] = ()  # other tags that chat templates write for the same
    # Text before and behind, which is tokenised with the prompt's own; "{number}" is the image's, from 1 on.
    around: tuple[str, str] = ("", "")

    @property
    def tags(self) -> tuple[str, ...]:
        """All of them, long ones first: one may be a part of another."""
        return tuple(sorted({self.tag, *self.also}, key=lambda tag: (-len(tag), tag)))

    def resolved(self, id_of: Callable[[str], int | None]) -> ImageTokens:
        """With the tokenizer's ids. Raises ConfigInvalid for a token that it has not."""

        def one(token: Token) -> int:
            number = token if isinstance(token, int) else id_of(token)
            if number is None:
                raise invalid(f"images need the token {show(token)}, the tokenizer has none")
            return number

        return ImageTokens(one(self.image), tuple(map(one, self.before)), tuple(map(one, self.behind)))
