"""lightllmd: a supervised daemon that serves large language models. `LLM` is its engine without the daemon."""

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightllmd.offline import LLM as LLM

__version__ = "0.1.0"

# In a source checkout the kernels live in the top-level folder ``kernels/``; an installed copy has them as
# ``lightllmd/kernels``. Either way they import as ``lightllmd.kernels`` (never as ``kernels``: another
# distribution publishes a package of that name, and transformers probes for it).
_here = Path(__file__).resolve().parent
if not (_here / "kernels").is_dir() and (_here.parent / "kernels").is_dir():
    __path__.append(str(_here.parent))


def __getattr__(name: str) -> Any:
    """`LLM` is imported when it is asked for: it brings the engine along, which the supervisor must not have."""
    if name == "LLM":
        return importlib.import_module("lightllmd.offline").LLM
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
