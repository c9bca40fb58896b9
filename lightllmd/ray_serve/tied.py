"""``python -m lightllmd.ray_serve.tied PARENT WORDS...``: becomes `lightllmd WORDS...`, which dies with process PARENT.

A program of its own, not a function between fork and exec: the parent has threads whose locks a fork would copy.
"""

from __future__ import annotations

import os
import sys

from lightllmd.ipc.child_setup import die_with_parent

if __name__ == "__main__":
    die_with_parent(int(sys.argv[1]))
    os.execv(sys.executable, [sys.executable, "-m", "lightllmd", *sys.argv[2:]])
