"""What a tokenizer's class says of its tokens is exported so that a stream of them reads as the class decodes them."""

from __future__ import annotations

import random
from typing import Any

import pytest
from transformers import AddedToken, PreTrainedTokenizer

from lightllmd.code_host.exporting import NotConcatenating, export
from lightllmd.code_host.tokenizer import OwnTokenizer
from lightllmd.errors import InvalidRequest, RequestFailed
from lightllmd.text.pairs import PairFrame
from lightllmd.text.vocabulary import BYTEWISE

BYTES = [bytes([number]) for number in range(256)]
WORDS = [b" the", " größe".encode(), "世".encode(), "👩".encode()[:3], b"ab", b"\xff\xfe"]


class Table(PreTrainedTokenizer):
    """Its tokens are those of a list, the longest that fits first."""

    table: list[Any] = [*BYTES, *WORDS]

    def __init__(self, **rest: Any) -> None:
        self.ids = {token: number for number, token in enumerate(self.table)}
        super().__init__(**rest)

    @property
    def vocab_size(self) -> int:
        return len(self.table)

    def get_vocab(self) -> dict[Any, int]:
        return self.ids | self.added_tokens_encoder

    def _tokenize(self, text: str, **_: Any) -> list[Any]:
        raw, found = self.raw(text), []
        while raw:
            token = max((token for token in self.table if raw.startswith(token)), key=len, default=None)
            found.append(token or self.table[63])
            raw = raw[len(found[-1]) :]
        return found

    def raw(self, text: str) -> Any:
        return text.encode()

    def _convert_token_to_id(self, token: Any) -> int | None:
        return self.ids.get(token)

    def _convert_id_to_token(self, index: int) -> Any:
        return self.table[index]

    def convert_tokens_to_string(self, tokens: list[Any]) -> str:
        return b"".join(token if isinstance(token, bytes) else token.encode() for token in tokens).decode(
            errors="replace"
        )


def byte_alphabet() -> list[str]:
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    return list(bytes_to_unicode().values())


class ByteLevel(Table):
    """GPT-2's names of bytes."""

    table = sorted(byte_alphabet())

    def raw(self, text: str) -> str:
        from transformers.convert_slow_tokenizer import bytes_to_unicode

        return "".join(bytes_to_unicode()[byte] for byte in text.encode())

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        from transformers.convert_slow_tokenizer import bytes_to_unicode

        back = {letter: byte for byte, letter in bytes_to_unicode().items()}
        return bytes(back[letter] for token in tokens for letter in token).decode(errors="replace")


class Pieces(Table):
    """sentencepiece's names, bytes for what has no piece, and no space before a text."""

    table = [*(f"<0x{number:02X}>" for number in range(256)), "▁", "▁the", "e", "ü", "▁▁▁", "世"]

    def _tokenize(self, text: str, **_: Any) -> list[str]:
        rest, found = "▁" + text.replace(" ", "▁"), []
        while rest:
            piece = max((piece for piece in self.table[256:] if rest.startswith(piece)), key=len, default=None)
            found += [piece] if piece else [f"<0x{byte:02X}>" for byte in rest[0].encode()]
            rest = rest[len(piece or rest[0]) :]
        return found

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        text, waiting = "", b""
        for token in [*tokens, ""]:
            if token.startswith("<0x"):
                waiting += bytes([int(token[3:5], 16)])
                continue
            text += waiting.decode(errors="replace") + token.replace("▁", " ")
            waiting = b""
        plain = tokens and not tokens[0].startswith("<0x")
        return text.removeprefix(" ") if plain else text


class Spaced(Table):
    """transformers' own way where a class says nothing: words with spaces between them."""

    table = ["one", "two", "three", "?"]

    def _tokenize(self, text: str, **_: Any) -> list[str]:
        return [word if word in self.ids else "?" for word in text.split()]

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        return " ".join(tokens)


class Backwards(Table):
    def convert_tokens_to_string(self, tokens: list[bytes]) -> str:
        return super().convert_tokens_to_string(tokens[::-1])


def own(made: Any) -> OwnTokenizer:
    return OwnTokenizer(made, export(made))


@pytest.mark.parametrize("kind", [Table, ByteLevel, Pieces, Spaced])
def test_a_stream_reads_as_the_class_decodes(kind: type[Table]) -> None:
    made = kind(eos_token="<end>", extra_special_tokens=["[x]"])
    tokenizer, draw = own(made), random.Random(1)
    eos = made.convert_tokens_to_ids("<end>")
    assert tokenizer.special_ids == {eos, made.convert_tokens_to_ids("[x]")}
    assert tokenizer.eos_ids == [eos]
    for _ in range(300):
        ids = draw.choices(range(len(kind.table)), k=draw.randint(1, 30))
        stream = tokenizer.detokenizer()
        assert "".join(map(stream.push, [[number] for number in ids])) + stream.flush() == made.decode(ids)
        assert tokenizer.decode([*ids, eos]) == made.decode(ids)
    assert tokenizer.decode([eos], skip_special_tokens=False) == "<end>"
    for text in ("one two", " the größe 世 👩 ", "a\n\n<end>b"):
        assert tokenizer.encode(text) == made.encode(text)
        assert tokenizer.encode(text, add_special_tokens=False) == made.encode(text, add_special_tokens=False)


def test_tokens_that_share_characters_have_bytes() -> None:
    tokenizer = own(Table())
    assert [tokenizer.token_bytes(number) for number in (65, 228, 256)] == [b"A", b"\xe4", b" the"]


def test_added_tokens_that_are_not_special_are_shown_and_matched() -> None:
    made = Table()
    made.add_tokens([AddedToken("tool!", special=False)])
    tokenizer = own(made)
    number = made.convert_tokens_to_ids("tool!")
    assert number in tokenizer.vocabulary.added_ids
    assert number not in tokenizer.special_ids
    assert tokenizer.decode([number]) == "tool!"


def test_special_tokens_that_the_class_keeps_to_itself_are_found() -> None:
    """As Qwen's first tokenizer has it: no other list names them."""

    class Own(Table):
        table = [*BYTES, "<|im_start|>", "<|im_end|>"]

        def _tokenize(self, text: str, **_: Any) -> list[Any]:
            return [bytes([byte]) for byte in text.encode()]

        def _decode(self, token_ids: Any, skip_special_tokens: bool = False, **_: Any) -> str:
            kept = [number for number in token_ids if number < 256 or not skip_special_tokens]
            return self.convert_tokens_to_string([self.table[number] for number in kept])

    tokenizer = own(Own())
    assert tokenizer.special_ids == {256, 257}
    assert tokenizer.decode([65, 257]) == "A"
    assert tokenizer.decode([65, 257], skip_special_tokens=False, spaces_between_special_tokens=False) == "A<|im_end|>"


def test_one_whose_tokens_do_not_add_up_is_refused_with_an_example() -> None:
    with pytest.raises(NotConcatenating, match=r"decoding is not putting together .*, its tokens one by one are"):
        export(Backwards())


def test_an_object_that_is_no_tokenizer_is_refused() -> None:
    with pytest.raises(TypeError, match="no tokenizer of transformers"):
        export(object())


def test_what_it_can_not_encode_is_the_models_fault() -> None:
    class Raising(Table):
        def _tokenize(self, text: str, **_: Any) -> list[Any]:
            if "odd" in text:
                raise KeyError("odd")
            return super()._tokenize(text)

    with pytest.raises(RequestFailed, match="the model's own tokenizer can't encode this: KeyError: 'odd'"):
        own(Raising()).encode("an odd text")


def test_a_template_that_is_wrong_is_told_and_chats_are_refused() -> None:
    exported = export(Table(chat_template="{% if %}"))
    assert exported.templates == {}
    assert "chat requests will be refused" in exported.warnings[0]


def test_templates_are_rendered_with_its_special_tokens() -> None:
    made = Table(bos_token="<s>", chat_template="{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}")
    tokenizer = own(made)
    chat = [{"role": "user", "content": "Hi"}]
    assert tokenizer.encode_chat(chat) == [made.bos_token_id, *b"Hi"]
    assert made.apply_chat_template(chat, tokenize=False) == tokenizer.render_chat(chat)


class Chatting(Table):
    """As GLM-4's: no template, the class makes the prompt."""

    def apply_chat_template(self, conversation: Any, tokenize: bool = True, **options: Any) -> Any:
        if conversation[0]["role"] == "odd":
            raise ValueError("no such role")
        text = "".join(f"<{turn['role']}>{turn['content']}" for turn in conversation)
        text += "<assistant>" if options.get("add_generation_prompt") else ""
        return self.encode(text, add_special_tokens=False) if tokenize else text


def test_a_class_that_makes_its_chats_itself_is_asked_for_them() -> None:
    tokenizer = own(Chatting())
    assert tokenizer.chat_template is not None
    assert tokenizer.chat_template.source is None
    chat = [{"role": "user", "content": "Hi"}]
    assert tokenizer.render_chat(chat, add_generation_prompt=True) == "<user>Hi<assistant>"
    assert tokenizer.encode_chat(chat, add_generation_prompt=False) == [*b"<user>Hi"]
    with pytest.raises(InvalidRequest, match="the model's tokenizer refuses them: ValueError: no such role"):
        tokenizer.render_chat([{"role": "odd", "content": ""}])
    with pytest.raises(InvalidRequest, match="continue_final_message"):
        tokenizer.render_chat(chat, continue_final_message=True)


def test_chats_that_are_not_the_tokens_of_their_text_are_refused() -> None:
    class Odd(Chatting):
        def apply_chat_template(self, conversation: Any, tokenize: bool = True, **options: Any) -> Any:
            made = super().apply_chat_template(conversation, tokenize, **options)
            return [7, *made] if tokenize else made

    exported = export(Odd())
    assert not exported.own_chat
    assert "are refused" in exported.warnings[0]


def test_what_stands_around_two_texts_is_found() -> None:
    class Framed(Table):
        def build_inputs_with_special_tokens(self, first: list[int], second: list[int] | None = None) -> list[int]:
            ends = [self.eos_token_id]
            return first + ends if second is None else [self.bos_token_id, *first, *ends, *ends, *second, *ends]

        def create_token_type_ids_from_sequences(self, first: list[int], second: list[int] | None = None) -> list[int]:
            return [0] * len(self.build_inputs_with_special_tokens(first, second))

    made = Framed(bos_token="<s>", eos_token="<end>")
    bos, eos = made.bos_token_id, made.eos_token_id
    assert made("a", "b")["input_ids"] == [bos, 97, eos, eos, 98, eos]
    assert own(made).pair_frame == PairFrame([bos], [eos, eos], [eos])
    assert own(Table()).pair_frame == PairFrame([], [], [])


def test_one_that_encodes_no_text_at_all_is_refused() -> None:
    class Deaf(Table):
        def _tokenize(self, text: str, **_: Any) -> list[Any]:
            raise KeyError("deaf")

    with pytest.raises(KeyError, match="deaf"):
        export(Deaf())


def test_bytes_that_make_no_character_read_as_the_class_decodes_them() -> None:
    """sentencepiece has a replacement for each byte, Python's decoder one for each character that is cut."""
    assert export(Table()).byte_errors == "replace"

    class Bytewise(Pieces):
        def convert_tokens_to_string(self, tokens: list[str]) -> str:
            text, run = "", b""
            for token in [*tokens, ""]:
                if token.startswith("<0x"):
                    run += bytes([int(token[3:5], 16)])
                    continue
                text += run.decode(errors=BYTEWISE) + token.replace("▁", " ")
                run = b""
            return text.removeprefix(" ") if tokens and not tokens[0].startswith("<0x") else text

    assert export(Bytewise()).byte_errors == BYTEWISE
