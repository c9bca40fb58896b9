"""The api worker imports this room at its start: it must stay light."""

from __future__ import annotations

import subprocess
import sys

import pytest

MODULES = ["lightllmd.text", "lightllmd.text.gguf_vocab", "lightllmd.text.huggingface"]


@pytest.mark.parametrize("module", MODULES)
def test_text_imports_neither_torch_nor_transformers(module):
    script = (
        f"import sys, {module}\n"
        "heavy = {'torch', 'transformers', 'numpy', 'gguf', 'huggingface_hub'} & set(sys.modules)\n"
        "sys.exit(f'imported: {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_running_a_tokenizer_imports_neither():
    script = (
        "import sys\n"
        "from lightllmd.text import ByteTokenizer, StopMatcher\n"
        "tokenizer = ByteTokenizer()\n"
        "ids = tokenizer.encode_chat([{'role': 'user', 'content': 'x'}])\n"
        "tokenizer.decode(ids)\n"
        "sys.exit(bool({'torch', 'transformers'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", script], timeout=60).returncode == 0
