"""What loading a quantised model takes at its worst moment, in a process that does nothing else: what the process of a
test had kept of its own by then would count, too.

``python -m peak_memory SMALL LARGE`` prints the bytes by which the most resident memory passed what was resident before
LARGE was loaded, and the bytes that its weights hold.
"""

from __future__ import annotations

import sys
from pathlib import Path

from lightllmd.architecture.schemes import SCHEMES
from lightllmd.architecture.weight_schemes import WeightSchemes
from tiny_models import load

W8A16 = WeightSchemes.all(SCHEMES["w8a16"])


def resident(which: str) -> int:
    """Bytes of this process: VmRSS, or VmHWM, the most since it was last reset."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(which))


def main(small: str, large: str) -> None:
    """Prints both numbers."""
    load(Path(small), schemes=W8A16)  # all libraries are there
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM is VmRSS from here on
    before = resident("VmRSS")
    runner = load(Path(large), schemes=W8A16)
    print(resident("VmHWM") - before, sum(tensor.nbytes for tensor in runner.decoder.tensors().values()))


if __name__ == "__main__":
    main(*sys.argv[1:])
