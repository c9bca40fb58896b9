"""What grammars allow, row by row of the running batch."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from time import thread_time
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lightllmd.grammar.compiler import GrammarCompiler
from lightllmd.grammar.native import native
from lightllmd.ipc.messages import Grammar, SamplingParams

MOST_SECONDS = 0.1  # of CPU time, that a mask may take: a thousand times what is usual
CACHE = 256 << 20  # bytes of compiled grammars that are kept


class CompiledGrammars:
    """Those of one model, by content; the least recently used ones go first."""

    def __init__(self, compiler: Callable[[], GrammarCompiler]) -> None:
        """`compiler` is called once, for the first request with a grammar, unless `use` came before."""
        self._make = compiler
        self._compiler: GrammarCompiler | None = None
        self._kept: OrderedDict[Grammar, Any] = OrderedDict()
        self.size = 0  # bytes
        self.hits = 0  # requests whose grammar was here

    @property
    def ready(self) -> bool:
        """There is a compiler."""
        return self._compiler is not None

    def use(self, compiler: GrammarCompiler) -> None:
        """From now on."""
        self._compiler = compiler

    def has(self, grammar: Grammar) -> bool:
        """Whether it is compiled. It is the last to go then."""
        if grammar not in self._kept:
            return False
        self._kept.move_to_end(grammar)
        self.hits += 1
        return True

    def compile(self, grammar: Grammar) -> Any:
        """xgrammar's CompiledGrammar; may be called from any thread. Raises InvalidRequest for one that was not
        checked."""
        if self._compiler is None:
            self._compiler = self._make()
        return self._compiler.compile(grammar)

    def add(self, grammar: Grammar, compiled: Any) -> None:
        """It is kept from now on, as the last to go."""
        self._kept[grammar] = compiled
        self.size += compiled.memory_size_bytes()
        while self.size > CACHE and len(self._kept) > 1:
            _, gone = self._kept.popitem(last=False)
            self.size -= gone.memory_size_bytes()

    def row(self, params: SamplingParams) -> GrammarRow:
        """Of one sequence of such a request. What is not compiled is now. Raises InvalidRequest."""
        grammar = params.grammar
        assert grammar is not None
        if grammar not in self._kept:
            self.add(grammar, self.compile(grammar))
        assert self._compiler is not None
        return GrammarRow(self._kept[grammar], self._compiler, params.ignore_eos, beam=False)


class GrammarRow:
    """What the grammar of one sequence allows behind the tokens that it has. Nothing of it is stored: it is advanced by
    the emitted tokens again after a replay (many of them beforehand, by `GrammarGate`), and goes back where a beam
    takes another past."""

    def __init__(self, compiled: Any, compiler: GrammarCompiler, ignore_eos: bool, beam: bool) -> None:
        """`ignore_eos`: the text goes on as long as the grammar does. `beam`: what was emitted may become other."""
        self._compiled, self._compiler, self._ignore_eos, self._beam = compiled, compiler, ignore_eos, beam
        self._matcher = native().GrammarMatcher(compiled, None, False, -1, None)
        self._accepted: list[int] = []  # tokens that the matcher has
        self._bits: NDArray[np.int32] = np.zeros((1, compiler.words), np.int32)
        self.overdue = False  # a mask took so long that no further one is made

    def fork(self, beam: bool) -> GrammarRow:
        """Of another sequence with the same grammar, at its beginning."""
        return GrammarRow(self._compiled, self._compiler, self._ignore_eos, beam)

    def mask(self, emitted: Sequence[int]) -> bytes:
        """As `Masks`. Where the grammar has ended, or the tokens left it, only what ends a generation is allowed."""
        self.advance(emitted)
        ends, nothing = self._compiler.ends, self._compiler.nothing
        if self.overdue or len(self._accepted) != len(emitted) or self._matcher.is_terminated():
            return ends
        begun = thread_time()
        self._matcher.fill_next_token_bitmask(self._bits, 0, False)
        self.overdue = thread_time() - begun > MOST_SECONDS
        if self._ignore_eos:
            for word, others in self._compiler.but_ends:
                self._bits[0, word] &= others
        mask = self._bits.tobytes()
        return ends if mask == nothing else mask

    def advance(self, emitted: Sequence[int]) -> None:
        """To behind these tokens, 2 to 10 µs for each that is new. From any thread, as long as no other has the row."""
        accepted, matcher = self._accepted, self._matcher
        if self._beam:
            common = next(
                (at for at, pair in enumerate(zip(accepted, emitted, strict=False)) if pair[0] != pair[1]), None
            )
            common = min(len(accepted), len(emitted)) if common is None else common
            if common < len(accepted):
                matcher.rollback(len(accepted) - common)
                del accepted[common:]
        for token in emitted[len(accepted) :]:
            if matcher.is_terminated() or not matcher.accept_token(token, False):
                break
            accepted.append(token)
