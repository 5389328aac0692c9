"""Fixtures for all tests: devices, closed after each test, and quiet threads."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from hypothesis import HealthCheck, settings

from djinn_core.device import open_device

settings.register_profile(
    "djinn", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
settings.load_profile("djinn")

CPU_CAPACITY_BYTES = 64 << 20

DEVICES = ["cpu"]
if torch.cuda.is_available():
    DEVICES.append(pytest.param("cuda:0", marks=pytest.mark.gpu))


@pytest.fixture
def cpu_device():
    """An emulated device of 64 MiB."""
    device = open_device("cpu", capacity_bytes=CPU_CAPACITY_BYTES)
    yield device
    device.faults = None
    device.close()


@pytest.fixture(params=DEVICES)
def device(request):
    """Each device that this machine has: the emulated one, and the GPU where there is one."""
    if request.param == "cpu":
        yield request.getfixturevalue("cpu_device")
        return
    device = open_device(request.param)
    yield device
    device.close()
