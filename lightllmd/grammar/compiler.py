"""From a grammar's text to what matchers are made of, for one model's vocabulary."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from lightllmd.errors import InvalidRequest
from lightllmd.grammar.native import native
from lightllmd.ipc.messages import Grammar

_RAW = 0  # xgrammar's VocabType: tokens are given as the bytes of the text that they make
# What a token without text has: no UTF-8 has such a byte, so that no text matches it, but a structural tag may name its
# id. xgrammar never allows a token without bytes.
_NO_TEXT = b"\xff"
_SHOWN = 200  # characters of what xgrammar says that a refusal repeats
_SOURCE = re.compile(r"^.*?\.cc:\d+: (Check failed: \(.*?\) is false: )?")  # where xgrammar found the fault


class GrammarCompiler:
    """Of one vocabulary. Holds no compiled grammar. May be used from any thread."""

    def __init__(
        self,
        vocabulary: Sequence[bytes | None],
        vocab_size: int,
        eos_ids: Iterable[int],
        *,
        serialised: bytes | None = None,
    ) -> None:
        """`vocabulary`: the bytes of each token by id, None for one that no text is made of. `vocab_size`: the model's
        logits, which may be more or fewer. `eos_ids` end a generation, where the grammar may end. `serialised`: see
        `restored`."""
        ends = sorted({number for number in eos_ids if 0 <= number < vocab_size})
        self.eos_ids, self.vocab_size = ends, vocab_size
        self.writes = serialised is not None or any(vocabulary)  # it is known what tokens add to a text
        self.words = -(-vocab_size // 32)  # int32 of a mask
        allowed = np.zeros(32 * self.words, np.bool_)
        self.nothing = np.packbits(allowed, bitorder="little").tobytes()  # the mask that allows no token
        allowed[ends] = True
        self.ends = np.packbits(allowed, bitorder="little").tobytes()  # the one that allows what ends a generation
        words = np.frombuffer(self.ends, np.int32)
        self.but_ends = [(int(word), ~words[word]) for word in words.nonzero()[0]]  # word of a mask, its other bits
        self._native = native()
        if serialised is not None:
            self._tokens = self._native.TokenizerInfo.deserialize_json(serialised.decode())
            return
        tokens = [raw or _NO_TEXT for raw in vocabulary[:vocab_size]]
        tokens += [b""] * (vocab_size - len(tokens))
        for number in ends:
            tokens[number] = b""
        self._tokens = self._native.TokenizerInfo(tokens, _RAW, vocab_size, ends, False)

    @classmethod
    def restored(cls, serialised: bytes, vocab_size: int, eos_ids: Iterable[int]) -> GrammarCompiler:
        """From what `serialised` gave in another process, without the interpreter's lock."""
        return cls([], vocab_size, eos_ids, serialised=serialised)

    def serialised(self) -> bytes:
        """The vocabulary."""
        return str(self._tokens.serialize_json()).encode()

    def compile(self, grammar: Grammar, threads: int = 1) -> Any:
        """xgrammar's CompiledGrammar. Raises InvalidRequest, whose message does not name the field."""
        compiler = self._native.GrammarCompiler(self._tokens, threads, False, -1, False)
        text = grammar.text
        try:
            match grammar.kind:
                case "ebnf":
                    return compiler.compile_grammar_from_strings(text, "root")
                case "structural_tag":
                    return compiler.compile_structural_tag(text)
        except (RuntimeError, ValueError, TypeError) as refused:
            raise InvalidRequest(_words(refused)) from None
        raise InvalidRequest(f"a {grammar.kind} has to be translated first")


def _words(refused: Exception) -> str:
    """What xgrammar says, without the place in its sources and the stack."""
    text = " ".join(str(refused).split()) or type(refused).__name__
    text = _SOURCE.sub("", text)
    return text if len(text) <= _SHOWN else text[: _SHOWN - 1] + "…"
