"""Whether a client's grammar can be compiled, and within which bounds: done in a process whose time and memory are
limited, before any engine gets it."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property

import numpy as np

from lightllmd.errors import InvalidRequest
from lightllmd.grammar.compiler import GrammarCompiler
from lightllmd.grammar.ebnf.translation import translated
from lightllmd.grammar.native import native
from lightllmd.ipc.messages import Grammar

MAX_TEXT = 512 << 10  # characters of a grammar
MAX_TRANSLATED = 2 << 20  # characters of the EBNF that is made of it
MAX_COMPILED = 64 << 20  # bytes
SECONDS = 3.0  # of CPU time
_SHOWN = 80  # characters of a refused grammar that a message repeats


class GrammarCheck:
    """Of one model. `compiler` is called for the first grammar."""

    def __init__(self, compiler: Callable[[], GrammarCompiler]) -> None:
        self._make = compiler

    @cached_property
    def _compiler(self) -> GrammarCompiler:
        return self._make()

    def check(self, given: Grammar, field: str) -> Grammar:
        """What the engine gets of it. Raises InvalidRequest, which names the field, the value and the bound."""
        refuse_long(given, field)
        if not self._compiler.eos_ids:
            raise _refusal(field, "the model has no id that ends a generation, so that nothing could end it", given)
        grammar = translated(given, field)
        if len(grammar.text) > MAX_TRANSLATED:
            raise _refusal(
                field, f"makes a grammar of {len(grammar.text)} characters, more than {MAX_TRANSLATED}", given
            )
        try:
            compiled = self._compiler.compile(grammar)
        except InvalidRequest as refused:
            raise _refusal(field, refused.message, given) from None
        size = compiled.memory_size_bytes()
        if size > MAX_COMPILED:
            raise _refusal(field, f"takes {size >> 20} MB compiled, more than {MAX_COMPILED >> 20} MB", given)
        bits = np.zeros((1, self._compiler.words), np.int32)
        native().GrammarMatcher(compiled, None, False, -1, None).fill_next_token_bitmask(bits, 0, False)
        if not bits.any():
            raise _refusal(field, "no text that this model can write matches it", given)
        return grammar


def refuse_long(grammar: Grammar, field: str) -> None:
    """Raises InvalidRequest for a grammar that is not even looked at."""
    if len(grammar.text) > MAX_TEXT:
        raise _refusal(field, f"has {len(grammar.text)} characters, more than {MAX_TEXT}", grammar)


def _refusal(field: str, why: str, grammar: Grammar) -> InvalidRequest:
    text = grammar.text if len(grammar.text) <= _SHOWN else grammar.text[: _SHOWN - 1] + "…"
    return InvalidRequest(f"{field}: {why}; got {grammar.kind} {text!r}", param=field)
