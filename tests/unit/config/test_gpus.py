"""Every GPU of a host is told: which of them a process can use, by CUDA's number, and why not the others."""

from __future__ import annotations

import sys

import pytest

from lightllmd.config.plan import Device, DeviceFacts
from lightllmd.errors import NoUsableDevice
from lightllmd.probe import cuda_driver
from lightllmd.probe import devices as probe_devices
from lightllmd.probe import facts as probe_facts
from lightllmd.probe.cuda_driver import DriverFault
from lightllmd.probe.devices import device_facts, facts_of, torch_cuda_version
from lightllmd.probe.gpus import gpus
from nvml import GB, Gpu, Nvml


def indices(found: list[Device]) -> dict[str, int]:
    """CUDA's numbers of those that can be used, by the first group of their UUIDs."""
    return {device.uuid[4:12].lstrip("0") or "0": device.index for device in found if not device.fault}


def test_each_gpu_has_its_own_memory_name_and_place() -> None:
    host = Nvml([Gpu(free=140 * GB), Gpu(free=90 * GB), Gpu(total=80 * GB, free=79 * GB, name="NVIDIA H100")])
    found, _ = gpus(host, None, host.open_devices)
    assert [(device.index, device.memory_free, device.memory_total) for device in found] == [
        (0, 140 * GB, 150 * GB),
        (1, 90 * GB, 150 * GB),
        (2, 79 * GB, 80 * GB),
    ]
    assert found[2].title == "GPU 2 (NVIDIA H100 at 00000000:12:00.0)"
    assert found[2].uuid == "GPU-00000002-0000-0000-0000-000000000000"


@pytest.mark.parametrize(
    ("listed", "expected"),
    [
        (None, {"0": 0, "1": 1, "2": 2}),
        ("", {}),
        ("2,0", {"2": 0, "0": 1}),
        (" 1 , 2 ", {"1": 0, "2": 1}),
        ("0,7,1", {"0": 0}),
        ("-1", {}),
        ("NoDevFiles", {}),
        ("1,1,2", {"1": 0}),
        ("GPU-00000002,1", {"2": 0, "1": 1}),
        ("GPU-00000002-0000-0000-0000-000000000000", {"2": 0}),
        ("GPU-0000000,1", {}),
        ("GPU-abc", {}),
        ("²", {}),
    ],
)
def test_only_visible_gpus_count_in_the_order_that_they_are_listed_in(
    listed: str | None, expected: dict[str, int]
) -> None:
    assert indices(gpus(Nvml([Gpu(), Gpu(), Gpu()]), listed, None)[0]) == expected


def test_numbers_are_the_drivers_not_nvmls() -> None:
    host = Nvml([Gpu(name="slow"), Gpu(name="fast"), Gpu(name="middling")])
    found, _ = gpus(host, None, lambda visible: host.open_devices(visible, [1, 2, 0]))
    assert [(device.index, device.name) for device in found] == [(0, "fast"), (1, "middling"), (2, "slow")]


def test_a_lost_gpu_and_one_that_cuda_cannot_open_are_named_and_not_used() -> None:
    host = Nvml([Gpu(lost=True), Gpu(), Gpu(opens=False), Gpu(free=100 * GB)])
    facts = facts_of(gpus(host, None, host.open_devices)[0], threads=4)
    assert (facts.count, facts.memory_free, facts.of(facts.usable).memory_free) == (2, 140 * GB, 100 * GB)
    assert [device.index for device in facts.usable] == [0, 1]
    assert [(device.bus_id[9:11], device.fault) for device in facts.devices if device.fault] == [
        ("10", "NVML: GPU is lost"),
        ("12", "NVML lists it, CUDA can't open it"),
    ]


def test_without_the_driver_those_that_work_are_numbered_by_place() -> None:
    host = Nvml([Gpu(lost=True), Gpu(), Gpu()])
    assert indices(gpus(host, None, None)[0]) == {"1": 0, "2": 1}


def test_where_a_lost_gpu_keeps_cuda_from_starting_processes_see_the_others_alone() -> None:
    host = Nvml([Gpu(), Gpu(lost=True), Gpu()])
    devices, visible = gpus(host, None, host.all_or_none)
    facts = facts_of(devices, 1, visible)
    assert ([device.index for device in facts.usable], facts.count) == ([0, 1], 2)
    assert facts.visible == "GPU-00000000-0000-0000-0000-000000000000,GPU-00000002-0000-0000-0000-000000000000"
    whole = Nvml([Gpu(), Gpu()])
    assert gpus(whole, None, whole.all_or_none)[1] == ""


def test_a_driver_that_does_not_start_is_told_of_each_gpu() -> None:
    host = Nvml([Gpu(lost=True), Gpu()])
    with pytest.raises(NoUsableDevice) as refused:
        facts_of(gpus(host, None, host.no_driver)[0], threads=1)
    assert refused.value.message == (
        "no GPU can be used: GPU 0 at 00000000:10:00.0: NVML: GPU is lost; "
        "NVIDIA H200 at 00000000:11:00.0: CUDA can't be used: cuInit: CUDA_ERROR_SYSTEM_NOT_READY"
    )
    with pytest.raises(NoUsableDevice, match="no GPU is visible"):
        facts_of(gpus(host, "", host.open_devices)[0], threads=1)


def test_of_mig_instances_one_can_be_used_and_the_others_are_named() -> None:
    cut = Gpu(instances=[Gpu(free=17 * GB, total=18 * GB, name="NVIDIA H200 MIG 1g.18gb"), None, Gpu(free=16 * GB)])
    host = Nvml([Gpu(), cut])
    found, _ = gpus(host, None, host.open_devices)
    assert [(device.mig, device.index, device.memory_free) for device in found if not device.fault] == [
        (True, 0, 17 * GB)
    ]
    assert sum(device.fault.startswith("CUDA opens one MIG instance") for device in found) == 1
    assert [device.uuid[-1] for device in gpus(host, "MIG-00000001-0000-0000-0000-000000000003", None)[0]] == ["3"]


def test_a_gpu_without_mig_mode_is_one_device() -> None:
    host = Nvml([Gpu(capability=(7, 5), name="Tesla T4")])
    (only,), _ = gpus(host, None, host.open_devices)
    facts = facts_of([only], threads=1)
    assert (facts.name, facts.capability, facts.fast_dtypes) == ("Tesla T4", (7, 5), ["float16", "float32"])


def test_dtypes_are_those_that_all_gpus_are_fast_at() -> None:
    host = Nvml([Gpu(), Gpu(capability=(7, 0))])
    facts = facts_of(gpus(host, None, host.open_devices)[0], threads=1)
    assert (facts.capability, facts.fast_dtypes[0]) == ((9, 0), "bfloat16")
    both = facts.of(facts.usable)
    assert (both.capability, both.fast_dtypes) == ((7, 0), ["float16", "float32"])


def test_memory_that_would_be_free_is_said_of_each_device() -> None:
    host = Nvml([Gpu(lost=True), Gpu(free=10 * GB), Gpu(free=20 * GB)])
    facts = facts_of(gpus(host, None, host.open_devices)[0], threads=1)
    freed = facts.with_free(lambda device: device.memory_free + device.index * GB - 15 * GB)
    assert ([device.memory_free for device in freed.usable], freed.memory_free) == ([0, 6 * GB], 0)
    alone = DeviceFacts("cpu", "CPU", 1, 9 * GB, 5 * GB, ["float32"], 1).with_free(lambda device: 7 * GB)
    assert (alone.memory_free, alone.devices, alone.usable[0].memory_free) == (7 * GB, [], 7 * GB)


def test_the_driver_is_not_started_where_only_memory_is_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    host, starts = Nvml([Gpu(), Gpu()]), list[int]()

    def counted(visible: str | None) -> list[str]:
        starts.append(1)
        return host.open_devices(visible)

    monkeypatch.setitem(sys.modules, "pynvml", host)  # type: ignore[arg-type]
    monkeypatch.setattr(probe_devices, "torch_cuda_version", lambda: "13.0")
    monkeypatch.setattr(cuda_driver, "open_devices", counted)
    monkeypatch.setenv("CUDA_DEVICE_ORDER", "PCI_BUS_ID")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert device_facts("cuda", 1, quick=True).count == 2
    assert not starts
    assert device_facts("auto", 1).count == 2
    assert starts
    monkeypatch.delenv("CUDA_DEVICE_ORDER")
    device_facts("cuda", 1, quick=True)
    assert len(starts) == 2
    assert host.asked == ["init", "shutdown"] * 3
    host.gpus[:] = [Gpu(lost=True)]
    cpu = device_facts("auto", 1)
    assert (cpu.kind, cpu.no_gpu) == ("cpu", "no GPU can be used: GPU 0 at 00000000:10:00.0: NVML: GPU is lost")
    with pytest.raises(NoUsableDevice):
        device_facts("cuda", 1)


def test_a_look_at_devices_asks_the_driver_and_one_at_memory_alone_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def noted(wanted: str, threads: int, quick: bool = False) -> DeviceFacts:
        asked.append((wanted, quick))
        return facts_of(gpus(Nvml([Gpu()]), None, None)[0], threads)

    monkeypatch.setattr(probe_facts, "device_facts", noted)
    for memory_only in (False, True):
        probe_facts.probe(probe_facts.Request(device_only=True, device="auto", memory_only=memory_only))
    assert asked == [("auto", False), ("auto", True)]


def test_a_host_without_the_driver_has_a_fault_to_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_driver, "LIBRARY", "libno-such-cuda.so.1")
    with pytest.raises(DriverFault, match="libno-such-cuda"):
        cuda_driver.open_devices()


@pytest.mark.skipif(torch_cuda_version() is not None, reason="there may be a driver")
def test_another_process_is_asked_where_only_some_are_visible() -> None:
    with pytest.raises(DriverFault, match=r"libcuda\.so\.1"):
        cuda_driver.open_devices("GPU-0")
