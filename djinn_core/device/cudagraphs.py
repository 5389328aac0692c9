"""Recorded work by stream capture: graphs, and chains of graphs whose steps between them change.

A chain is one graph of the driver's. A step is captured for the first row, once for each key, and not launched: what
the kernels are called with is read out of it. For the other rows the addresses of the row's own tensors take the place
of the first row's, wherever they stand in there, with their distance kept; everything else is the same, the memory for
what is made in between too, since rows run one after the other. Before each launch the kernel nodes of all steps are
given what belongs to this one (`cuGraphExecKernelNodeSetParams`; launches under way keep what they had).

Invariant: nothing is launched before every node of every row has been given this step's parameters. What a step makes
lies in a pool of its own: a row's graphs may keep something in theirs from before the step until behind it. And what it
gives is copied from there by a kernel, so that no address that is exchanged is that of memory used for anything else.

Not taken: `cuGraphExecUpdate` with a new capture of all rows, which takes the Python that a chain is there to save.
Kernels of our own that read the length from memory: other kernels, so other bits.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Hashable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from cuda.bindings import driver

from djinn_core.device.base import Graph, Row, Stream
from djinn_core.device.drivercalls import checked, describe
from djinn_core.errors import DeviceError

STEPS_KEPT = 4096  # some kilobytes each
SAMPLES_KEPT = 16  # a graph of all rows for each
NODE = np.dtype(  # CUDA_KERNEL_NODE_PARAMS_v2
    [
        ("func", "u8"),
        ("grid", "u4", 3),
        ("block", "u4", 3),
        ("shared_bytes", "u4"),
        ("unused", "u4"),
        ("params", "u8"),
        ("extra", "u8"),
        ("kern", "u8"),
        ("context", "u8"),
    ]
)
EXTENTS = ("grid", "block", "shared_bytes")
INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes
_KERNEL = driver.CUgraphNodeType.CU_GRAPH_NODE_TYPE_KERNEL


class CudaGraph:
    """`Graph` by stream capture. What is allocated meanwhile lies in a pool of torch's allocator.

    Not taken: `torch.cuda.CUDAGraph`. Where a capture fails it leaves torch's allocator and its random numbers in the
    middle of one.

    Attributes:
        graph: what was recorded.
    """

    def __init__(self, index: int, pool: torch.cuda.MemPool, stream: Stream) -> None:
        self._index = index
        self._pool = pool
        self._stream = stream
        self._outside = ExitStack()
        self.graph: driver.CUgraph | None = None
        self._launched: driver.CUgraphExec | None = None

    def begin(self) -> None:
        with ExitStack() as outside:
            outside.enter_context(torch.cuda.use_mem_pool(self._pool, self._index))
            outside.enter_context(torch.cuda.stream(self._stream))  # the default one cannot be captured
            mode = driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL  # others allocate and map meanwhile
            checked("cuStreamBeginCapture", driver.cuStreamBeginCapture(self._stream.cuda_stream, mode))
            self._outside = outside.pop_all()

    def end(self) -> None:
        code, graph = self._leave()
        if code:
            raise DeviceError(describe("cuStreamEndCapture", code))
        self.graph = graph

    def abandon(self) -> None:
        code, graph = self._leave()
        if not code:
            driver.cuGraphDestroy(graph)

    def _leave(self) -> tuple[driver.CUresult, driver.CUgraph]:
        with self._outside:
            return driver.cuStreamEndCapture(self._stream.cuda_stream)

    def replay(self, stream: Stream) -> None:
        if self._launched is None:
            self._launched = checked("cuGraphInstantiate", driver.cuGraphInstantiate(self.graph, 0))
        if code := driver.cuGraphLaunch(self._launched, stream.cuda_stream)[0]:
            raise DeviceError(describe("cuGraphLaunch", code))

    def __del__(self) -> None:
        if self._launched is not None:
            driver.cuGraphExecDestroy(self._launched)  # behind what is running
        if self.graph is not None:
            driver.cuGraphDestroy(self.graph)


class CudaGraphs:
    """`Graphs` that share a pool and a stream to be recorded on."""

    def __init__(self, index: int, pool: torch.cuda.MemPool, stream: Stream) -> None:
        self.index, self.pool, self.stream = index, pool, stream

    def new(self) -> CudaGraph:
        return CudaGraph(self.index, self.pool, self.stream)

    def chain(self, rows: Sequence[Row]) -> CudaChain:
        with torch.cuda.device(self.index):
            return CudaChain(CudaGraphs(self.index, torch.cuda.MemPool(), self.stream), rows)


@dataclass(frozen=True, eq=False)
class _Step:
    """What the kernels of a step are called with, in the first row, and where its own addresses stand.

    Attributes:
        nodes: [K] of `NODE`.
        sizes: for each kernel, its parameters' sizes in bytes.
        words: [W] of uint64, the parameters of all kernels, each from the beginning of a word on.
        columns, tensors, distances: which words are addresses within the row's tensors, of which, and how far within.
    """

    nodes: np.ndarray
    sizes: list[list[int]]
    words: np.ndarray
    columns: np.ndarray
    tensors: np.ndarray
    distances: np.ndarray

    @cached_property
    def kernels(self) -> Hashable:
        """Which they are; steps of the same ones go into the same graph."""
        return self.nodes["func"].tobytes(), self.nodes["kern"].tobytes(), tuple(map(tuple, self.sizes))


class _Linked:
    """Rows in one graph, for steps of certain kernels.

    Args:
        sample: such a step's graph, from which the kernels' attributes are taken.
    """

    def __init__(self, rows: Sequence[Row], step: _Step, sample: driver.CUgraph) -> None:
        self._launched = self._graph = None
        self._graph = checked("cuGraphCreate", driver.cuGraphCreate(0))
        library = ctypes.PyDLL("libcuda.so.1")  # it keeps the interpreter: each call takes a microsecond
        add, self._set = library.cuGraphAddKernelNode_v2, library.cuGraphExecKernelNodeSetParams_v2
        add.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p]
        self._set.argtypes = [ctypes.c_void_p] * 3
        self._words = np.tile(step.words, (len(rows), 1))
        self._nodes = np.tile(step.nodes, (len(rows), 1))
        self._tables = self._pointers(step.sizes)
        handles = []
        last: list[Any] = []
        for number, row in enumerate(rows):
            last = [self._child(last, row.before)]
            for kernel, source in enumerate(_nodes_of(sample)):
                made, behind = ctypes.c_void_p(), ctypes.c_void_p(int(last[0]))
                given = self._nodes[number, kernel : kernel + 1].ctypes.data
                code = add(ctypes.addressof(made), int(self._graph), ctypes.addressof(behind), 1, given)
                if code:
                    raise DeviceError(describe("cuGraphAddKernelNode", driver.CUresult(code)))
                last = [driver.CUgraphNode(made.value)]
                checked("cuGraphKernelNodeCopyAttributes", driver.cuGraphKernelNodeCopyAttributes(last[0], source))
                handles.append((made.value, given))
            last = [self._child(last, row.behind)]
        self._launched = checked("cuGraphInstantiate", driver.cuGraphInstantiate(self._graph, 0))
        self._handles = [(int(self._launched), node, given) for node, given in handles]

    def _pointers(self, sizes: list[list[int]]) -> np.ndarray:
        """For each row the addresses of all parameters; each node is told where those of its kernel begin."""
        ends = np.cumsum([0, *(_words(size) for kernel in sizes for size in kernel)])
        tables = self._words.ctypes.data + self._words.strides[0] * np.arange(len(self._words))[:, None] + 8 * ends[:-1]
        tables = np.ascontiguousarray(tables, dtype=np.uint64)
        first = np.cumsum([0, *map(len, sizes)])[:-1]
        self._nodes["params"] = tables.ctypes.data + tables.strides[0] * np.arange(len(tables))[:, None] + 8 * first
        return tables

    def _child(self, last: list[Any], graph: Graph) -> Any:
        added = driver.cuGraphAddChildGraphNode(self._graph, last, len(last), graph.graph)
        return checked("cuGraphAddChildGraphNode", added)

    def launch(self, step: _Step, addresses: np.ndarray, stream: Stream) -> None:
        """`addresses`: [rows, tensors], uint64."""
        self._words[:] = step.words
        self._words[:, step.columns] = addresses[:, step.tensors] + step.distances
        for name in EXTENTS:
            self._nodes[name] = step.nodes[name]
        for handle in self._handles:
            if code := self._set(*handle):
                raise DeviceError(describe("cuGraphExecKernelNodeSetParams", driver.CUresult(code)))
        if code := driver.cuGraphLaunch(self._launched, stream.cuda_stream)[0]:
            raise DeviceError(describe("cuGraphLaunch", code))

    def __del__(self) -> None:
        if self._launched is not None:
            driver.cuGraphExecDestroy(self._launched)
        if self._graph is not None:
            driver.cuGraphDestroy(self._graph)


class CudaChain:
    """`Chain` by parameters that are exchanged before each launch.

    Args:
        graphs: makes those that steps are recorded in.
    """

    def __init__(self, graphs: CudaGraphs, rows: Sequence[Row]) -> None:
        self._graphs = graphs
        self._rows = tuple(rows)
        own = [[0, *map(torch.Tensor.data_ptr, (*row.reads, row.into))] for row in rows]
        self._addresses = np.array(own, dtype=np.uint64)  # [rows, tensors]; the first is the one that changes
        self._steps: dict[Hashable, _Step] = {}
        self._samples: dict[Hashable, CudaGraph] = {}  # one for steps of the same kernels
        self._linked: dict[Hashable, _Linked] = {}
        self._layouts: dict[tuple[int, int], list[int]] = {}

    def record(self, key: Hashable, step: Callable[[int], torch.Tensor], changing: torch.Tensor) -> Hashable:
        found = self._steps.get(key)
        if found is None:
            found = self._recorded(step, changing)
            if len(self._steps) == STEPS_KEPT:
                del self._steps[next(iter(self._steps))]
            self._steps[key] = found
        return found.kernels

    def replay(
        self,
        stream: Stream,
        key: Hashable,
        step: Callable[[int], torch.Tensor],
        changing: Sequence[torch.Tensor],
        part: range,
    ) -> None:
        found, rows = self._steps[key], slice(part.start, part.stop)
        linked = self._linked.get((found.kernels, part))
        if linked is None:
            linked = _Linked(self._rows[rows], found, self._samples[found.kernels].graph)
            self._linked[found.kernels, part] = linked
        self._addresses[rows, 0] = list(map(torch.Tensor.data_ptr, changing))
        linked.launch(found, self._addresses[rows], stream)

    def _recorded(self, step: Callable[[int], torch.Tensor], changing: torch.Tensor) -> _Step:
        graph, row = self._graphs.new(), self._rows[0]
        graph.begin()
        try:
            copied_by_kernel(step(0), row.into)
        except BaseException:
            graph.abandon()
            raise
        graph.end()
        found = self._read(graph.graph, [changing, *row.reads, row.into])
        if found.kernels not in self._samples:
            if len(self._samples) == SAMPLES_KEPT:
                raise DeviceError(f"steps take other kernels again and again, of {SAMPLES_KEPT} sets by now")
            self._samples[found.kernels] = graph
        return found

    def _read(self, graph: driver.CUgraph, tensors: Sequence[torch.Tensor]) -> _Step:
        nodes, sizes, blobs = [], [], []
        for node in _nodes_of(graph):
            kind = checked("cuGraphNodeGetType", driver.cuGraphNodeGetType(node))
            if kind != _KERNEL:
                raise DeviceError(f"a step has a {kind.name}, and only kernels can be changed from launch to launch")
            params = checked("cuGraphKernelNodeGetParams", driver.cuGraphKernelNodeGetParams(node))
            [known] = np.frombuffer(ctypes.string_at(int(params.getPtr()), NODE.itemsize), NODE)
            nodes.append(known)
            sizes.append(self._layout(params, (int(known["func"]), int(known["kern"]))))
            if known["extra"] or not known["params"] or not sizes[-1]:
                raise DeviceError("a step has a kernel of which the driver does not tell what it is called with")
            table = ctypes.cast(int(known["params"]), ctypes.POINTER(ctypes.c_void_p))
            for at, size in enumerate(sizes[-1]):
                blobs.append(ctypes.string_at(table[at], size).ljust(8 * _words(size), b"\0"))
        words = np.frombuffer(b"".join(blobs), np.uint64)
        return _Step(np.array(nodes, NODE), sizes, words, *relocated(words, tensors))

    def _layout(self, params: Any, function: tuple[int, int]) -> list[int]:
        """The sizes of a kernel's parameters."""
        if function not in self._layouts:
            asked, sizes = (driver.cuFuncGetParamInfo, params.func), []
            if not function[0]:
                asked = driver.cuKernelGetParamInfo, params.kern
            while not (found := asked[0](asked[1], len(sizes)))[0]:
                sizes.append(found[2])
            if found[0] != driver.CUresult.CUDA_ERROR_INVALID_VALUE:  # what it says behind the last one
                raise DeviceError(describe("a kernel's parameters: cuFuncGetParamInfo", found[0]))
            self._layouts[function] = sizes
        return self._layouts[function]


def copied_by_kernel(made: torch.Tensor, into: torch.Tensor) -> None:
    """`into.copy_(made)`, which where both are dense is no kernel: bit for bit, through integers of the same size."""
    kind = INTEGERS.get(made.element_size())
    if kind is None or (made.shape, made.dtype) != (into.shape, into.dtype):
        raise DeviceError(f"a step made {tuple(made.shape)} of {made.dtype} for {tuple(into.shape)} of {into.dtype}")
    torch.bitwise_or(made.view(kind), 0, out=into.view(kind))


def relocated(words: np.ndarray, tensors: Sequence[torch.Tensor]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Which of `words` are addresses within `tensors`, of which one each, and how far within, in bytes.

    Within two of them (slices of one tensor) it counts as of the one that begins last.
    """
    begins = np.array(list(map(torch.Tensor.data_ptr, tensors)), dtype=np.uint64)
    sizes = np.array(list(map(_extent_bytes, tensors)), dtype=np.uint64)
    later = np.argsort(begins, kind="stable")[::-1]
    within = (words[:, None] >= begins[later]) & (words[:, None] - begins[later] < sizes[later])
    columns = np.nonzero(within.any(axis=1))[0]
    of = later[within[columns].argmax(axis=1)]
    return columns, of, words[columns] - begins[of]


def _extent_bytes(tensor: torch.Tensor) -> int:
    """From its first element to behind its last."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (last + 1) * tensor.element_size()


def _words(size_bytes: int) -> int:
    return -(-size_bytes // 8)


def _nodes_of(graph: driver.CUgraph) -> list[Any]:
    """One behind the other. Raises DeviceError where some are side by side."""
    code, _, count = driver.cuGraphGetNodes(graph, 0)
    if not code:
        code, nodes, count = driver.cuGraphGetNodes(graph, count)
    if not code:
        code, begins, ends, *_, edges = driver.cuGraphGetEdges(graph, count)
    if code:
        raise DeviceError(describe("cuGraphGetNodes", code))
    nodes = nodes[:count]
    follows = {int(begin): int(end) for begin, end in zip(begins[:edges], ends[:edges], strict=True)}
    if edges != count - 1 or any(follows.get(int(one)) != int(other) for one, other in pairwise(nodes)):
        raise DeviceError("a step's kernels do not run one behind the other")
    return nodes
