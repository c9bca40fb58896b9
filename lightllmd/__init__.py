"""lightllmd: a supervised daemon that serves large language models."""

from pathlib import Path

__version__ = "0.1.0"

# In a source checkout the kernels live in the top-level folder ``kernels/``; an installed copy has them as
# ``lightllmd/kernels``. Either way they import as ``lightllmd.kernels`` (never as ``kernels``: another
# distribution publishes a package of that name, and transformers probes for it).
_here = Path(__file__).resolve().parent
if not (_here / "kernels").is_dir() and (_here.parent / "kernels").is_dir():
    __path__.append(str(_here.parent))
