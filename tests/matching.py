"""Texts that xgrammar's matcher lets a client have, token by token, chosen at random."""

from __future__ import annotations

import random

import numpy as np

from lightllmd.grammar.compiler import GrammarCompiler
from lightllmd.grammar.native import native
from lightllmd.ipc.messages import Grammar

BYTES: list[bytes | None] = [bytes([byte]) for byte in range(256)]  # a vocabulary; 256 ends a text
_CLOSING = ('"', "}", "]", '",', '"}', '"]', "},", "],")


class Matching:
    """Of one vocabulary, whose token `end` ends a text."""

    def __init__(self, vocabulary: list[bytes | None] | None = None, end: int = 256) -> None:
        self._tokens = [*BYTES, None] if vocabulary is None else vocabulary
        self._end = end
        self._compiler = GrammarCompiler(self._tokens, len(self._tokens), [end])
        self._closing = {self._tokens.index(one.encode()) for one in _CLOSING if one.encode() in self._tokens}
        self._bits = np.zeros((1, -(-len(self._tokens) // 32)), np.int32)

    def text(self, ebnf: str, draw: random.Random, most: int = 500) -> bytes | None:
        """One that ended within so many tokens, or None. What closes a string, an object or an array is preferred now
        and then, more so in a long text."""
        matcher = native().GrammarMatcher(self._compiler.compile(Grammar("ebnf", ebnf)), None, False, -1, None)
        made = b""
        for step in range(most):
            matcher.fill_next_token_bitmask(self._bits, 0, False)
            bits = np.unpackbits(self._bits.view(np.uint8), bitorder="little")[: len(self._tokens)]
            allowed = np.flatnonzero(bits)
            assert len(allowed), f"nothing may follow {made!r}"
            closing = [token for token in self._closing if bits[token]]
            if bits[self._end] and draw.random() < 0.5:
                return made
            preferred = closing and draw.random() < (0.2 if step < most // 2 else 0.7)
            token = int(draw.choice(closing if preferred else allowed))
            if token == self._end:
                return made
            assert matcher.accept_token(token, False)
            made += self._tokens[token] or b""
            if matcher.is_terminated():
                return made
        return None

    def accepts(self, ebnf: str, text: str) -> bool:
        """Whether the text may be generated, of a vocabulary of bytes."""
        matcher = native().GrammarMatcher(self._compiler.compile(Grammar("ebnf", ebnf)), None, False, -1, None)
        for byte in text.encode():
            if matcher.is_terminated() or not matcher.accept_token(byte, False):
                return False
        return bool(matcher.is_terminated() or matcher.accept_token(self._end, False))
