"""The ledger: one answer, with figures that add up, and a table for people."""

import dataclasses

import pytest

from djinn_core.memory import DiskTier, ExtentPool, HostTier, Kind, Ledger

MIB = 1 << 20


def test_the_snapshot_says_who_holds_what(cpu_device, tmp_path):
    pool = ExtentPool(cpu_device, 16 * MIB)
    host, disk = HostTier(cpu_device, 8 * MIB), DiskTier(tmp_path, 4 * MIB)
    extents = [
        pool.acquire(4 * MIB, Kind.RESIDENT_WEIGHTS, "model"),
        pool.acquire(2 * MIB, Kind.RING, "model"),
        pool.acquire(1 * MIB, Kind.STAGING, "boundary"),
        pool.acquire(3 * MIB, Kind.KV, "s1"),
        pool.acquire(1 * MIB, Kind.KV, "s1"),
        pool.acquire(2 * MIB, Kind.KV, "s2"),
    ]
    block = host.allocate_exact(3 * MIB, "s1")
    memory = Ledger(pool, host, disk, context_bytes=5 * MIB, activation_bytes=6 * MIB).snapshot()
    assert memory.budget_bytes == 27 * MIB
    assert memory.resident_weights_bytes == 4 * MIB
    assert memory.ring_bytes == 2 * MIB
    assert memory.staging_bytes == 1 * MIB
    assert memory.kv_by_session == {"s1": 4 * MIB, "s2": 2 * MIB}
    assert memory.kv_bytes == 6 * MIB
    assert memory.free_bytes == 3 * MIB
    assert (memory.host_held_bytes, memory.host_free_bytes, memory.host_pinned_bytes) == (3 * MIB, 5 * MIB, 3 * MIB)
    assert (memory.disk_budget_bytes, memory.disk_held_bytes, memory.disk_free_bytes) == (4 * MIB, 0, 4 * MIB)
    with pytest.raises(dataclasses.FrozenInstanceError):
        memory.free_bytes = 0
    with pytest.raises(TypeError):
        memory.kv_by_session["s3"] = 1
    for extent in extents:
        pool.give_back(extent)
    assert memory.kv_bytes == 6 * MIB  # a snapshot stays what it was
    assert Ledger(pool, budget_bytes=30 * MIB).snapshot().budget_bytes == 30 * MIB
    block.free()
    host.close()
    disk.close()
    pool.close()


def test_the_table_is_aligned_and_complete(cpu_device):
    pool = ExtentPool(cpu_device, 16 * MIB)
    extent = pool.acquire(3 * MIB, Kind.KV, "session-1")
    lines = str(Ledger(pool, context_bytes=MIB).snapshot()).splitlines()
    assert len({len(line) for line in lines}) == 1
    assert lines[0].split() == ["memory", "bytes", "MiB"]
    table = {line.rsplit(maxsplit=2)[0].strip(): line.split()[-2:] for line in lines[1:]}
    assert table["KV cache"] == table["session-1"] == ["3,145,728", "3.0"]
    assert table["device budget"] == ["17,825,792", "17.0"]
    assert not any("host" in line or "disk" in line for line in lines)
    pool.give_back(extent)
    pool.close()
