"""What an event tells the driver, and when it asks it nothing, without a GPU. tests/gpu has the same on a GPU."""

import gc
from collections import defaultdict
from types import SimpleNamespace

import pytest
from cuda.bindings import driver

from djinn_core.device import cudaevents
from djinn_core.device.cudaevents import CudaEvent
from djinn_core.errors import DeviceError

OK, NOT_READY, LOST = (
    driver.CUresult.CUDA_SUCCESS,
    driver.CUresult.CUDA_ERROR_NOT_READY,
    driver.CUresult.CUDA_ERROR_LAUNCH_FAILED,
)
STREAM = SimpleNamespace(cuda_stream=8)
GPU = 0


class Calls:
    """Answers every call with `answer`, and keeps them."""

    def __init__(self) -> None:
        self.seen: list[tuple] = []
        self.answer = OK

    def __getattr__(self, name: str):
        def call(*arguments):
            self.seen.append((name, *arguments))
            return (self.answer,)

        return call


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    calls, made = Calls(), iter(range(100, 200))
    monkeypatch.setattr(cudaevents, "_idle", defaultdict(list))
    monkeypatch.setattr(cudaevents.driver, "cuEventCreate", lambda flags: (OK, next(made)))
    monkeypatch.setattr(cudaevents.driver, "cuEventSynchronize", calls.cuEventSynchronize)
    monkeypatch.setattr(cudaevents.driver, "cuEventElapsedTime", lambda begin, end: (OK, float(end - begin)))
    monkeypatch.setattr(cudaevents.driver, "cuGetErrorString", lambda code: (OK, b"what the driver says"))
    return calls


def event(calls: Calls, timing: bool = False, blocking: bool = False) -> CudaEvent:
    return CudaEvent(GPU, calls, lambda: None, timing, blocking)


def test_a_new_one_is_complete_and_asks_the_driver_nothing(calls):
    new = event(calls)
    assert new.query()
    new.synchronize()
    new.wait(STREAM)
    assert not calls.seen


def test_a_recorded_one_asks_the_driver(calls):
    one = event(calls)
    one.record(STREAM)
    one.wait(STREAM)
    one.synchronize()
    assert one.query()
    calls.answer = NOT_READY
    assert not one.query()
    begin = [("cuEventRecord", 100, 8), ("cuStreamWaitEvent", 8, 100, 0), ("cuEventSynchronize", 100)]
    assert calls.seen[:3] == begin


@pytest.mark.parametrize("use", ["record", "wait", "query", "synchronize"])
def test_what_the_driver_refuses_is_a_device_error_that_names_the_call(calls, use):
    one = event(calls)
    one.record(STREAM)
    calls.answer = LOST
    with pytest.raises(DeviceError, match=r"cu(Event|StreamWait)\w+ failed: CUDA_ERROR_LAUNCH_FAILED, what"):
        getattr(one, use)(*[STREAM] if use in ("record", "wait") else [])


def test_a_handle_is_used_again_and_its_last_recording_does_not_count(calls):
    one = event(calls)
    one.record(STREAM)
    del one
    gc.collect()
    calls.answer = NOT_READY
    again, other = event(calls), event(calls)
    assert again.query() and other.query()
    calls.answer = OK
    again.record(STREAM)
    other.record(STREAM)
    assert [seen[1] for seen in calls.seen] == [100, 100, 101]


def test_one_that_times_and_one_that_does_not_share_no_handle(calls):
    seen = set()
    for flags in ({}, {"timing": True}, {"blocking": True}, {"timing": True, "blocking": True}):
        seen.add(event(calls, **flags)._handle)
        gc.collect()
    assert len(seen) == 4


def test_one_that_could_not_be_made_leaves_no_handle(calls, monkeypatch):
    monkeypatch.setattr(cudaevents.driver, "cuEventCreate", lambda flags: (LOST, None))
    with pytest.raises(DeviceError, match="cuEventCreate"):
        event(calls)
    gc.collect()
    assert not any(cudaevents._idle.values())


def test_elapsed_time_is_of_two_complete_events_that_time(calls):
    begin, end, silent = event(calls, timing=True), event(calls, timing=True), event(calls)
    begin.record(STREAM)
    with pytest.raises(DeviceError, match="two complete events"):
        begin.elapsed_time(end)
    end.record(STREAM)
    silent.record(STREAM)
    with pytest.raises(DeviceError, match="two complete events"):
        begin.elapsed_time(silent)
    assert begin.elapsed_time(end) == 1.0
    calls.answer = NOT_READY
    with pytest.raises(DeviceError, match="two complete events"):
        begin.elapsed_time(end)
