"""The driver calls that keep the interpreter: what reaches the driver, and what comes back, without a GPU.

tests/gpu shows that they do what the bindings' calls do, and that nobody runs meanwhile.
"""

import ctypes
from collections.abc import Callable

import pytest
from cuda.bindings import driver

from djinn_core.device import heldcalls
from djinn_core.device.heldcalls import HeldCalls

FAILED = int(driver.CUresult.CUDA_ERROR_INVALID_VALUE)


class FakeLibrary:
    """Takes any call, and writes its number where the driver would write a result."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, tuple]] = []
        self.code = 0
        self.writes: dict[str, dict[int, int]] = {"cuMemCreate": {0: 77}, "cuMemGetInfo_v2": {0: 5, 1: 9}}

    def __getattr__(self, symbol: str) -> Callable[..., int]:
        def function(*arguments: int) -> int:
            assert len(arguments) == len(function.argtypes)
            for argument, kind in zip(arguments, function.argtypes, strict=True):
                kind(argument)  # as ctypes would
            self.seen.append((symbol, arguments))
            for at, value in self.writes.get(symbol, {}).items():
                ctypes.c_uint64.from_address(arguments[at]).value = value
            return self.code

        assert hasattr(driver, symbol.removesuffix("_v2"))
        return function


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> FakeLibrary:
    fake = FakeLibrary()
    monkeypatch.setattr(heldcalls.ctypes, "PyDLL", lambda name: fake)
    return fake


def test_each_call_is_one_of_the_bindings_and_takes_what_they_take(library: FakeLibrary) -> None:
    held, made, access = HeldCalls(), driver.CUmemAllocationProp(), driver.CUmemAccessDesc()
    ok = driver.CUresult.CUDA_SUCCESS
    assert held.cuMemCreate(4096, made, 0) == (ok, 77)
    assert held.cuMemMap(1 << 40, 4096, 0, 77, 0) == (ok,)
    assert held.cuMemSetAccess(1 << 40, 4096, [access], 1) == (ok,)
    assert held.cuMemGetInfo() == (ok, 5, 9)
    assert held.cuMemcpyAsync(driver.CUdeviceptr(1 << 40), 1 << 41, 12, driver.CUstream(8)) == (ok,)
    assert held.cuMemcpyAsync(1 << 40, 1 << 41, 12, 8) == (ok,)
    assert held.cuStreamWaitValue32(8, 1 << 42, 1, 1) == (ok,)
    copy = ("cuMemcpyAsync", (1 << 40, 1 << 41, 12, 8))
    assert library.seen[0][1][1:] == (4096, made.getPtr(), 0)
    assert library.seen[1] == ("cuMemMap", (1 << 40, 4096, 0, 77, 0))
    assert library.seen[2] == ("cuMemSetAccess", (1 << 40, 4096, access.getPtr(), 1))
    assert library.seen[4:] == [copy, copy, ("cuStreamWaitValue32_v2", (8, 1 << 42, 1, 1))]


def test_a_refusal_is_the_bindings_own_code(library: FakeLibrary) -> None:
    library.code = FAILED
    assert HeldCalls().cuMemMap(1 << 40, 4096, 0, 77, 0) == (driver.CUresult.CUDA_ERROR_INVALID_VALUE,)
    assert HeldCalls().cuMemCreate(4096, driver.CUmemAllocationProp(), 0)[0]
