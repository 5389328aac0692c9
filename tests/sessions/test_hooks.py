"""A user's hooks on the layers at which a pass stops and goes on."""

import pytest
import torch

from tests.sessions.oracle import Oracle, prompt
from tests.sessions.rigs import Rig


def halve_out(module, args, out):
    return out * 0.5 if isinstance(out, torch.Tensor) else (out[0] * 0.5, *out[1:])


def halve_in(module, args):
    return (args[0] * 0.5, *args[1:])


@pytest.mark.parametrize("kind,layer", [("post", 1), ("pre", 2), ("post", 0), ("post", 2), ("pre", 1), ("pre", 3)])
def test_a_hook_counts_in_a_pass_that_stops_as_in_one_that_does_not(rig: Rig, kind: str, layer: int) -> None:
    def hooked(model):
        module = model.model.layers[layer]
        return module.register_forward_hook(halve_out) if kind == "post" else module.register_forward_pre_hook(halve_in)

    hook = hooked(rig.stock)
    wanted = Oracle(rig.stock).forward(prompt())
    hook.remove()
    hook = hooked(rig.served)
    whole, session = rig.open(), rig.open()
    assert torch.equal(whole.forward(prompt()), wanted)
    session.forward(prompt(), stop_after=2)
    out = session.resume()
    hook.remove()
    assert torch.equal(out, wanted)
