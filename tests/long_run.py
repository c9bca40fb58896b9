"""The long run: the long versions of tests, which a release passes; README.md has what it has beyond the usual one."""

from __future__ import annotations

import os

LONG = bool(os.environ.get("LIGHTLLMD_LONG_TESTS"))
