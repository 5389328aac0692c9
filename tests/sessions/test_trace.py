"""What a resume says of itself: what its first layer waits for, and whether its state was there."""

from __future__ import annotations

import torch

from tests.sessions.oracle import prompt
from tests.sessions.rigs import LAYERS, Rig


def stopped_in_a_decode(rig: Rig, layer: int):
    session = rig.open()
    first = session.forward(prompt())
    session.forward(first.float().argmax(-1)[:, None], stop_after=layer)
    return session


def test_the_first_layer_waits_for_its_own_kv(rig: Rig) -> None:
    session = stopped_in_a_decode(rig, 2)
    session.pause(release=True)
    session.wait_until("released", 10)
    session.resume()
    trace = session.trace
    assert not trace.found_resident
    assert trace.gates == (trace.ready, trace.job.arrival[2])
    session.wait_until("restored", 10)
    assert trace.job.begun.elapsed_time(trace.gates[1]) <= trace.job.begun.elapsed_time(trace.restored)


def test_a_layer_that_was_there_gates_nothing(rig: Rig) -> None:
    session = stopped_in_a_decode(rig, 2)
    session.pause()
    session.wait_until("clean", 10)
    session.resume()
    assert session.trace.found_resident and session.trace.gates == (session.trace.ready,)


def test_behind_the_last_layer_only_the_boundary_counts(rig: Rig) -> None:
    session = stopped_in_a_decode(rig, LAYERS)
    session.pause(release=True)
    session.wait_until("released", 10)
    session.resume()
    assert not session.trace.found_resident and session.trace.gates == (session.trace.ready,)


def test_the_spans_of_a_resume_add_up(rig: Rig) -> None:
    session = stopped_in_a_decode(rig, 2)
    session.pause(release=True)
    session.wait_until("released", 10)
    session.resume()
    spans = session.trace.spans
    names = ["boundary issued", "lineage", "memory held", "first step issued", "bring-in begun", "pass issued"]
    assert [what for what, _ in spans] == names
    assert all(ms >= 0 for _, ms in spans)
    whole_ms = (session.trace.marks[-1][1] - session.trace.begun_s) * 1e3
    assert abs(sum(ms for _, ms in spans) - whole_ms) < 1e-6


def test_a_trace_keeps_its_own_events(rig: Rig) -> None:
    session = stopped_in_a_decode(rig, 2)
    point = session.stopped
    gates = []
    for _ in range(2):
        session.pause(release=True)
        session.wait_until("released", 10)
        session.resume(point)
        gates.append(session.trace.gates)
    assert not set(gates[0]) & set(gates[1])
    assert isinstance(session.logits, torch.Tensor)
