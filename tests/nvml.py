"""A stand-in for NVML and the CUDA driver: hosts with any GPUs, lost ones and MIG instances among them."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

from lightllmd.probe.cuda_driver import DriverFault

GB = 10**9


@dataclass
class Gpu:
    """A GPU, or a MIG instance of one."""

    free: int = 140 * GB
    total: int = 150 * GB
    name: str = "NVIDIA H200"
    capability: tuple[int, int] = (9, 0)
    lost: bool = False
    opens: bool = True  # CUDA lists it
    instances: list[Gpu | None] | None = None  # in MIG mode, None where a place is empty
    uuid: str = ""


class NvmlError(Exception):
    """As pynvml's."""


@dataclass
class Nvml:
    """What pynvml has."""

    gpus: list[Gpu]
    NVMLError: type[Exception] = NvmlError
    asked: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        for number, gpu in enumerate(self.gpus):
            gpu.uuid = gpu.uuid or f"GPU-{number:08d}-0000-0000-0000-000000000000"
            for place, instance in enumerate(gpu.instances or []):
                if instance is not None:
                    instance.uuid = f"MIG-{number:08d}-0000-0000-0000-{place + 1:012d}"

    def open_devices(self, visible: str | None = None, order: list[int] | None = None) -> list[str]:
        """As the CUDA driver: one MIG instance, or all GPUs in this order."""
        gpus = [self.gpus[number] for number in (order or range(len(self.gpus)))]
        if visible is not None:
            gpus = [gpu for gpu in gpus if gpu.uuid in visible.split(",")]
        for instance in (instance for gpu in gpus for instance in gpu.instances or []):
            if instance is not None:
                return [instance.uuid.removeprefix("MIG-")]
        return [gpu.uuid.removeprefix("GPU-") for gpu in gpus if gpu.opens and not gpu.lost]

    def all_or_none(self, visible: str | None = None) -> list[str]:
        """As where cuInit fails if a lost GPU is visible."""
        found = self.open_devices(visible)
        return found if visible is not None or not any(gpu.lost for gpu in self.gpus) else self.no_driver()

    def no_driver(self, visible: str | None = None) -> list[str]:
        """As where cuInit fails."""
        raise DriverFault("cuInit: CUDA_ERROR_SYSTEM_NOT_READY")

    def nvmlInit(self) -> None:
        self.asked.append("init")

    def nvmlShutdown(self) -> None:
        self.asked.append("shutdown")

    def nvmlDeviceGetCount(self) -> int:
        return len(self.gpus)

    def nvmlDeviceGetHandleByIndex(self, number: int) -> Gpu:
        return self.gpus[number]

    def nvmlDeviceGetPciInfo(self, gpu: Gpu) -> Any:
        return SimpleNamespace(busId=f"00000000:{self.gpus.index(gpu) + 16:02X}:00.0".encode())

    def nvmlDeviceGetMemoryInfo(self, gpu: Gpu) -> Any:
        if gpu.lost:
            raise NvmlError("GPU is lost")
        return SimpleNamespace(total=gpu.total, free=gpu.free)

    def nvmlDeviceGetCudaComputeCapability(self, gpu: Gpu) -> tuple[int, int]:
        return gpu.capability

    def nvmlDeviceGetName(self, gpu: Gpu) -> str:
        return gpu.name

    def nvmlDeviceGetUUID(self, gpu: Gpu) -> str:
        return gpu.uuid

    def nvmlDeviceGetMigMode(self, gpu: Gpu) -> tuple[int, int]:
        if gpu.capability < (8, 0):
            raise NvmlError("Not Supported")
        return (1, 1) if gpu.instances is not None else (0, 0)

    def nvmlDeviceGetMaxMigDeviceCount(self, gpu: Gpu) -> int:
        return len(gpu.instances or [])

    def nvmlDeviceGetMigDeviceHandleByIndex(self, gpu: Gpu, place: int) -> Gpu:
        instance = (gpu.instances or [])[place]
        if instance is None:
            raise NvmlError("Not Found")
        return instance
