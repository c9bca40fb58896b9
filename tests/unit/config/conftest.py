from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from model_folders import write_folder


@pytest.fixture
def hf_model(tmp_path: Path) -> Callable[..., Path]:
    """Makes a Hugging Face directory that could be served; keywords override entries of config.json."""
    return partial(write_folder, tmp_path / "tiny-llama")
