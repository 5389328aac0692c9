"""Inference mode belongs to a thread: neither memory made in it nor work queued in it may depend on whose it is."""

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


def test_queued_work_runs_in_its_callers_mode(device):
    stream = device.stream()
    with torch.inference_mode():
        made = torch.zeros(4, device=device.torch_device)
        device.launch(stream, lambda: made.fill_(3))
    device.synchronize()
    assert made.tolist() == [3.0] * 4
