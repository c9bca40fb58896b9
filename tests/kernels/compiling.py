"""Compiles kernels for a Hopper GPU where none is: run as ``python compiling.py CASES.py``.

CASES.py has a dict ``CASES`` of a name -> a function that calls public wrappers of kernels with CPU tensors. Whatever
they would launch is compiled for sm_90a, as the real call would be (default tiles, alignment of pointers and strides),
and not run. Prints one JSON line per kernel, `Compiled` by case.
"""

from __future__ import annotations

import json
import re
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any


@dataclass(frozen=True)
class Compiled:
    case: str
    kernel: str
    warps: int
    registers: int  # per thread
    spilled: int  # bytes of local memory per thread
    shared: int  # bytes per program
    wgmma: int  # warp-group matrix instructions in the PTX
    byte_loads: int  # in the PTX, of shared memory
    system: list[str]  # instructions in the PTX, each once, that other devices see in order


class _Hopper:
    """Stands in for Triton's CUDA driver: knows the target, launches nothing."""

    def __init__(self) -> None:
        from triton.backends.compiler import GPUTarget

        self._target = GPUTarget("cuda", 90, 32)
        self.loaded: list[tuple[Any, bytes]] = []  # since the case began: metadata, code
        self.utils = SimpleNamespace(
            get_device_properties=lambda device: {"max_shared_mem": 1 << 30, "multiprocessor_count": 132},
            load_binary=self._load,
        )

    def get_current_target(self) -> Any:
        return self._target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def launcher_cls(self, source: Any, metadata: Any) -> Callable[..., None]:
        """Triton asks for it right before it loads the code."""
        self._metadata = metadata
        return lambda *arguments: None

    def _load(self, name: str, code: bytes, *rest: object) -> tuple[int, int, int, int, int]:
        self.loaded.append((self._metadata, code))
        return 1, 1, 0, 0, 1024


def _compiled(cases: dict[str, Callable[[], None]]) -> Iterator[Compiled]:
    import triton

    driver = _Hopper()
    triton.runtime.driver.set_active(driver)
    for case, launch in cases.items():
        launch()
        for metadata, code in driver.loaded:
            told = _told(code)
            numbers = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", told)}
            yield Compiled(
                case,
                metadata.name,
                warps=metadata.num_warps,
                registers=numbers["REG"],
                spilled=numbers["STACK"] + numbers["LOCAL"],
                shared=metadata.shared,
                wgmma=_ptx(metadata).count("wgmma.mma_async"),
                byte_loads=len(re.findall(r"ld\.shared\.[bsu]8\b", _ptx(metadata))),
                system=sorted(set(re.findall(r"\b(?:ld|st|atom|red|fence)(?:\.\w+)*\.sys(?:\.\w+)*", _ptx(metadata)))),
            )
        driver.loaded.clear()


def _ptx(metadata: Any) -> str:
    """Where Triton has kept it. (To list the machine code instead takes half a second of each kernel.)"""
    from triton.runtime.cache import get_cache_manager

    return Path(get_cache_manager(metadata.hash).get_file(f"{metadata.name}.ptx")).read_text()


def _told(code: bytes) -> str:
    """Resources."""
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(code)
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


if __name__ == "__main__":
    for compiled in _compiled(runpy.run_path(sys.argv[1])["CASES"]):
        print(json.dumps(asdict(compiled)), flush=True)
