"""``python -m lightllmd.engine.grammar_vocabulary PARENT_PID``: the vocabulary of a plan's model, as xgrammar takes it.

Reading a tokenizer's files takes half a second of one lock for a vocabulary of 128,000 tokens, in which an engine would
make no step. So a process of its own does it, reads the plan from standard input and writes to standard output what an
engine restores without that lock.
"""

from __future__ import annotations

import os
import subprocess
import sys

from lightllmd.config.plan import Plan, decode_plan, encode_plan
from lightllmd.errors import EngineError, LightllmdError
from lightllmd.grammar.compiler import GrammarCompiler
from lightllmd.ipc.child_setup import die_with_parent
from lightllmd.text.healing import writable
from lightllmd.text.tokenizer import load_tokenizer

_SECONDS = 300.0  # by the clock
_NICE = 10


def compiler_here(plan: Plan) -> GrammarCompiler:
    """Of the plan's model, read in this process. Raises ConfigInvalid, ModelChanged."""
    return GrammarCompiler(writable(load_tokenizer(plan, encodes=False)), plan.vocab_size, plan.eos_id)


def compiler_of(plan: Plan) -> GrammarCompiler:
    """As `compiler_here`, read in another process, where there are files to read. Raises EngineError."""
    if plan.model is None:
        return compiler_here(plan)
    command = [sys.executable, "-m", "lightllmd.engine.grammar_vocabulary", str(os.getpid())]
    try:
        done = subprocess.run(command, input=encode_plan(plan), stdout=subprocess.PIPE, timeout=_SECONDS, check=True)
    except (OSError, subprocess.SubprocessError) as failure:
        raise EngineError(f"the model's vocabulary can't be read for grammars: {failure}") from None
    return GrammarCompiler.restored(done.stdout, plan.vocab_size, plan.eos_id)


def main(arguments: list[str]) -> None:
    """The process."""
    die_with_parent(int(arguments[0]))
    os.nice(_NICE)
    try:
        compiler = compiler_here(decode_plan(sys.stdin.buffer.read()))
    except LightllmdError as failure:
        sys.exit(failure.message)
    sys.stdout.buffer.write(compiler.serialised())


if __name__ == "__main__":
    main(sys.argv[1:])
