"""What comes before a method's timed resume: nobody may owe its time to whoever always runs before it."""

from collections import Counter
from itertools import pairwise
from types import SimpleNamespace

import pytest

from djinn_core.device import open_device
from workflow.scripts import resume
from workflow.scripts.resume import balanced


@pytest.mark.parametrize("count", range(1, 8))
def test_everyone_runs_equally_often_behind_each_other_one(count):
    repeats = 2 * count if count % 2 else count
    orders = [balanced(list(range(count)), repeat) for repeat in range(repeats)]
    assert all(sorted(order) == list(range(count)) for order in orders)
    neighbours = Counter(pair for order in orders for pair in pairwise(order))
    assert neighbours == {(a, b): 2 if count % 2 else 1 for a in range(count) for b in range(count) if a != b}


def test_everyone_is_first_in_turn():
    assert [balanced([0, 1, 2, 3, 4, 5], repeat)[0] for repeat in range(6)] == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("is_gpu", [True, False])
def test_a_gpu_rests_after_a_resume_for_as_long_as_it_took(monkeypatch, is_gpu):
    rests, samples, device = [], {}, open_device("cpu", capacity_bytes=1 << 20)
    monkeypatch.setattr(resume, "rest", rests.append)
    done = device.event(timing=True)
    done.record(device.current_stream())
    resumed = SimpleNamespace(done=done, ready=done, logits=None, executed=3)
    method = SimpleNamespace(resume=lambda *_: resumed, restored=lambda _: None, state_bytes=lambda _: 0)
    result = SimpleNamespace(sample=lambda metric, value, unit, **_: samples.update({metric: (value, unit)}))
    resume.measure_resume(
        SimpleNamespace(is_gpu=is_gpu, result=result),
        SimpleNamespace(device=device),
        SimpleNamespace(method=method, handle=None, dims={}),
        False,
        {},
    )
    value, unit = samples["restored_ms"]
    assert unit == "ms" and rests == ([value / 1e3] if is_gpu else [])
    device.close()
