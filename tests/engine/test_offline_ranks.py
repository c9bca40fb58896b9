"""`LLM` with several ranks: its children, which end with it, however it ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import psutil
import pytest

from lightllmd import LLM
from lightllmd.errors import EngineError, OutOfMemory
from long_run import LONG

QUIET = {"backend": "fake", "progress": False}

long = pytest.mark.skipif(not LONG, reason="LIGHTLLMD_LONG_TESTS is not set")


def ranks() -> list[psutil.Process]:
    return [child for child in psutil.Process().children() if "lightllmd.engine" in child.cmdline()]


def test_a_group_generates_and_an_ended_rank_is_told_and_leaves_nothing() -> None:
    with LLM(**QUIET) as llm:
        truth = llm.generate(["hello", "world"], max_new_tokens=9, progress=False)
    with LLM(tp=2, **QUIET) as llm:
        outputs = llm.generate(["hello", "world"], max_new_tokens=9, progress=False)
        assert [one.token_ids for one in outputs] == [one.token_ids for one in truth]
        (rank,) = ranks()
        rank.kill()
        with pytest.raises(EngineError, match="rank 1 has ended by signal 9"):
            llm.generate("hello", max_new_tokens=3000, progress=False)
        with pytest.raises(EngineError, match="can't be used any more"):
            llm.generate("hello", progress=False)
    assert ranks() == []


@long
def test_what_ends_a_rank_while_it_loads_is_raised() -> None:
    with pytest.raises(OutOfMemory, match="rank 1: this fault pretends"):
        LLM(tp=2, engine={"backend": "fake", "fake": {"fault": "memory", "fault_rank": 1}}, progress=False)
    assert ranks() == []


@long
def test_the_ranks_of_a_killed_process_end() -> None:
    program = (
        "from lightllmd import LLM\nllm = LLM(backend='fake', tp=3, progress=False)\nprint('up', flush=True)\ninput()"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"up\n"
        children = psutil.Process(process.pid).children()
        assert len(children) == 2
        os.kill(process.pid, signal.SIGKILL)
        assert psutil.wait_procs(children, timeout=30)[1] == []
