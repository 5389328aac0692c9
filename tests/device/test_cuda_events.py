"""What an event tells the driver, through which calls and on which GPU, without one. tests/gpu has the same on one."""

import gc
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
from cuda.bindings import driver

from djinn_core.device import cudaevents
from djinn_core.device.cudaevents import CudaEvent, CudaEvents
from djinn_core.errors import DeviceError

OK, NOT_READY, LOST = (
    driver.CUresult.CUDA_SUCCESS,
    driver.CUresult.CUDA_ERROR_NOT_READY,
    driver.CUresult.CUDA_ERROR_LAUNCH_FAILED,
)
GPU = 1
STREAM, DEFAULT = SimpleNamespace(cuda_stream=8), SimpleNamespace(cuda_stream=0)


class Rig:
    """A GPU's events whose calls are kept in `seen`, with the GPU that was current then, and answered with `answer`."""

    def __init__(self) -> None:
        self.seen: list[tuple] = []
        self.current, self.made = 0, 99
        self.answer = OK
        self.held, self.given = self.calls("held"), self.calls("given")
        self.now = self.given
        self.gpu = CudaEvents(GPU, self.held, lambda: self.now, lambda: None)

    def calls(self, how: str) -> SimpleNamespace:
        names = ("cuEventRecord", "cuEventQuery", "cuStreamWaitEvent", "cuEventSynchronize")
        return SimpleNamespace(**{name: self.call(how, name) for name in names})

    def call(self, how: str, name: str):
        def call(*arguments: int) -> tuple:
            self.seen.append((how, self.current, name, *arguments))
            return (self.answer,)

        return call

    def create(self, flags: int) -> tuple:
        if self.answer is not OK:
            return self.answer, None
        self.seen.append(("given", self.current, "cuEventCreate"))
        self.made += 1
        return OK, self.made

    def event(self, timing: bool = False, blocking: bool = False) -> CudaEvent:
        return CudaEvent(self.gpu, timing, blocking)

    @contextmanager
    def guard(self, index: int) -> Iterator[None]:
        before, self.current = self.current, index
        yield
        self.current = before


@pytest.fixture
def rig(monkeypatch: pytest.MonkeyPatch) -> Rig:
    rig = Rig()
    monkeypatch.setattr(cudaevents, "_idle", defaultdict(list))
    monkeypatch.setattr(cudaevents.torch.cuda, "device", rig.guard)
    monkeypatch.setattr(cudaevents.driver, "cuEventCreate", rig.create)
    monkeypatch.setattr(cudaevents.driver, "cuEventSynchronize", rig.given.cuEventSynchronize)
    monkeypatch.setattr(cudaevents.driver, "cuEventElapsedTime", lambda begin, end: (OK, float(end - begin)))
    monkeypatch.setattr(cudaevents.driver, "cuGetErrorString", lambda code: (OK, b"what the driver says"))
    return rig


def test_a_new_one_is_complete_and_asks_the_driver_nothing(rig):
    new = rig.event()
    rig.seen.clear()
    assert new.query()
    new.synchronize()
    new.wait(STREAM)
    assert not rig.seen


def test_a_recorded_one_asks_the_driver_and_only_a_question_always_keeps_the_interpreter(rig):
    one = rig.event()
    rig.seen.clear()
    for calls in (rig.given, rig.held):
        rig.now = calls
        one.record(STREAM)
        one.wait(STREAM)
        one.synchronize()
        assert one.query()
    rig.answer = NOT_READY
    assert not one.query()

    def all_of(how: str) -> list[tuple]:
        began = [(how, 0, "cuEventRecord", 100, 8), (how, 0, "cuStreamWaitEvent", 8, 100, 0)]
        return [*began, ("given", 0, "cuEventSynchronize", 100), ("held", 0, "cuEventQuery", 100)]

    assert rig.seen == [*all_of("given"), *all_of("held"), ("held", 0, "cuEventQuery", 100)]


def test_the_default_stream_is_the_gpus_own_one(rig):
    one = rig.event()
    one.record(DEFAULT)
    one.wait(DEFAULT)
    assert [seen[1:3] for seen in rig.seen] == [(1, "cuEventCreate"), (1, "cuEventRecord"), (1, "cuStreamWaitEvent")]
    assert rig.current == 0


@pytest.mark.parametrize("use", ["record", "wait", "query", "synchronize"])
def test_what_the_driver_refuses_is_a_device_error_that_names_the_call(rig, use):
    one = rig.event()
    one.record(STREAM)
    rig.answer = LOST
    with pytest.raises(DeviceError, match=r"cu(Event|StreamWait)\w+ failed: CUDA_ERROR_LAUNCH_FAILED, what"):
        getattr(one, use)(*[STREAM] if use in ("record", "wait") else [])


def test_one_that_is_interrupted_while_it_is_recorded_is_waited_for(rig):
    one = rig.event()

    def interrupted(*_: int) -> tuple:
        raise KeyboardInterrupt  # as if the driver had it already

    rig.given.cuEventRecord = interrupted
    with pytest.raises(KeyboardInterrupt):
        one.record(STREAM)
    rig.answer = NOT_READY
    assert not one.query()


def test_a_handle_is_used_again_and_its_last_recording_does_not_count(rig):
    one = rig.event()
    one.record(STREAM)
    del one
    gc.collect()
    again, other = rig.event(), rig.event()
    rig.answer = NOT_READY
    assert again.query() and other.query()
    rig.answer = OK
    again.record(STREAM)
    other.record(STREAM)
    assert [seen[3] for seen in rig.seen if seen[2] == "cuEventRecord"] == [100, 100, 101]


def test_one_that_times_and_one_that_does_not_share_no_handle(rig):
    seen = set()
    for flags in ({}, {"timing": True}, {"blocking": True}, {"timing": True, "blocking": True}):
        seen.add(rig.event(**flags)._handle)
        gc.collect()
    assert len(seen) == 4


def test_one_that_could_not_be_made_leaves_no_handle(rig):
    rig.answer = LOST
    with pytest.raises(DeviceError, match="cuEventCreate"):
        rig.event()
    gc.collect()
    assert not any(cudaevents._idle.values())


def test_elapsed_time_is_of_two_complete_events_that_time(rig):
    begin, end, silent = rig.event(timing=True), rig.event(timing=True), rig.event()
    begin.record(STREAM)
    with pytest.raises(DeviceError, match="two complete events"):
        begin.elapsed_time(end)
    end.record(STREAM)
    silent.record(STREAM)
    with pytest.raises(DeviceError, match="two complete events"):
        begin.elapsed_time(silent)
    assert begin.elapsed_time(end) == 1.0
    rig.answer = NOT_READY
    with pytest.raises(DeviceError, match="two complete events"):
        begin.elapsed_time(end)
