"""What machine this is and the state it is in, as certificates and results record it.

Reads NVML and /proc. It makes no CUDA context, so that it can be asked before a measurement begins.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import os
import platform
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pynvml

THROTTLE_PREFIX = "nvmlClocksEventReason"
HARMLESS_REASONS = frozenset({"None", "GpuIdle", "ApplicationsClocksSetting", "UserDefinedClocks"})


@contextmanager
def nvml() -> Iterator[bool]:
    """NVML for the block; yields False where there is no driver."""
    try:
        pynvml.nvmlInit()
    except (pynvml.NVMLError_LibraryNotFound, pynvml.NVMLError_DriverNotLoaded):
        yield False
        return
    try:
        yield True
    finally:
        pynvml.nvmlShutdown()


def visible_gpus() -> list[str]:
    """UUIDs of the GPUs that CUDA will show, in its order (PCI order is set here if nothing else is)."""
    os.environ.setdefault("CUDA_DEVICE_ORDER", "PCI_BUS_ID")
    with nvml() as there:
        if not there:
            return []
        every = [
            pynvml.nvmlDeviceGetUUID(pynvml.nvmlDeviceGetHandleByIndex(index))
            for index in range(pynvml.nvmlDeviceGetCount())
        ]
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is None:
        return every
    visible: list[str] = []
    for word in filter(None, (part.strip() for part in chosen.split(","))):
        matches = [every[int(word)]] if word.isdigit() and int(word) < len(every) else []
        matches = matches or [uuid for uuid in every if uuid.startswith(word)]
        if not matches:
            break  # CUDA stops at the first name that it does not know
        visible.append(matches[0])
    return visible


def gpu_uuid() -> str | None:
    """The UUID of the GPU that `cuda:0` is; None without one."""
    gpus = visible_gpus()
    return gpus[0] if gpus else None


def device_used_bytes(uuid: str) -> int:
    """Memory in use on the card, by everyone."""
    with nvml():
        return int(pynvml.nvmlDeviceGetMemoryInfo(pynvml.nvmlDeviceGetHandleByUUID(uuid)).used)


def kind(uuid: str | None) -> dict[str, Any]:
    """The machine's hardware and system; the same on every run on one machine."""
    facts: dict[str, Any] = {
        "gpu": None,
        "gpu_memory_bytes": None,
        "driver": None,
        "pcie_generation": None,
        "pcie_width": None,
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": _meminfo()["MemTotal"],
        "numa_nodes": max(1, len(list(Path("/sys/devices/system/node").glob("node[0-9]*")))),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
    }
    if uuid is not None:
        with nvml():
            handle = pynvml.nvmlDeviceGetHandleByUUID(uuid)
            facts["gpu"] = pynvml.nvmlDeviceGetName(handle)
            facts["gpu_memory_bytes"] = int(pynvml.nvmlDeviceGetMemoryInfo(handle).total)
            facts["driver"] = pynvml.nvmlSystemGetDriverVersion()
            facts["pcie_generation"] = _ask(pynvml.nvmlDeviceGetMaxPcieLinkGeneration, handle)
            facts["pcie_width"] = _ask(pynvml.nvmlDeviceGetMaxPcieLinkWidth, handle)
    return facts


def identity(kind_facts: dict[str, Any], uuid: str | None) -> str:
    """`machine.id`: the GPU and its UUID; without a GPU a digest of the hardware."""
    if uuid is not None:
        return f"{kind_facts['gpu']}/{uuid}"
    text = json.dumps(kind_facts, sort_keys=True)
    return f"cpu/{hashlib.blake2b(text.encode(), digest_size=8).hexdigest()}"


def state(uuid: str | None) -> dict[str, Any]:
    """Clocks, throttling, load and foreign processes, now."""
    facts: dict[str, Any] = {
        "time_utc": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "load_1min": os.getloadavg()[0],
        "host_free_bytes": _meminfo()["MemAvailable"],
        "foreign_processes": [],
        "throttle_reasons": [],
    }
    if uuid is not None:
        with nvml():
            handle = pynvml.nvmlDeviceGetHandleByUUID(uuid)
            facts["sm_clock_mhz"] = _ask(pynvml.nvmlDeviceGetClockInfo, handle, pynvml.NVML_CLOCK_SM)
            facts["memory_clock_mhz"] = _ask(pynvml.nvmlDeviceGetClockInfo, handle, pynvml.NVML_CLOCK_MEM)
            facts["temperature_c"] = _ask(pynvml.nvmlDeviceGetTemperature, handle, pynvml.NVML_TEMPERATURE_GPU)
            power_mw = _ask(pynvml.nvmlDeviceGetPowerUsage, handle)
            facts["power_w"] = None if power_mw is None else power_mw / 1000
            facts["device_used_bytes"] = int(pynvml.nvmlDeviceGetMemoryInfo(handle).used)
            facts["throttle_reasons"] = throttle_reasons(
                _ask(pynvml.nvmlDeviceGetCurrentClocksEventReasons, handle) or 0
            )
            facts["foreign_processes"] = foreign_processes(handle)
    return facts


def link(uuid: str | None) -> dict[str, int | None]:
    """PCIe generation and width in use at this moment."""
    facts: dict[str, int | None] = {"pcie_generation": None, "pcie_width": None}
    if uuid is not None:
        with nvml():
            handle = pynvml.nvmlDeviceGetHandleByUUID(uuid)
            facts["pcie_generation"] = _ask(pynvml.nvmlDeviceGetCurrPcieLinkGeneration, handle)
            facts["pcie_width"] = _ask(pynvml.nvmlDeviceGetCurrPcieLinkWidth, handle)
    return facts


def ecc(uuid: str) -> tuple[bool, int | None]:
    """(ECC is on, uncorrected errors since the driver was loaded or None where the card has no ECC)."""
    with nvml():
        handle = pynvml.nvmlDeviceGetHandleByUUID(uuid)
        modes = _ask(pynvml.nvmlDeviceGetEccMode, handle)
        kinds = (pynvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED, pynvml.NVML_VOLATILE_ECC)
        errors = _ask(pynvml.nvmlDeviceGetTotalEccErrors, handle, *kinds)
    return bool(modes and modes[0] == pynvml.NVML_FEATURE_ENABLED), errors


def gpu_numa_node(uuid: str | None) -> int | None:
    """The NUMA node that the GPU's link ends at; None where the kernel does not say."""
    if uuid is None:
        return None
    with nvml():
        address = pynvml.nvmlDeviceGetPciInfo(pynvml.nvmlDeviceGetHandleByUUID(uuid)).busId
    address = address.decode() if isinstance(address, bytes) else address
    file = Path("/sys/bus/pci/devices") / address.lower()[-12:] / "numa_node"
    node = int(file.read_text()) if file.is_file() else -1
    return node if node >= 0 else None


def own_numa_nodes() -> list[int]:
    """The NUMA nodes whose cores this process may run on."""
    mine = os.sched_getaffinity(0)
    nodes = []
    for folder in Path("/sys/devices/system/node").glob("node[0-9]*"):
        cores: set[int] = set()
        for part in filter(None, (folder / "cpulist").read_text().strip().split(",")):
            first, _, last = part.partition("-")
            cores.update(range(int(first), int(last or first) + 1))
        if cores & mine:
            nodes.append(int(folder.name.removeprefix("node")))
    return sorted(nodes) or [0]


def throttle_reasons(mask: int) -> list[str]:
    """The names of the set bits that slow a GPU down, as NVML calls them."""
    names = []
    for name in dir(pynvml):
        if name.startswith(THROTTLE_PREFIX) and isinstance(getattr(pynvml, name), int):
            short = name.removeprefix(THROTTLE_PREFIX)
            if mask & getattr(pynvml, name) and short not in HARMLESS_REASONS and short not in ("sAll", "All"):
                names.append(short)
    return sorted(names)


def foreign_processes(handle: Any) -> list[str]:
    """Processes that compute on the GPU and are not this one, its children or its ancestors.

    In a container NVML may show process ids of the host. If it shows processes and none of them is known here, one
    of them is taken for this process once this process has a context of its own.
    """
    listed = {process.pid for process in _ask(pynvml.nvmlDeviceGetComputeRunningProcesses_v3, handle) or []}
    here = os.getpid()
    above = _ancestors(here)
    own = {pid for pid in listed if pid == here or pid in above or here in _ancestors(pid)}
    foreign = sorted(listed - own)
    if foreign and not own and has_context():
        foreign = foreign[1:]
    return [f"process {pid} ({_command(pid)})" for pid in foreign]


def _ancestors(pid: int) -> list[int]:
    """The parents of `pid`, nearest first; empty for a process that is not visible from here."""
    chain: list[int] = []
    while pid > 1:
        try:
            stat = Path(f"/proc/{pid}/stat").read_text()
        except OSError:
            break
        pid = int(stat.rpartition(")")[2].split()[1])
        chain.append(pid)
    return chain


def has_context() -> bool:
    """True when this process has initialised CUDA through torch (without importing it here)."""
    torch = sys.modules.get("torch")
    return torch is not None and torch.cuda.is_initialized()


def _command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip()
    except OSError:
        return "not visible from here"


def _ask(question: Any, *words: Any) -> Any:
    """NVML's answer, or None where this card or driver does not know."""
    try:
        return question(*words)
    except (pynvml.NVMLError_NotSupported, pynvml.NVMLError_FunctionNotFound):
        return None


def _cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith(("model name", "Model")):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _meminfo() -> dict[str, int]:
    """/proc/meminfo in bytes, with the container's own limit where there is a smaller one."""
    lines = (line.split() for line in Path("/proc/meminfo").read_text().splitlines())
    facts = {words[0].rstrip(":"): int(words[1]) * 1024 for words in lines if len(words) == 3}
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.is_file() and (text := limit.read_text().strip()).isdigit() and int(text) < facts["MemTotal"]:
        facts["MemTotal"] = int(text)
        facts["MemAvailable"] = min(facts["MemAvailable"], int(text) - int(used.read_text()))
    return facts
