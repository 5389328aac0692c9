"""Small models with stock weights, served on the emulated device beside their stock selves."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, MistralConfig, PretrainedConfig, PreTrainedModel

from djinn_core.device import open_device
from djinn_core.device.cpu import CpuDevice
from djinn_core.memory import DiskTier, ExtentPool, HostTier, Kind
from djinn_core.models.boundary import NullProvider, executed_layers, install
from djinn_core.models.graphs import PROOFS, LayerGraphs
from djinn_core.models.stack import find_stack
from djinn_core.sessions import Policy, Session, Sessions
from djinn_core.turn import Turn
from tests.sessions.oracle import Oracle, prompt, speak

LAYERS = 4
SMALL = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
}


def config_of(family: str) -> PretrainedConfig:
    """The shrunken config of a model family."""
    if family == "gpt2":
        return GPT2Config(vocab_size=128, n_embd=64, n_layer=LAYERS, n_head=4, n_positions=256)
    if family == "mistral":
        return MistralConfig(**SMALL, num_key_value_heads=2, sliding_window=8)
    heads = 2 if family == "gqa" else 4
    return LlamaConfig(**SMALL, num_key_value_heads=heads, tie_word_embeddings=family == "gqa")


@dataclass
class Rig:
    """A stock model, the same one served, and the sessions room around it."""

    stock: PreTrainedModel
    served: PreTrainedModel
    device: CpuDevice
    pool: ExtentPool
    host: HostTier
    disk: DiskTier | None
    sessions: Sessions
    closed: bool = False

    def open(self, max_length: int = 48, batch_size: int = 1) -> Session:
        return self.sessions.open(self.served, max_length=max_length, batch_size=batch_size)

    def use_graphs(self) -> None:
        """One-token passes come from new graphs, of the model as it is now."""
        layers = find_stack(self.served).layers
        self.served._djinn_boundary.graphs = LayerGraphs(self.device, layers, range(LAYERS))

    @property
    def graphs(self) -> LayerGraphs:
        return self.served._djinn_boundary.graphs

    @property
    def executed(self) -> tuple[int, ...]:
        return executed_layers(self.served)

    @property
    def kv_bytes(self) -> int:
        return sum(size for (kind, _), size in self.pool.usage().held.items() if kind is Kind.KV)

    def close(self) -> None:
        """Close everything; nothing may be held then. Twice is once."""
        if self.closed:
            return
        self.closed = True
        self.sessions.close()
        assert self.pool.held_bytes == 0
        assert self.host.held_bytes == 0
        if self.disk is not None:
            assert self.disk.held_bytes == 0
            self.disk.close()
        self.pool.close()
        self.host.close()
        self.device.close()


_STOCK: dict[tuple[str, torch.dtype], PreTrainedModel] = {}


def stock_model(family: str, dtype: torch.dtype) -> PreTrainedModel:
    if (family, dtype) not in _STOCK:
        torch.manual_seed(7)
        model = AutoModelForCausalLM.from_config(config_of(family), dtype=dtype)
        _STOCK[family, dtype] = model.eval().requires_grad_(False)
    return _STOCK[family, dtype]


def make_rig(
    folder: Path,
    family: str = "llama",
    dtype: torch.dtype = torch.float32,
    *,
    device_bytes: int = 64 << 20,
    host_bytes: int = 256 << 20,
    disk_bytes: int = 0,
    policy: Policy | None = None,
    graphs: bool = False,
) -> Rig:
    stock = stock_model(family, dtype)
    served = copy.deepcopy(stock)
    install(served, find_stack(served), NullProvider(), Turn())
    device = open_device("cpu", capacity_bytes=device_bytes)
    pool = ExtentPool(device, device_bytes)
    host = HostTier(device, host_bytes)
    disk = DiskTier(folder, disk_bytes) if disk_bytes else None
    rig = Rig(stock, served, device, pool, host, disk, Sessions(device, pool, host, disk, policy))
    if graphs:
        rig.use_graphs()
    return rig


def spill(rig: Rig, session: Session) -> None:
    """All its blocks go to disk; it is off the device."""
    for block in session._holding.table:
        assert rig.sessions.pager.tiers._spill(session._holding, block)


def wait_for(reached: Callable[[], object]) -> None:
    """Return when it is reached; fails after ten seconds."""
    give_up_s = time.monotonic() + 10
    while not reached():
        assert time.monotonic() < give_up_s
        time.sleep(0.001)


MakeRig = Callable[..., Rig]


def begun(rig: Rig) -> tuple[Oracle, Session, torch.Tensor]:
    """A session whose passes come from graphs, several layers in a launch, and its oracle, at the same place."""
    oracle, session = Oracle(rig.served), rig.open()
    logits = session.forward(prompt())
    logits = speak(session, logits, 2 * PROOFS)[-1]
    oracle.greedy(oracle.forward(prompt()), 2 * PROOFS)
    assert rig.graphs.recorded == LAYERS and rig.graphs.chained == 1
    return oracle, session, logits


def released(rig: Rig, seed: int = 1) -> Session:
    """A session that has left the device; `seed` is its prompt's."""
    session = rig.open()
    session.forward(prompt(seed=seed))
    session.pause(release=True)
    session.wait_until("released", 10)
    return session
