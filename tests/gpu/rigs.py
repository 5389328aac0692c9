"""A small fp16 model with stock weights, served on the first GPU beside its stock self."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PretrainedConfig, PreTrainedModel

from djinn_core.device import open_device
from djinn_core.device.cuda import CudaDevice
from djinn_core.memory import ExtentPool, HostTier
from djinn_core.models.boundary import NullProvider, install
from djinn_core.models.graphs import LayerGraphs
from djinn_core.models.stack import find_stack
from djinn_core.sessions import Sessions
from djinn_core.turn import Turn

MIB = 1 << 20
LAYERS = 4
CONFIG = LlamaConfig(
    vocab_size=128,
    hidden_size=256,
    intermediate_size=512,
    num_hidden_layers=LAYERS,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=4096,
)


@contextmanager
def cuda_rig(
    *, graphs: bool = False, config: PretrainedConfig = CONFIG
) -> Iterator[tuple[PreTrainedModel, PreTrainedModel, CudaDevice, Sessions]]:
    """The stock model, the served one, the device, and the sessions room; nothing may be held in the end."""
    before = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(False)
    device = open_device("cuda:0")
    torch.manual_seed(7)
    stock = AutoModelForCausalLM.from_config(config, dtype=torch.float16).eval().requires_grad_(False).cuda()
    served = copy.deepcopy(stock)
    stack = find_stack(served)
    boundary = install(served, stack, NullProvider(), Turn())
    if graphs:
        boundary.graphs = LayerGraphs(device, stack.layers, range(LAYERS))
    pool = ExtentPool(device, 1024 * MIB)
    host = HostTier(device, 1024 * MIB)
    sessions = Sessions(device, pool, host)
    yield stock, served, device, sessions
    sessions.close()
    assert pool.held_bytes == 0 and host.held_bytes == 0
    if graphs:
        boundary.graphs.close()
    pool.close()
    host.close()
    device.close()
    torch.backends.cuda.enable_cudnn_sdp(before)
