"""Driver calls that keep Python's interpreter, for whoever must not stand in line for it again after each.

`cuda.bindings` gives the interpreter away in every call, also in one of a few microseconds; beside a thread that runs
Python, the next line is then executed up to a switch interval (`sys.getswitchinterval`) later. A resume makes seven
such calls before its first layer is on the link. These go through `ctypes.PyDLL`, which does not give it away; names,
arguments and results are those of the bindings (of CUDA 13). The driver runs no Python, so nobody who is waited for
within needs the interpreter. None of them waits for work on the device while its stream's queue, of about a thousand
entries, has room. Copies and their events come through these, and not what stands behind a pass; only a resume whose
boundary is still on the device records one event on the stream of passes.

Not taken: a short switch interval. All threads would change places more often, and every change costs them both.
"""

from __future__ import annotations

import ctypes
from typing import Any

from cuda.bindings import driver

_LIBRARY = "libcuda.so.1"
_ADDRESS = _SIZE = _LONG = ctypes.c_uint64
_POINTER = ctypes.c_void_p
_WORD = ctypes.c_uint32
_BATCH = "cuMemcpyBatchAsync_v2"


def _result(code: int) -> driver.CUresult:
    try:
        return driver.CUresult(code)
    except ValueError:  # of a driver that is newer than the bindings
        return driver.CUresult.CUDA_ERROR_UNKNOWN


class HeldCalls:
    """The calls of one process; made once the bindings have loaded the driver."""

    def __init__(self) -> None:
        library = ctypes.PyDLL(_LIBRARY)

        def call(symbol: str, *arguments: Any) -> Any:
            function = getattr(library, symbol)
            function.argtypes, function.restype = arguments, ctypes.c_int
            return function

        self._create = call("cuMemCreate", _POINTER, _SIZE, _POINTER, _LONG)
        self._map = call("cuMemMap", _ADDRESS, _SIZE, _SIZE, _LONG, _LONG)
        self._set_access = call("cuMemSetAccess", _ADDRESS, _SIZE, _POINTER, _SIZE)
        self._info = call("cuMemGetInfo_v2", _POINTER, _POINTER)
        self._copy = call("cuMemcpyAsync", _ADDRESS, _ADDRESS, _SIZE, _POINTER)
        self._wait_value = call("cuStreamWaitValue32_v2", _POINTER, _ADDRESS, _WORD, _WORD)
        self._record = call("cuEventRecord", _POINTER, _POINTER)
        self._query = call("cuEventQuery", _POINTER)
        self._wait_event = call("cuStreamWaitEvent", _POINTER, _POINTER, _WORD)
        self.takes_batches = hasattr(library, _BATCH)  # from CUDA 13
        if self.takes_batches:
            self._batch = call(_BATCH, _POINTER, _POINTER, _POINTER, _SIZE, _POINTER, _POINTER, _SIZE, _POINTER)

    def cuMemCreate(self, size: int, prop: driver.CUmemAllocationProp, flags: int) -> tuple[Any, int]:
        handle = _LONG()
        code = self._create(ctypes.addressof(handle), size, prop.getPtr(), flags)
        return _result(code), handle.value

    def cuMemMap(self, ptr: int, size: int, offset: int, handle: int, flags: int) -> tuple[Any]:
        return (_result(self._map(ptr, size, offset, handle, flags)),)

    def cuMemSetAccess(self, ptr: int, size: int, desc: list[Any], count: int) -> tuple[Any]:
        [access] = desc  # an array of one
        return (_result(self._set_access(ptr, size, access.getPtr(), count)),)

    def cuMemGetInfo(self) -> tuple[Any, int, int]:
        free, total = _SIZE(), _SIZE()
        code = self._info(ctypes.addressof(free), ctypes.addressof(total))
        return _result(code), free.value, total.value

    def cuMemcpyAsync(self, dst: Any, src: int, size: int, stream: Any) -> tuple[Any]:
        return (_result(self._copy(int(dst), src, size, int(stream))),)

    def cuMemcpyBatchAsync(
        self,
        dsts: list[int],
        srcs: list[int],
        sizes: list[int],
        count: int,
        attrs: list[driver.CUmemcpyAttributes],
        attrs_idxs: list[int],
        num_attrs: int,
        stream: int,
    ) -> tuple[Any]:
        [order] = attrs  # an array of one
        to, there, lengths, first = ((_SIZE * len(words))(*words) for words in (dsts, srcs, sizes, attrs_idxs))
        code = self._batch(to, there, lengths, count, order.getPtr(), first, num_attrs, stream)
        return (_result(code),)

    def cuEventRecord(self, event: int, stream: int) -> tuple[Any]:
        return (_result(self._record(event, stream)),)

    def cuEventQuery(self, event: int) -> tuple[Any]:
        return (_result(self._query(event)),)

    def cuStreamWaitEvent(self, stream: int, event: int, flags: int) -> tuple[Any]:
        return (_result(self._wait_event(stream, event, flags)),)

    def cuStreamWaitValue32(self, stream: int, addr: int, value: int, flags: int) -> tuple[Any]:
        return (_result(self._wait_value(stream, addr, value, flags)),)
