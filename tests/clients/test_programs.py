"""Client programs that have environments of their own with pinned versions, unchanged, against the demo model: chat,
streams, tools, structured output, embeddings, as far as each has them. `programs/` has what they do."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from clients import environments
from harness import Daemon

PROGRAMS = Path(__file__).parent / "programs"
PYTHON = {
    "langchain": ("langchain-openai==1.7.4", "langchain-core==1.8.3", "openai==3.57.0"),
    "llama_index": (
        "llama-index-core==0.14.25",
        "llama-index-llms-openai-like==0.8.1",
        "llama-index-embeddings-openai-like==0.4.0",
    ),
    "litellm": ("litellm==1.110.2",),
    "instructor": ("instructor==1.17.0", "anthropic==2.14.0"),
    "pydantic_ai": ("pydantic-ai-slim[openai,anthropic]==2.68.0",),
    "llm": ("llm==0.36",),
}
NODE = ("ai@6.0.326", "@ai-sdk/openai@3.0.141", "@ai-sdk/openai-compatible@2.0.92", "zod@4.6.7")


@environments.HEAVY
@pytest.mark.parametrize("name", PYTHON)
def test_python_program(demo: Daemon, name: str) -> None:
    interpreter = environments.python(*PYTHON[name])
    said = environments.run(interpreter, PROGRAMS / f"{name}_program.py", demo.url, LITELLM_LOCAL_MODEL_COST_MAP="True")
    assert said.strip().endswith("works")


@environments.HEAVY
def test_vercel_ai(demo: Daemon) -> None:
    folder = environments.node(*NODE)
    program = "vercel_ai_program.mjs"  # where node finds the packages
    shutil.copy(PROGRAMS / program, folder / program)
    assert environments.run("node", folder / program, demo.url, folder=folder).strip().endswith("works")
