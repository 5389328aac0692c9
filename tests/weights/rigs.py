"""What the streamers' tests share: compute that is asynchronous, as on a GPU, and parameters that can be rebound."""

from __future__ import annotations

from djinn_core.device.cpu import CpuDevice

CAPACITY_BYTES = 16 << 20


class AsyncDevice(CpuDevice):
    """An emulated device whose compute, too, runs behind the caller."""

    def __init__(self, link_gbps=None):
        super().__init__(CAPACITY_BYTES, link_gbps=link_gbps)
        self.compute = self.stream()

    def current_stream(self):
        return self.compute


class Holder:
    """Stands for a parameter: rebinding sets `data`."""

    def __init__(self, parameters, layer):
        self._parameters, self._layer = parameters, layer

    @property
    def data(self):
        return self._parameters[self._layer]

    @data.setter
    def data(self, memory):
        self._parameters[self._layer] = memory
