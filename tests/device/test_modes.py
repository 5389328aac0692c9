"""Memory made under a caller's inference mode is ordinary memory: a worker thread without the mode may write to it."""

import torch


def test_memory_made_in_inference_mode_is_writable_outside(device):
    unit = device.granularity_bytes
    with torch.inference_mode():
        address = device.reserve(unit)
        handle = device.create(unit)
        device.map(address, handle, unit)
        device.grant(address, unit)
        tensor = device.tensor(address, unit)
    tensor[:4].view(torch.int32).fill_(7)
    assert int(tensor[:4].view(torch.int32)[0]) == 7
    del tensor
    device.synchronize()
    device.unmap(address, unit)
    device.destroy(handle)
    device.release(address, unit)
