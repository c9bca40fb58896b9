"""Whether a client's grammar can be compiled, and within which bounds: done in a process whose time and memory are
limited, before any engine gets it."""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import cached_property
from time import thread_time
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lightllmd.errors import InvalidRequest
from lightllmd.grammar.compiler import GrammarCompiler
from lightllmd.grammar.ebnf.translation import translated
from lightllmd.grammar.native import native
from lightllmd.ipc.messages import Grammar

MAX_TEXT = 512 << 10  # characters of a grammar
MAX_TRANSLATED = 2 << 20  # characters of the EBNF that is made of it
MAX_COMPILED = 64 << 20  # bytes
SECONDS = 3.0  # of CPU time
MATCH_SECONDS = 0.01  # of CPU time, that a token may take
_ATTEMPTS = 3
_WALK, _WALK_SECONDS = 256, 0.5  # tokens, and seconds of CPU time, that are tried
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
        if not self._compiler.writes:
            why = "this model's tokenizer joins tokens in a way of its own, so that it is not known what each writes"
            raise _refusal(field, why, given)
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
        self._try(compiled, given, field)
        return grammar

    def _try(self, compiled: Any, given: Grammar, field: str) -> None:
        """Walks along random tokens, and along the last that are allowed: what takes long to match would take it in a
        step of an engine."""
        begun = thread_time()
        for draw in (random.Random(0).choice, lambda ids: ids[-1]):
            walk = _Walk(compiled, self._compiler)
            while walk.steps < _WALK and thread_time() - begun < _WALK_SECONDS:
                allowed = walk.allowed()
                if not len(allowed):
                    if not walk.steps and not walk.ends:
                        raise _refusal(field, "no text that this model can write matches it", given)
                    break
                walk.take(int(draw(allowed)))
                if walk.slowest > MATCH_SECONDS:
                    slow = f"a token takes {1e3 * walk.slowest:.0f} ms to match, more than {1e3 * MATCH_SECONDS:.0f} ms"
                    raise _refusal(field, slow, given)


class _Walk:
    """One text that a grammar allows, token by token."""

    def __init__(self, compiled: Any, compiler: GrammarCompiler) -> None:
        self.steps, self.slowest, self.ends = 0, 0.0, False
        self._matcher = native().GrammarMatcher(compiled, None, False, -1, None)
        self._bits, self._compiler = np.zeros((1, compiler.words), np.int32), compiler

    def allowed(self) -> NDArray[np.int64]:
        """The ids that may come next, but for those that end a generation; `ends`: those may."""
        self._clock(lambda: self._matcher.fill_next_token_bitmask(self._bits, 0, False))
        bits = np.unpackbits(self._bits[0].view(np.uint8), bitorder="little")[: self._compiler.vocab_size]
        self.ends = bool(bits[self._compiler.eos_ids].any())
        bits[self._compiler.eos_ids] = 0
        return bits.nonzero()[0]

    def take(self, token: int) -> None:
        """It comes next."""
        self._clock(lambda: self._matcher.accept_token(token, False), lambda: self._matcher.rollback(1))
        self.steps += 1

    def _clock(self, work: Callable[[], object], undo: Callable[[], object] = lambda: None) -> None:
        """The first time may be that of memory which the process had not touched before, so that what is slow is done
        again."""
        least = float("inf")
        for attempt in range(_ATTEMPTS):
            if attempt:
                undo()
            begun = thread_time()
            work()
            least = min(least, thread_time() - begun)
            if not MATCH_SECONDS < least < 10 * MATCH_SECONDS:
                break
        self.slowest = max(self.slowest, least)


def refuse_long(grammar: Grammar, field: str) -> None:
    """Raises InvalidRequest for a grammar that is not even looked at."""
    if len(grammar.text) > MAX_TEXT:
        raise _refusal(field, f"has {len(grammar.text)} characters, more than {MAX_TEXT}", grammar)


def _refusal(field: str, why: str, grammar: Grammar) -> InvalidRequest:
    text = grammar.text if len(grammar.text) <= _SHOWN else grammar.text[: _SHOWN - 1] + "…"
    return InvalidRequest(f"{field}: {why}; got {grammar.kind} {text!r}", param=field)
