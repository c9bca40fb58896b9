"""What grammars allow, row by row of the running batch."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lightllmd.grammar.compiler import GrammarCompiler
from lightllmd.grammar.native import native
from lightllmd.ipc.messages import Grammar, SamplingParams

CACHE = 256 << 20  # bytes of compiled grammars that are kept


class CompiledGrammars:
    """Those of one model, by content; the least recently used ones go first."""

    def __init__(self, compiler: Callable[[], GrammarCompiler]) -> None:
        """`compiler` is called once, for the first request with a grammar."""
        self._make = compiler
        self._kept: OrderedDict[Grammar, Any] = OrderedDict()
        self._size = 0  # bytes

    @cached_property
    def _compiler(self) -> GrammarCompiler:
        return self._make()

    def row(self, params: SamplingParams) -> GrammarRow:
        """Of one sequence of such a request."""
        grammar = params.grammar
        assert grammar is not None
        return GrammarRow(self.compiled(grammar), self._compiler, params.ignore_eos)

    def compiled(self, grammar: Grammar) -> Any:
        """xgrammar's CompiledGrammar. Raises InvalidRequest for one that was not checked."""
        found = self._kept.get(grammar)
        if found is None:
            found = self._kept[grammar] = self._compiler.compile(grammar)
            self._size += found.memory_size_bytes()
            while self._size > CACHE and len(self._kept) > 1:
                _, gone = self._kept.popitem(last=False)
                self._size -= gone.memory_size_bytes()
        self._kept.move_to_end(grammar)
        return found


class GrammarRow:
    """What the grammar of one sequence allows behind the tokens that it has. Nothing of it is stored: it is advanced by
    the emitted tokens again after a replay, and goes back where beams take another past."""

    def __init__(self, compiled: Any, compiler: GrammarCompiler, ignore_eos: bool) -> None:
        self._compiled, self._compiler, self._ignore_eos = compiled, compiler, ignore_eos
        self._matcher = native().GrammarMatcher(compiled, None, False, -1, None)
        self._accepted: list[int] = []  # tokens that the matcher has
        self._bits: NDArray[np.int32] = np.zeros((1, -(-compiler.vocab_size // 32)), np.int32)

    def fork(self) -> GrammarRow:
        """Of another sequence with the same grammar, at its beginning."""
        return GrammarRow(self._compiled, self._compiler, self._ignore_eos)

    def mask(self, emitted: Sequence[int]) -> bytes:
        """As `Step.masks`. Where the grammar has ended, or the tokens left it, an end alone is allowed."""
        self._advance(emitted)
        if len(self._accepted) == len(emitted) and not self._matcher.is_terminated():
            self._matcher.fill_next_token_bitmask(self._bits, 0, False)
        else:
            self._bits[:] = 0
        ends = self._compiler.eos_ids
        if self._ignore_eos and self._bits.any():
            kept = self._bits.copy()
            _clear(self._bits[0], ends)
            if not self._bits.any():
                self._bits = kept
        elif not self._bits.any():
            _set(self._bits[0], ends)
        return self._bits.tobytes()

    def _advance(self, emitted: Sequence[int]) -> None:
        accepted = self._accepted
        common = 0
        for ours, theirs in zip(accepted, emitted, strict=False):
            if ours != theirs:
                break
            common += 1
        if common < len(accepted):
            self._matcher.rollback(len(accepted) - common)
            del accepted[common:]
        for token in emitted[common:]:
            if self._matcher.is_terminated() or not self._matcher.accept_token(token, False):
                break
            accepted.append(token)


def _set(bits: NDArray[np.int32], tokens: Sequence[int]) -> None:
    for token in tokens:
        bits[token // 32] |= np.int32(np.uint32(1 << token % 32).view(np.int32))


def _clear(bits: NDArray[np.int32], tokens: Sequence[int]) -> None:
    for token in tokens:
        bits[token // 32] &= ~np.uint32(1 << token % 32).view(np.int32)
