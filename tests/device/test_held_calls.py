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
        self.missing: set[str] = set()
        self.writes: dict[str, dict[int, int]] = {"cuMemCreate": {0: 77}, "cuMemGetInfo_v2": {0: 5, 1: 9}}

    def __getattr__(self, symbol: str) -> Callable[..., int]:
        if symbol in self.missing:
            raise AttributeError(symbol)

        def function(*arguments: int) -> int:
            assert len(arguments) == len(function.argtypes)
            for argument, kind in zip(arguments, function.argtypes, strict=True):
                kind.from_param(argument)  # as ctypes would
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
    assert (
        held.cuEventRecord(1 << 43, 8) == held.cuEventQuery(1 << 43) == held.cuStreamWaitEvent(8, 1 << 43, 0) == (ok,)
    )
    copy = ("cuMemcpyAsync", (1 << 40, 1 << 41, 12, 8))
    assert library.seen[0][1][1:] == (4096, made.getPtr(), 0)
    assert library.seen[1] == ("cuMemMap", (1 << 40, 4096, 0, 77, 0))
    assert library.seen[2] == ("cuMemSetAccess", (1 << 40, 4096, access.getPtr(), 1))
    assert library.seen[4:7] == [copy, copy, ("cuStreamWaitValue32_v2", (8, 1 << 42, 1, 1))]
    events = [("cuEventRecord", (1 << 43, 8)), ("cuEventQuery", (1 << 43,)), ("cuStreamWaitEvent", (8, 1 << 43, 0))]
    assert library.seen[7:] == events


def test_a_batch_reaches_the_driver_as_three_columns(library: FakeLibrary) -> None:
    held, order = HeldCalls(), driver.CUmemcpyAttributes()
    assert held.takes_batches
    columns = [1 << 40, 1 << 41, 1 << 42], [5, 6, 7], [10, 20, 30]
    assert held.cuMemcpyBatchAsync(*columns, 3, [order], [0], 1, 8) == (driver.CUresult.CUDA_SUCCESS,)
    [(symbol, (*arrays, count, attrs, first, attrs_count, stream))] = library.seen
    assert symbol == "cuMemcpyBatchAsync_v2"
    assert [list(array) for array in arrays] == list(columns)
    assert (count, attrs, list(first), attrs_count, stream) == (3, order.getPtr(), [0], 1, 8)


def test_an_older_driver_takes_no_batches(library: FakeLibrary) -> None:
    library.missing.add("cuMemcpyBatchAsync_v2")
    assert not HeldCalls().takes_batches


def test_a_code_that_the_bindings_do_not_know_is_a_failure(library: FakeLibrary) -> None:
    library.code = 99_999
    assert HeldCalls().cuEventRecord(1, 8) == (driver.CUresult.CUDA_ERROR_UNKNOWN,)


def test_a_refusal_is_the_bindings_own_code(library: FakeLibrary) -> None:
    library.code = FAILED
    assert HeldCalls().cuMemMap(1 << 40, 4096, 0, 77, 0) == (driver.CUresult.CUDA_ERROR_INVALID_VALUE,)
    assert HeldCalls().cuMemCreate(4096, driver.CUmemAllocationProp(), 0)[0]
