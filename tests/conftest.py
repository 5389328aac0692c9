"""Fixtures for all tests: devices, closed after each test, and quiet threads."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import random
from dataclasses import dataclass

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


SHORT_S = 4.0  # a long test's time when none was asked for, and its seed is 0


@dataclass(frozen=True)
class Long:
    """How long a long test goes on, and the seed of all that it draws."""

    seconds: float
    seed: int


def pytest_addoption(parser):
    group = parser.getgroup("djinn")
    group.addoption("--long", type=float, metavar="S", help="seconds that the tests of random operations go on")
    group.addoption("--seed", type=int, metavar="N", help="their seed; with --long it is drawn when it is not given")


def pytest_configure(config):
    seconds, seed = config.getoption("long"), config.getoption("seed")
    if seed is None:
        seed = random.SystemRandom().randrange(1 << 32) if seconds else 0
        config.option.seed = seed  # pytest-xdist's workers get the same
    config.long = Long(seconds or SHORT_S, seed)


def pytest_report_header(config):
    return f"long tests: --long {config.long.seconds:g} --seed {config.long.seed}"


def pytest_collection_modifyitems(config, items):
    for item in items:
        if item.get_closest_marker("long"):
            item.add_marker(pytest.mark.timeout(config.long.seconds + 300))


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem):
    """Each test runs in a generator, which has a stack of handled exceptions of its own.

    A KeyboardInterrupt between two bytecodes can leave one on that stack; every error of a later test in this process
    would have it for its context.
    """

    def run():
        yield pyfuncitem.obj(**{name: pyfuncitem.funcargs[name] for name in pyfuncitem._fixtureinfo.argnames})

    next(run())
    return True


@pytest.fixture
def long(request):
    """The `Long` of this run; it is printed in the header, and with a failure."""
    print(f"repeat with --long {request.config.long.seconds:g} --seed {request.config.long.seed}")
    return request.config.long


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
