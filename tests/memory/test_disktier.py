"""The disk tier: bytes and checksums, a full disk, nothing left behind."""

import errno
import os

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from djinn_core.device import libc, open_device
from djinn_core.errors import ConfigError, DeviceError, IntegrityError, OutOfDisk, UsageError
from djinn_core.memory import DiskTier, HostTier, disktier

MIB = 1 << 20


@pytest.fixture
def disk(tmp_path):
    tier = DiskTier(tmp_path, 32 * MIB)
    yield tier
    tier.close()


def random_bytes(size_bytes, seed=0):
    return torch.randint(0, 256, (size_bytes,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


@given(size=st.integers(1, 3 * 4096), shift=st.integers(0, 1))
def test_any_length_at_any_address_comes_back(disk, size, shift):
    whole = random_bytes(size + shift, size)
    block = disk.write(whole[shift:])
    back = torch.zeros(size + shift, dtype=torch.uint8)
    disk.read(block, back[shift:])
    assert torch.equal(back[shift:], whole[shift:])
    disk.free(block)
    assert disk.held_bytes == 0


@pytest.mark.parametrize("size", [8 * MIB, 8 * MIB + 1, 17 * MIB + 4097])
@pytest.mark.parametrize("aligned", [True, False])
def test_long_blocks_cross_pieces(disk, size, aligned):
    device = open_device("cpu", capacity_bytes=MIB)
    host = HostTier(device, 64 * MIB)
    block, back = host.allocate_exact(size + 16, "src"), host.allocate_exact(size + 16, "dst")
    at = slice(0, size) if aligned else slice(16, size + 16)
    block.tensor.copy_(random_bytes(size + 16))
    disk.read(disk.write(block.tensor[at]), back.tensor[at])
    assert torch.equal(back.tensor[at], block.tensor[at])
    assert not back.tensor[size:].any() if aligned else not back.tensor[:16].any()
    block.free()
    back.free()
    host.close()
    device.close()


def test_what_the_disk_changed_is_noticed(disk):
    block = disk.write(random_bytes(10_000))
    fd = os.open(f"/proc/self/fd/{disk._fd}", os.O_RDWR)
    byte = os.pread(fd, 1, block.offset + 5000)[0]
    os.pwrite(fd, bytes([byte ^ 1]), block.offset + 5000)
    os.close(fd)
    with pytest.raises(IntegrityError, match="crc32"):
        disk.read(block, torch.empty(10_000, dtype=torch.uint8))


def test_a_full_budget_is_refused_and_room_comes_back(disk):
    blocks = [disk.write(random_bytes(8 * MIB, seed)) for seed in range(4)]
    with pytest.raises(OutOfDisk) as refused:
        disk.write(random_bytes(1))
    assert (refused.value.needed_bytes, refused.value.free_bytes) == (1, 0)
    disk.free(blocks.pop(1))
    disk.free(blocks[0])
    with pytest.raises(UsageError, match="before"):
        disk.free(blocks[0])
    assert disk.free_bytes == 16 * MIB
    again = disk.write(random_bytes(16 * MIB, 9))
    back = torch.empty(16 * MIB, dtype=torch.uint8)
    disk.read(again, back)
    assert torch.equal(back, random_bytes(16 * MIB, 9))


def test_holes_between_blocks_turn_no_block_away(disk):
    blocks = [disk.write(random_bytes(MIB, seed)) for seed in range(32)]
    for block in blocks[::2]:
        disk.free(block)
    source = random_bytes(16 * MIB)
    back = torch.empty_like(source)
    disk.read(disk.write(source), back)
    assert torch.equal(back, source)
    assert disk.free_bytes == 0


def test_freed_blocks_leave_the_file_system(disk):
    block = disk.write(random_bytes(16 * MIB))
    os.fsync(disk._fd)
    held = os.fstat(disk._fd).st_blocks * 512
    assert held >= 16 * MIB
    disk.free(block)
    assert os.fstat(disk._fd).st_blocks * 512 <= held - 16 * MIB


def test_no_name_is_left_in_the_folder(disk, tmp_path):
    disk.write(random_bytes(10))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("code", "kind"), [(errno.ENOSPC, OutOfDisk), (errno.EIO, DeviceError)])
def test_a_failed_write_frees_its_room(disk, monkeypatch, code, kind):
    calls = []

    def pwritev(fd, buffers, offset):
        calls.append(offset)
        if len(calls) == 2:
            raise OSError(code, os.strerror(code))
        return real(fd, buffers, offset)

    real = os.pwritev
    monkeypatch.setattr(disktier.os, "pwritev", pwritev)
    with pytest.raises(kind):
        disk.write(random_bytes(16 * MIB))
    assert disk.free_bytes == disk.budget_bytes
    source = random_bytes(16 * MIB)
    back = torch.empty_like(source)
    disk.read(disk.write(source), back)
    assert torch.equal(back, source)


def test_short_writes_and_reads_are_continued(tmp_path, monkeypatch):
    def half(buffer):
        return buffer[: max(4096, len(buffer) // 2 // 4096 * 4096)]

    write, read = os.pwritev, os.preadv
    monkeypatch.setattr(disktier.os, "pwritev", lambda fd, b, at: write(fd, [half(b[0])], at) - (len(b[0]) > 16384))
    monkeypatch.setattr(disktier.os, "preadv", lambda fd, b, at: read(fd, [half(b[0])], at))
    disk = DiskTier(tmp_path, MIB)
    source = random_bytes(100_001)
    back = torch.empty_like(source)
    disk.read(disk.write(source), back)
    assert torch.equal(back, source)
    disk.close()


def test_without_direct_io_it_says_so(tmp_path, monkeypatch):
    real = os.open

    def refuse_direct(path, flags, *rest):
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "no direct I/O here")
        return real(path, flags, *rest)

    monkeypatch.setattr(disktier.os, "open", refuse_direct)
    disk = DiskTier(tmp_path, MIB)
    assert disk.direct is False
    source = random_bytes(5001)
    back = torch.empty_like(source)
    disk.read(disk.write(source), back)
    assert torch.equal(back, source)
    disk.close()


def test_a_folder_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="nowhere"):
        DiskTier(tmp_path / "nowhere", MIB)


def test_misuse_is_refused(disk):
    block = disk.write(random_bytes(100))
    with pytest.raises(ValueError, match="100 bytes read into 99"):
        disk.read(block, torch.empty(99, dtype=torch.uint8))
    with pytest.raises(ValueError, match="uint8"):
        disk.write(torch.zeros(4))
    disk.close()
    with pytest.raises(UsageError, match="closed"):
        disk.read(block, torch.empty(100, dtype=torch.uint8))
    with pytest.raises(UsageError, match="closed"):
        disk.write(torch.zeros(4, dtype=torch.uint8))


def test_punched_memory_is_zero():
    fd = os.memfd_create("test")
    os.write(fd, b"x" * 8192)
    libc.punch_hole(fd, 0, 4096)
    assert os.pread(fd, 8192, 0) == b"\0" * 4096 + b"x" * 4096
    os.close(fd)
