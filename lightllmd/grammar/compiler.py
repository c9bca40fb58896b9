"""From a grammar's text to what matchers are made of, for one model's vocabulary."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from lightllmd.errors import InvalidRequest
from lightllmd.grammar.native import native
from lightllmd.ipc.messages import Grammar

_RAW = 0  # xgrammar's VocabType: tokens are given as the bytes of the text that they make
_SHOWN = 200  # characters of what xgrammar says that a refusal repeats
# Between two tokens of JSON: indents 9 levels by 2, and brings a model to an end that writes nothing else.
_MOST_WHITESPACE = 20  # characters
_JSON_OBJECT = '{"type": "object"}'
_SOURCE = re.compile(r"^.*?\.cc:\d+: (Check failed: \(.*?\) is false: )?")  # where xgrammar found the fault
_ESCAPED = {'"': '\\"', "\\": "\\\\", "\n": "\\n", "\r": "\\r", "\t": "\\t"}


class GrammarCompiler:
    """Of one vocabulary. Holds no compiled grammar. May be used from any thread."""

    def __init__(self, vocabulary: Sequence[bytes | None], vocab_size: int, eos_ids: Iterable[int]) -> None:
        """`vocabulary`: the bytes of each token by id, None for one that no text is made of. `vocab_size`: the model's
        logits, which may be more or fewer. `eos_ids` end a generation, where the grammar may end."""
        ends = sorted({number for number in eos_ids if 0 <= number < vocab_size})
        tokens = [raw or b"" for raw in vocabulary[:vocab_size]]
        tokens += [b""] * (vocab_size - len(tokens))
        for number in ends:
            tokens[number] = b""
        self.eos_ids, self.vocab_size = ends, vocab_size
        self.words = -(-vocab_size // 32)  # int32 of a mask
        allowed = np.zeros(32 * self.words, np.bool_)
        self.nothing = np.packbits(allowed, bitorder="little").tobytes()  # the mask that allows no token
        allowed[ends] = True
        self.ends = np.packbits(allowed, bitorder="little").tobytes()  # the one that allows what ends a generation
        words = np.frombuffer(self.ends, np.int32)
        self.but_ends = [(int(word), ~words[word]) for word in words.nonzero()[0]]  # word of a mask, its other bits
        self._native = native()
        self._tokens = self._native.TokenizerInfo(tokens, _RAW, vocab_size, ends, False)

    def compile(self, grammar: Grammar, threads: int = 1) -> Any:
        """xgrammar's CompiledGrammar. Raises InvalidRequest, whose message does not name the field."""
        compiler = self._native.GrammarCompiler(self._tokens, threads, False, -1, False)
        text = grammar.text
        try:
            match grammar.kind:
                case "json_object":
                    return _of_schema(compiler, _JSON_OBJECT)
                case "json_schema":
                    return _of_schema(compiler, text)
                case "regex":
                    return compiler.compile_regex(text)
                case "ebnf":
                    return compiler.compile_grammar_from_strings(text, "root")
                case "choice":
                    return compiler.compile_grammar_from_strings(choices(json.loads(text)), "root")
                case "structural_tag":
                    return compiler.compile_structural_tag(text)
        except (RuntimeError, ValueError, TypeError) as refused:
            raise InvalidRequest(_words(refused)) from None


def _of_schema(compiler: Any, schema: str) -> Any:
    """White space between tokens as the model likes, within a bound; properties that the schema does not name only if
    it says so."""
    any_whitespace, indent, separators, strict, any_order = True, None, None, True, False
    return compiler.compile_json_schema(schema, any_whitespace, indent, separators, strict, _MOST_WHITESPACE, any_order)


def choices(texts: Sequence[str]) -> str:
    """The EBNF of one of the texts. Raises ValueError."""
    for text in texts:
        if "\0" in text:
            raise ValueError(f"a choice has the character U+0000: {text[:40]!r}")
    return "root ::= " + " | ".join(f'"{"".join(map(_escape, text))}"' for text in texts)


def _escape(character: str) -> str:
    if character in _ESCAPED:
        return _ESCAPED[character]
    return f"\\x{ord(character):02x}" if ord(character) < 0x20 or ord(character) == 0x7F else character


def _words(refused: Exception) -> str:
    """What xgrammar says, without the place in its sources and the stack."""
    text = " ".join(str(refused).split()) or type(refused).__name__
    text = _SOURCE.sub("", text)
    return text if len(text) <= _SHOWN else text[: _SHOWN - 1] + "…"
