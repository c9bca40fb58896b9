"""What every tokenizer can do, whatever files it came from."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any

from lightllmd.errors import InvalidRequest
from lightllmd.text.chat_template import ChatTemplate
from lightllmd.text.detokenize import Detokenizing, IncrementalDetokenizer
from lightllmd.text.offsets import Span
from lightllmd.text.pairs import NO_FRAME, PairFrame
from lightllmd.text.vocabulary import Vocabulary


class Tokenizer(ABC):
    """Text to ids and back. Holds no state of a request, so one object serves all of them, from any thread."""

    def __init__(
        self,
        vocabulary: Vocabulary,
        *,
        bos_id: int | None = None,
        eos_ids: Iterable[int] = (),
        chat_template: ChatTemplate | None = None,
        warnings: Iterable[str] = (),
    ) -> None:
        self.vocabulary = vocabulary
        self.bos_id = bos_id
        self.eos_ids = list(eos_ids)
        self.chat_template = chat_template
        self.warnings = list(warnings)  # for the caller to log
        self._detokenizing: dict[tuple[Any, ...], Detokenizing] = {}  # by its options, of which few sets exist

    def close(self) -> None:  # noqa: B027
        """Ends what it runs outside this process, if anything; it starts again where that is needed."""

    @property
    def vocab_size(self) -> int:
        """Ids of the tokenizer; the model's embedding may have more rows."""
        return len(self.vocabulary.tokens)

    @property
    def special_ids(self) -> frozenset[int]:
        """Ids of special tokens, which a text without special tokens leaves out."""
        return self.vocabulary.special_ids

    def is_special(self, token_id: int) -> bool:
        """Whether the id is a special token's."""
        return token_id in self.vocabulary.special_ids

    def id_to_token(self, token_id: int) -> str | None:
        """As the model's files write it, such as ``Ġthe``; None for an id that is no token."""
        tokens = self.vocabulary.tokens
        return tokens[token_id] if 0 <= token_id < len(tokens) else None

    def token_bytes(self, token_id: int) -> bytes | None:
        """What the token adds to a text; None where it has no bytes of its own."""
        return self.vocabulary.token_bytes(token_id)

    # --- text to ids ----------------------------------------------------------------------------------------------

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Raises InvalidRequest for a text that is no valid Unicode (a lone surrogate)."""
        _check_unicode(text)
        return self._encode(text, add_special_tokens)

    def encode_batch(self, texts: Sequence[str], add_special_tokens: bool = True) -> list[list[int]]:
        """As `encode`, of several texts at once."""
        for text in texts:
            _check_unicode(text)
        return self._encode_batch(texts, add_special_tokens)

    @abstractmethod
    def _encode(self, text: str, add_special_tokens: bool) -> list[int]: ...

    def _encode_batch(self, texts: Sequence[str], add_special_tokens: bool) -> list[list[int]]:
        return [self._encode(text, add_special_tokens) for text in texts]

    @property
    def longest_token(self) -> int | None:
        """Characters of a text that a token stands for at most; None where that is not known, because text may be
        dropped or runs of unknown characters become one token."""
        return None

    def spans(self, text: str, add_special_tokens: bool = True) -> list[Span] | None:
        """The characters of `text` that each token of ``encode(text)`` stands for, white space at their ends perhaps
        left out; None where the tokenizer doesn't know."""
        return None

    @property
    def pair_frame(self) -> PairFrame:
        """What encoding two texts together puts around them; each is encoded without special tokens."""
        return NO_FRAME

    def encode_chat(self, messages: Sequence[dict[str, Any]], **options: Any) -> list[int]:
        """The ids of a rendered conversation; options as `ChatTemplate.render`. Raises InvalidRequest."""
        return self.encode(self.render_chat(messages, **options), add_special_tokens=False)

    def render_chat(self, messages: Sequence[dict[str, Any]], **options: Any) -> str:
        """The prompt as text, special tokens included; options as `ChatTemplate.render`. Raises InvalidRequest."""
        if self.chat_template is None:
            raise InvalidRequest(
                "this model has no chat template, so it can't take messages; send a plain prompt "
                "(/generate or /v1/completions)"
            )
        return self.chat_template.render(messages, **options)

    # --- ids to text ----------------------------------------------------------------------------------------------

    def detokenizing(
        self,
        *,
        skip_special_tokens: bool = True,
        spaces_between_special_tokens: bool = True,
        print_eos_token: bool | None = False,
        marks: frozenset[str] = frozenset(),
    ) -> Detokenizing:
        """What opens detokenizers; one object for each set of options.

        `spaces_between_special_tokens` puts a space between an added token that is shown and the tokens beside it.
        `print_eos_token`: True shows the ids that end a generation, False hides them, None treats them as any other.
        `marks`: tokens, by their text, that are shown whatever the others say: a reader needs them.
        """
        options = (skip_special_tokens, spaces_between_special_tokens, print_eos_token, marks)
        made = self._detokenizing.get(options)
        if made is None:
            left_out = self.special_ids if skip_special_tokens else frozenset()
            if print_eos_token is not None:
                left_out = left_out.difference(self.eos_ids) if print_eos_token else left_out.union(self.eos_ids)
            if marks:
                left_out = frozenset(number for number in left_out if self.id_to_token(number) not in marks)
            made = Detokenizing(self.vocabulary, left_out, separate_added=spaces_between_special_tokens)
            self._detokenizing[options] = made
        return made

    def detokenizer(
        self, prompt_ids: Sequence[int] = (), *, hidden: bytes = b"", **options: bool | None
    ) -> IncrementalDetokenizer:
        """For one sequence that continues `prompt_ids` (whose text it does not repeat); options as `detokenizing`.

        `hidden`: bytes with which the output begins and that are not shown, because they were taken back from the
        prompt (`healing.roll_back`).
        """
        return self.detokenizing(**options).open(prompt_ids, hidden)  # type: ignore[arg-type]

    def decode(
        self,
        ids: Sequence[int],
        skip_special_tokens: bool = True,
        spaces_between_special_tokens: bool = True,
        print_eos_token: bool | None = None,
    ) -> str:
        """The text of all ids; unknown ids have none. Options as `detokenizer`."""
        stream = self.detokenizer(
            skip_special_tokens=skip_special_tokens,
            spaces_between_special_tokens=spaces_between_special_tokens,
            print_eos_token=print_eos_token,
        )
        return stream.push(ids) + stream.flush()


def _check_unicode(text: str) -> None:
    if text.isascii():
        return
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InvalidRequest(
            f"the text is not valid Unicode: lone surrogate U+{ord(text[error.start]):04X} at character {error.start}"
        ) from None
